"""The small model with eyes and ears: the towers' configuration, first weights, fast forward passes, and saving.

Owns: `vision_config` and `audio_config`, growing the text model's vocabulary by the marks of media, the features of
pictures and sounds in training, and writing the checkpoint in the published layout. The classes are transformers' own;
the text model is that of `model.py`.
"""

import math

import model as small
import numpy as np
import torch
from grow import MARKS
from PIL import Image
from torch import nn
from transformers import Gemma4AudioConfig, Gemma4AudioModel, Gemma4VisionConfig, Gemma4VisionModel
from transformers.models.gemma4.modeling_gemma4 import Gemma4MultimodalEmbedder

from mlx_gemma4.media.images import TOKEN_BUDGETS, ProcessedImage, process_image

VISION = {
    "attention_bias": False, "attention_dropout": 0.0, "default_output_length": 70, "dtype": "bfloat16",
    "global_head_dim": 32, "head_dim": 32, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 128,
    "initializer_range": 0.02, "intermediate_size": 320, "max_position_embeddings": 131072,
    "model_type": "gemma4_vision", "num_attention_heads": 4, "num_hidden_layers": 4, "num_key_value_heads": 4,
    "patch_size": 16, "pooling_kernel_size": 3, "position_embedding_size": 288, "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"}, "standardize": False,
    "use_clipped_linears": True,
}  # fmt: skip
AUDIO = {
    "attention_chunk_size": 12, "attention_context_left": 13, "attention_context_right": 0,
    "attention_invalid_logits_value": -1000000000.0, "attention_logit_cap": 50.0, "conv_kernel_size": 5,
    "dtype": "bfloat16", "gradient_clipping": 10000000000.0, "hidden_act": "silu", "hidden_size": 96,
    "initializer_range": 0.02, "model_type": "gemma4_audio", "num_attention_heads": 4, "num_hidden_layers": 2,
    "output_proj_dims": 128, "residual_weight": 0.5, "rms_norm_eps": 1e-06, "subsampling_conv_channels": [128, 8],
    "use_clipped_linears": True,
}  # fmt: skip
TOKEN_IDS = {
    "image_token_id": MARKS["<|image|>"], "boi_token_id": MARKS["<|image>"], "eoi_token_id": MARKS["<image|>"],
    "audio_token_id": MARKS["<|audio|>"], "boa_token_id": MARKS["<|audio>"], "eoa_token_id": MARKS["<audio|>"],
    "eoa_token_index": MARKS["<audio|>"], "video_token_id": MARKS["<|video|>"],
}  # fmt: skip
PATCHES = 9  # of a soft token
WIDTH = small.TEXT["hidden_size"]


def _kept(config: dict, clipped: bool) -> dict:
    return {k: v for k, v in config.items() if k not in ("model_type", "dtype")} | {"use_clipped_linears": clipped}


