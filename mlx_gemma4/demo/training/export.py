"""The trained state as a checkpoint in the published layout, with eyes and ears.

    python export.py OUT CHECKPOINT

Owns: config.json, processor_config.json and the names of tensors, and the bounds of clipped linears, which are
measured on pictures and sounds of the training: half as far again as anything seen, so that they change nothing there.
"""

import json
import random
import shutil
import sys
from pathlib import Path

import model as small
import pictures
import sounds
import torch
import towers
from grow import VOCABULARY
from safetensors.torch import save_file
from train_media import Whole
from transformers.models.gemma4.modeling_gemma4 import Gemma4ClippableLinear

from mlx_gemma4.media.images import process_image
from mlx_gemma4.media.mel import log_mel

MARGIN = 1.5
SEEN = 120  # pictures and sounds

PROCESSOR = {
    "audio_ms_per_token": 40, "audio_seq_length": 750,
    "feature_extractor": {
        "dither": 0.0, "feature_extractor_type": "Gemma4AudioFeatureExtractor", "feature_size": 128,
        "fft_length": 512, "fft_overdrive": False, "frame_length": 320, "hop_length": 160, "input_scale_factor": 1.0,
        "max_frequency": 8000.0, "mel_floor": 0.001, "min_frequency": 0.0, "padding_side": "right",
        "padding_value": 0.0, "per_bin_mean": None, "per_bin_stddev": None, "preemphasis": 0.0,
        "preemphasis_htk_flavor": True, "return_attention_mask": True, "sampling_rate": 16000,
    },
    "image_processor": {
        "do_convert_rgb": True, "do_normalize": False, "do_rescale": True, "do_resize": True,
        "image_mean": [0.0, 0.0, 0.0], "image_processor_type": "Gemma4ImageProcessor", "image_seq_length": 70,
        "image_std": [1.0, 1.0, 1.0], "max_soft_tokens": 70, "patch_size": 16, "pooling_kernel_size": 3,
        "resample": 3, "rescale_factor": 0.00392156862745098,
    },
    "image_seq_length": 70, "processor_class": "Gemma4Processor",
    "video_processor": {
        "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "do_sample_frames": True,
        "image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0], "max_soft_tokens": 70, "num_frames": 32,
        "patch_size": 16, "pooling_kernel_size": 3, "resample": 3, "rescale_factor": 0.00392156862745098,
        "return_metadata": False, "video_processor_type": "Gemma4VideoProcessor",
    },
}  # fmt: skip


def config() -> dict:
    """config.json."""
    text = small.TEXT | {"vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY}
    return small.CONFIG | towers.TOKEN_IDS | {
        "audio_config": towers.AUDIO, "text_config": text, "vision_config": towers.VISION,
        "vision_soft_tokens_per_image": 70,
    }  # fmt: skip


@torch.no_grad()
def bounds(whole: Whole) -> dict[str, torch.Tensor]:
    """`X.{input,output}_{min,max}` of every clipped linear X, by its name within eyes or ears."""
    found: dict[str, torch.Tensor] = {}

    def watch(name: str):
        def hook(module, args, out) -> None:
            for side, value in (("input", args[0]), ("output", out)):
                for end, reach in (("min", value.min()), ("max", value.max())):
                    key = f"{name}.{side}_{end}"
                    wide = (MARGIN * reach).bfloat16().float()
                    pick = torch.minimum if end == "min" else torch.maximum
                    found[key] = pick(found[key], wide) if key in found else wide

        return hook

    hooks = []
    for part in (whole.eyes, whole.ears):
        for name, module in part.named_modules():
            if isinstance(module, Gemma4ClippableLinear):
                hooks.append(module.register_forward_hook(watch(name)))
    rng = random.Random("bounds")
    for _ in range(SEEN):
        image = process_image(pictures.draw(rng).image, 70)
        whole.eyes(*towers.batch_images([image], len(image.patches)))
        mel = log_mel(sounds.draw(rng).samples)
        whole.ears(*towers.batch_mel([mel], len(mel)))
    for hook in hooks:
        hook.remove()
    return found


def export(out: Path, folder: Path) -> None:
    """Writes the checkpoint, in float32."""
    torch.set_num_threads(1)
    whole = Whole()
    whole.load_state_dict(torch.load(out / "state.pt", weights_only=True)["model"])
    whole.eval()
    weights = small.published(whole.text, torch.float32)
    for part in (whole.eyes, whole.ears):
        weights |= {f"model.{name}": value.detach().contiguous().clone() for name, value in part.state_dict().items()}
    weights |= {f"model.{name}": value.clone() for name, value in bounds(whole).items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name, value in (("config", config()), ("processor_config", PROCESSOR), ("generation_config", small.GENERATION)):
        (folder / f"{name}.json").write_text(json.dumps(value, indent=2, sort_keys=name == "config") + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(out / name, folder / name)


if __name__ == "__main__":
    export(Path(sys.argv[1]), Path(sys.argv[2]))
