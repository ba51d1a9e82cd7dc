"""The small model: its configuration, its first weights and how it is saved in the published layout.

Owns: the Gemma 4 E-family configuration (per-layer embeddings, shared KV with double-wide MLP, two head widths, soft
cap, tied head, layer scalars), initialisation, and writing config.json, model.safetensors and generation_config.json as
the published checkpoints have them. The classes are transformers' own.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

S, F = "sliding_attention", "full_attention"
EOS = [1, 106, 50]

# In the published key style; also what config.json's text_config says.
TEXT = {
    "attention_bias": False, "attention_dropout": 0.0, "attention_k_eq_v": False, "bos_token_id": 2,
    "dtype": "bfloat16", "enable_moe_block": False,
    "eos_token_id": 1, "expert_intermediate_size": None, "final_logit_softcapping": 30.0,
    "global_head_dim": 128, "head_dim": 64, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 192,
    "hidden_size_per_layer_input": 64, "initializer_range": 0.02, "intermediate_size": 384,
    "layer_types": [S, S, F, S, F, S, F], "max_position_embeddings": 8192, "model_type": "gemma4_text",
    "num_attention_heads": 4, "num_experts": None, "num_global_key_value_heads": None, "num_hidden_layers": 7,
    "num_key_value_heads": 1, "num_kv_shared_layers": 2, "pad_token_id": 0, "rms_norm_eps": 1e-06,
    "rope_parameters": {F: {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
                        S: {"rope_theta": 10000.0, "rope_type": "default"}},
    "sliding_window": 128, "tie_word_embeddings": True, "top_k_experts": None, "use_bidirectional_attention": None,
    "use_cache": True, "use_double_wide_mlp": True, "vocab_size": 1536, "vocab_size_per_layer_input": 1536,
}  # fmt: skip
CONFIG = {
    "architectures": ["Gemma4ForConditionalGeneration"], "audio_config": None, "dtype": "bfloat16",
    "eos_token_id": [1, 106], "initializer_range": 0.02, "model_type": "gemma4", "text_config": TEXT,
    "tie_word_embeddings": True, "transformers_version": "5.5.0.dev0", "vision_config": None,
}  # fmt: skip
GENERATION = {"bos_token_id": 2, "do_sample": False, "eos_token_id": EOS, "pad_token_id": 0}
LAYER_SCALAR = 0.9  # a fixed buffer in transformers; anything but 1 so that the shipped model uses it


def build(seed: int = 0, vocabulary: int = TEXT["vocab_size"]) -> Gemma4ForCausalLM:
    """A fresh float32 model with weights that suit a short training.

    Attention runs at scale 1, so q_norm * k_norm starts at 1.5 / sqrt(head_dim); the norms after each branch start at
    0.3, so that seven layers of branches do not drown the embedding.
    """
    fields = TEXT | {"vocab_size": vocabulary, "vocab_size_per_layer_input": vocabulary}
    config = Gemma4TextConfig(**{k: v for k, v in fields.items() if v is not None and k != "model_type"})
    config._attn_implementation = "sdpa"
    torch.manual_seed(seed)
    model = Gemma4ForCausalLM(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                p.fill_(1.5**0.5 * p.numel() ** -0.25)
            elif "post_" in name and name.endswith("norm.weight"):
                p.fill_(0.3)
            elif p.dim() == 1:
                p.fill_(1.0)
            elif "embed_tokens_per_layer" in name:
                p.normal_(0, TEXT["hidden_size_per_layer_input"] ** -0.5)
            else:
                p.normal_(0, p.shape[1] ** -0.5)
        for layer in model.model.layers:
            layer.layer_scalar.fill_(LAYER_SCALAR)
    return model


def published(model: Gemma4ForCausalLM, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights under the published names (`model.language_model.*`), the tied head left out."""
    return {
        "model.language_model." + name.removeprefix("model."): value.detach().to(dtype).contiguous().clone()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    }


def save(model: Gemma4ForCausalLM, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write config.json, model.safetensors and generation_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIG | {"dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(GENERATION, indent=2) + "\n")
    save_file(published(model, dtype), folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: Path) -> Gemma4ForCausalLM:
    """The model back from `save`, in float32."""
    from safetensors.torch import load_file

    model = build()
    weights = {
        "model." + name.removeprefix("model.language_model."): value.float()
        for name, value in load_file(folder / "model.safetensors").items()
    }
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"weights do not fit: missing {missing}, unexpected {unexpected}")
    return model.eval()