class Eyes(nn.Module):
    """The vision tower and its projector."""

    def __init__(self) -> None:
        super().__init__()
        config = Gemma4VisionConfig(**_kept(VISION, False))
        config._attn_implementation = "sdpa"
        self.vision_tower = Gemma4VisionModel(config)
        self.embed_vision = Gemma4MultimodalEmbedder(config, _text_config())

    def forward(self, patches: torch.Tensor, positions: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """uint8 [B, N, 768], int64 [B, N, 2], bool [B, N] -> [B, N / 9, WIDTH]"""
        return self.embed_vision(self.look(patches, positions, valid))

    def look(self, patches: torch.Tensor, positions: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """The same before the projector, [B, N / 9, 128].

        Unlike in transformers' own pass, the nine patches of a token stand together, as `arrange` puts them: the
        order of patches changes nothing, and pooling becomes a mean.
        """
        tower = self.vision_tower
        x = tower.patch_embedder(patches.float() / 255, positions, ~valid)
        table = tower.encoder.rotary_emb(x, positions)
        mask = valid[:, None, None]
        for layer in tower.encoder.layers:
            x = layer(x, attention_mask=mask, position_embeddings=table, position_ids=positions)
        b, n, e = x.shape
        return x.float().reshape(b, n // PATCHES, PATCHES, e).mean(2) * e**0.5


class Ears(nn.Module):
    """The audio tower and its projector."""

    def __init__(self) -> None:
        super().__init__()
        config = Gemma4AudioConfig(**_kept(AUDIO, False))
        self.audio_tower = Gemma4AudioModel(config)
        self.embed_audio = Gemma4MultimodalEmbedder(config, _text_config())

    def forward(self, mel: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """float [B, T, 128], bool [B, T] -> [B, T / 4, WIDTH]"""
        return self.embed_audio(self.listen(mel, mask))

    def listen(self, mel: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The same before the projector, [B, T / 4, 128]."""
        return self.audio_tower(mel, mask).last_hidden_state


def _text_config():
    from transformers import Gemma4TextConfig

    return Gemma4TextConfig(hidden_size=WIDTH, num_hidden_layers=2)


def start(module: nn.Module, seed: int) -> None:
    """First weights, in the manner of `model.build`; positions begin as waves, so that unseen ones are not noise."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                p.fill_(1.5**0.5 * p.numel() ** -0.25)
            elif name.endswith("position_embedding_table"):
                waves = p.shape[2] // 2
                lengths = torch.exp(torch.linspace(math.log(8), math.log(400), waves))
                angles = 2 * math.pi * torch.arange(p.shape[1])[:, None] / lengths
                table = torch.cat([angles.sin(), angles.cos()], 1) * 0.4
                p.copy_(torch.stack([table, table[:, torch.randperm(2 * waves)]]))
            elif name.endswith("patch_embedder.input_proj.weight"):
                p.copy_(_cosines(p.shape[0]))
            elif "post_" in name and name.endswith("norm.weight"):
                p.fill_(0.3)
            elif name.endswith("per_dim_scale"):
                p.fill_(0.0)
            elif p.dim() == 1:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                p.normal_(0, (p[0].numel()) ** -0.5)


def _cosines(count: int) -> torch.Tensor:
    """First weights for patches [count, 768]: the longest waves of brightness and of two contrasts of colour.

    Random ones see little of an edge beside the colour of the ground.
    """
    t = (torch.arange(16) + 0.5) * math.pi / 16
    colours = torch.tensor([[1.0, 1, 1], [1, 0, -1], [-0.5, 1, -0.5]])
    colours = colours / colours.norm(dim=1, keepdim=True)
    every = ((i * i + j * j + 8 * (c > 0), i, j, c) for i in range(16) for j in range(16) for c in range(3))
    out = []
    for size, i, j, c in sorted(every)[:count]:
        plane = torch.outer(torch.cos(i * t), torch.cos(j * t))
        plane = plane / plane.norm() * (0.15 if i == j == 0 else 1.0 if size < 40 else 1.5)
        out.append((plane[..., None] * colours[c]).reshape(-1))
    return torch.linalg.qr(torch.randn(count, count))[0] @ torch.stack(out)


def small_image(image: Image.Image, budget: int) -> ProcessedImage:
    """`process_image` for any budget: small pictures teach faster."""
    if budget in TOKEN_BUDGETS:
        return process_image(image, budget)
    factor = math.sqrt(budget * 48**2 / (image.width * image.height))
    columns, rows = (max(1, int(factor * length / 48)) for length in image.size)
    pixels = np.asarray(image.resize((48 * columns, 48 * rows), resample=Image.Resampling.BICUBIC))
    patches = pixels.reshape(3 * rows, 16, 3 * columns, 16, 3).transpose(0, 2, 1, 3, 4)
    return ProcessedImage(patches.reshape(9 * rows * columns, -1), 3 * rows, 3 * columns, *image.size)


def arrange(image: ProcessedImage) -> tuple[np.ndarray, np.ndarray]:
    """(patches, positions) of a ProcessedImage with the nine patches of each token together."""
    where = image.positions
    token = (where[:, 1] // 3) * (image.columns // 3) + where[:, 0] // 3
    order = np.argsort(token, kind="stable")
    return image.patches[order], where[order]


def batch_images(images: list, patches: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `Eyes` takes, each picture padded to so many patches."""
    pixels = np.zeros((len(images), patches, 768), np.uint8)
    places = np.full((len(images), patches, 2), -1, np.int64)
    for i, image in enumerate(images):
        p, w = arrange(image)
        pixels[i, : len(p)], places[i, : len(p)] = p, w
    places = torch.from_numpy(places)
    return torch.from_numpy(pixels), places, places[..., 0] >= 0


def batch_mel(mels: list[np.ndarray], frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What `Ears` takes."""
    mel = np.zeros((len(mels), frames, 128), np.float32)
    mask = np.zeros((len(mels), frames), bool)
    for i, m in enumerate(mels):
        mel[i, : len(m)], mask[i, : len(m)] = m, True
    return torch.from_numpy(mel), torch.from_numpy(mask)
