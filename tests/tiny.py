"""Random tiny Gemma 4 checkpoints in the published style, written with numpy and mlx alone.

Owns: `make_tiny` (a whole folder: config.json, HF-layout safetensors, tokenizer, template) and its parts. The
shapes keep every feature of the four families at toy size; input widths are multiples of 64, so each linear
can be quantized. No reference numbers here: tests that need truth bring fixtures or compare with
transformers.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

S, F = "sliding_attention", "full_attention"
VOCAB = 512

# Control tokens at their published ids; media tokens moved to the end of the small vocabulary.
SPECIAL = {
    **{
        "<pad>": 0,
        "<eos>": 1,
        "<bos>": 2,
        "<unk>": 3,
        "<mask>": 4,
        "<|tool>": 46,
        "<tool|>": 47,
        "<|tool_call>": 48,
    },
    **{"<tool_call|>": 49, "<|tool_response>": 50, "<tool_response|>": 51, '<|"|>': 52, "<|think|>": 98},
    **{"<|channel>": 100, "<channel|>": 101, "<|turn>": 105, "<turn|>": 106},
    **{"<|image|>": 500, "<|audio|>": 501, "<|video|>": 502, "<|image>": 503, "<image|>": 504},
    **{"<|audio>": 505, "<audio|>": 506},
}

_ONE_VECTOR = {
    "attention_k_eq_v": True,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "use_bidirectional_attention": "vision",
}
FAMILIES: dict[str, dict[str, Any]] = {
    # Layers 5..7 share: they read layer 4 (sliding) and 3 (full), and have twice the MLP width.
    "e2b": {
        "layer_types": [S, S, S, F, S, S, S, F],
        "num_kv_shared_layers": 3,
        "hidden_size_per_layer_input": 64,
        "use_double_wide_mlp": True,
    },
    "e4b": {
        "layer_types": [S, S, F, S, S, F],
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 64,
        "num_key_value_heads": 2,
    },
    "26b-a4b": {
        "layer_types": [S, S, F, S, S, F],
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 64,
        **_ONE_VECTOR,
    },
    "31b": {"layer_types": [S, S, F, S, S, F], **_ONE_VECTOR},
}


def tiny_config(family: str = "e2b", *, towers: bool = False, **overrides: Any) -> dict[str, Any]:
    """config.json as a dictionary; `overrides` replace fields of text_config.

    num_hidden_layers follows layer_types.
    """
    text: dict[str, Any] = {
        "attention_bias": False,
        "attention_k_eq_v": False,
        "bos_token_id": 2,
        "dtype": "bfloat16",
        "enable_moe_block": False,
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "global_head_dim": 32,
        "head_dim": 16,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 64,
        "hidden_size_per_layer_input": 0,
        "intermediate_size": 128,
        "max_position_embeddings": 4096,
        "model_type": "gemma4_text",
        "moe_intermediate_size": None,
        "num_attention_heads": 4,
        "num_experts": None,
        "num_global_key_value_heads": None,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 0,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            F: {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
            S: {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "sliding_window": 8,
        "tie_word_embeddings": True,
        "top_k_experts": None,
        "use_bidirectional_attention": None,
        "use_double_wide_mlp": False,
        "vocab_size": VOCAB,
        "vocab_size_per_layer_input": VOCAB,
        **FAMILIES[family],
        **overrides,
    }
    text["num_hidden_layers"] = len(text["layer_types"])
    effective = family.startswith("e")
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "audio_config": dict(_AUDIO) if towers and effective else None,
        "audio_token_id": SPECIAL["<|audio|>"],
        "boa_token_id": SPECIAL["<|audio>"],
        "boi_token_id": SPECIAL["<|image>"],
        "dtype": "bfloat16",
        "eoa_token_id": SPECIAL["<audio|>"],
        "eoi_token_id": SPECIAL["<image|>"],
        "eos_token_id": [1, 106],
        "image_token_id": SPECIAL["<|image|>"],
        "model_type": "gemma4",
        "text_config": text,
        "tie_word_embeddings": True,
        "video_token_id": SPECIAL["<|video|>"],
        "vision_config": dict(_VISION, standardize=not effective, use_clipped_linears=effective) if towers else None,
        "vision_soft_tokens_per_image": 70,
        # Not in published files; mlx-lm reads the vocabulary size here and assumes 262,144 without it.
        "vocab_size": text["vocab_size"],
    }


_VISION: dict[str, Any] = {
    "default_output_length": 70,
    "global_head_dim": 16,
    "head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 131072,
    "model_type": "gemma4_vision",
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "num_key_value_heads": 4,
    "patch_size": 16,
    "pooling_kernel_size": 3,
    "position_embedding_size": 256,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
}
_AUDIO: dict[str, Any] = {
    "attention_chunk_size": 12,
    "attention_context_left": 13,
    "attention_context_right": 0,
    "attention_invalid_logits_value": -1000000000.0,
    "attention_logit_cap": 50.0,
    "conv_kernel_size": 5,
    "gradient_clipping": 10000000000.0,
    "hidden_act": "silu",
    "hidden_size": 64,
    "model_type": "gemma4_audio",
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "output_proj_dims": 64,
    "residual_weight": 0.5,
    "rms_norm_eps": 1e-06,
    "subsampling_conv_channels": [128, 4],  # the first doubles as the number of mel bins
    "use_clipped_linears": True,
}


def text_shapes(text: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the text decoder as the Hub's files store it, less the prefix `model.language_model.`.

    Sharing layers carry the k_proj, v_proj and k_norm of published E2B and E4B files, which nothing reads.
    """
    h, ple, n = text["hidden_size"], text["hidden_size_per_layer_input"], text["num_hidden_layers"]
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (text["vocab_size"], h), "norm.weight": (h,)}
    if ple:
        shapes["embed_tokens_per_layer.weight"] = (text["vocab_size_per_layer_input"], n * ple)
        shapes["per_layer_model_projection.weight"] = (n * ple, h)
        shapes["per_layer_projection_norm.weight"] = (ple,)
    for i, kind in enumerate(text["layer_types"]):
        p = f"layers.{i}."
        full = kind == F
        d = text["global_head_dim"] if full else text["head_dim"]
        kv = (text["num_global_key_value_heads"] if full else None) or text["num_key_value_heads"]
        shared = i >= n - text["num_kv_shared_layers"]
        ff = text["intermediate_size"] * (2 if shared and text["use_double_wide_mlp"] else 1)
        norms = [
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ]
        shapes[p + "self_attn.q_proj.weight"] = (text["num_attention_heads"] * d, h)
        shapes[p + "self_attn.k_proj.weight"] = (kv * d, h)
        if not (full and text["attention_k_eq_v"]):
            shapes[p + "self_attn.v_proj.weight"] = (kv * d, h)
        shapes[p + "self_attn.o_proj.weight"] = (h, text["num_attention_heads"] * d)
        shapes[p + "self_attn.q_norm.weight"] = shapes[p + "self_attn.k_norm.weight"] = (d,)
        shapes[p + "mlp.gate_proj.weight"] = shapes[p + "mlp.up_proj.weight"] = (ff, h)
        shapes[p + "mlp.down_proj.weight"] = (h, ff)
        shapes[p + "layer_scalar"] = (1,)
        if ple:
            shapes[p + "per_layer_input_gate.weight"] = (ple, h)
            shapes[p + "per_layer_projection.weight"] = (h, ple)
            norms.append("post_per_layer_input_norm")
        if text["enable_moe_block"]:
            e, m = text["num_experts"], text["moe_intermediate_size"]
            shapes[p + "experts.gate_up_proj"] = (e, 2 * m, h)
            shapes[p + "experts.down_proj"] = (e, h, m)
            shapes[p + "router.proj.weight"] = (e, h)
            shapes[p + "router.scale"] = (h,)
            shapes[p + "router.per_expert_scale"] = (e,)
            norms += [
                "pre_feedforward_layernorm_2",
                "post_feedforward_layernorm_1",
                "post_feedforward_layernorm_2",
            ]
        shapes |= {f"{p}{norm}.weight": (h,) for norm in norms}
    return shapes


def tower_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the vision and audio towers (one layer each), with the leading `model.`."""
    shapes: dict[str, tuple[int, ...]] = {}
    out = config["text_config"]["hidden_size"]

    def linear(name: str, rows: int, columns: int, clipped: bool) -> None:
        shapes[f"{name}.linear.weight"] = (rows, columns)
        if clipped:
            shapes.update({f"{name}.{side}_{end}": () for side in ("input", "output") for end in ("min", "max")})

    if vision := config["vision_config"]:
        w, ff, clip = vision["hidden_size"], vision["intermediate_size"], vision["use_clipped_linears"]
        v, p = "model.vision_tower.", "model.vision_tower.encoder.layers.0."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linear(f"{p}self_attn.{name}", w, w, clip)
        for name, rows, columns in (("gate_proj", ff, w), ("up_proj", ff, w), ("down_proj", w, ff)):
            linear(f"{p}mlp.{name}", rows, columns, clip)
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            shapes[f"{p}{norm}_layernorm.weight"] = (w,)
        shapes[f"{p}self_attn.q_norm.weight"] = shapes[f"{p}self_attn.k_norm.weight"] = (vision["head_dim"],)
        shapes[v + "patch_embedder.input_proj.weight"] = (w, 3 * vision["patch_size"] ** 2)
        shapes[v + "patch_embedder.position_embedding_table"] = (2, vision["position_embedding_size"], w)
        if vision["standardize"]:
            shapes[v + "std_bias"] = shapes[v + "std_scale"] = (w,)
        shapes["model.embed_vision.embedding_projection.weight"] = (out, w)
    if audio := config["audio_config"]:
        w, (c0, c1) = audio["hidden_size"], audio["subsampling_conv_channels"]
        a, p = "model.audio_tower.", "model.audio_tower.layers.0."
        for ff in ("feed_forward1", "feed_forward2"):
            linear(f"{p}{ff}.ffw_layer_1", 4 * w, w, True)
            linear(f"{p}{ff}.ffw_layer_2", w, 4 * w, True)
            shapes[f"{p}{ff}.pre_layer_norm.weight"] = shapes[f"{p}{ff}.post_layer_norm.weight"] = (w,)
        for name in ("q_proj", "k_proj", "v_proj", "post"):
            linear(f"{p}self_attn.{name}", w, w, True)
        shapes[p + "self_attn.relative_k_proj.weight"] = (w, w)
        shapes[p + "self_attn.per_dim_scale"] = (w // audio["num_attention_heads"],)
        linear(p + "lconv1d.linear_start", 2 * w, w, True)
        linear(p + "lconv1d.linear_end", w, w, True)
        shapes[p + "lconv1d.depthwise_conv1d.weight"] = (w, 1, audio["conv_kernel_size"])
        for norm in (
            "lconv1d.conv_norm",
            "lconv1d.pre_layer_norm",
            "norm_out",
            "norm_post_attn",
            "norm_pre_attn",
        ):
            shapes[f"{p}{norm}.weight"] = (w,)
        s = a + "subsample_conv_projection."
        shapes |= {s + "layer0.conv.weight": (c0, 1, 3, 3), s + "layer0.norm.weight": (c0,)}
        shapes |= {s + "layer1.conv.weight": (c1, c0, 3, 3), s + "layer1.norm.weight": (c1,)}
        shapes[s + "input_proj_linear.weight"] = (w, c0 // 4 * c1)
        shapes[a + "output_proj.weight"] = (audio["output_proj_dims"], w)
        shapes[a + "output_proj.bias"] = (audio["output_proj_dims"],)
        shapes["model.embed_audio.embedding_projection.weight"] = (out, audio["output_proj_dims"])
    return shapes


def fill(name: str, shape: tuple[int, ...], seed: int, ple: int = 0) -> np.ndarray:
    """float32 values that depend on the name and the seed only.

    Calm: q/k norms of 0.5 keep the softmax soft (attention runs at scale 1), so rounding is not amplified.
    The final norm is large, so that the soft cap and the greedy margins matter; no scale is 1, so none is
    forgotten.
    """
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    n, u = rng.standard_normal(shape, np.float32), rng.random(shape, np.float32)
    leaf = name.rsplit(".", 1)[-1]
    if leaf.endswith(("_min", "_max")):
        return np.asarray((1 + u) * (-1 if leaf.endswith("_min") else 1), np.float32)
    if leaf == "layer_scalar":
        return 0.6 + 0.5 * u
    if leaf == "per_expert_scale":
        return 0.5 + u
    if leaf in ("std_scale", "per_dim_scale", "position_embedding_table", "bias"):
        return 0.05 + 0.25 * u
    if name.endswith("router.proj.weight"):
        return 2 * n
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return 0.5 + 0.1 * n
    if name.endswith("language_model.norm.weight"):
        return 8 + n
    if "norm" in name.split(".")[-2] or leaf in ("scale", "std_bias"):
        return 1 + 0.2 * n
    if "embed_tokens_per_layer" in name:
        return n * ple**-0.5
    fan_in = int(np.prod(shape[1:])) if len(shape) == 2 or len(shape) == 4 else shape[-1]
    return n * fan_in**-0.5


def tiny_weights(config: dict[str, Any], seed: int = 0) -> dict[str, mx.array]:
    """All tensors under their Hub names, float32 but exactly representable in bfloat16."""
    text = config["text_config"]
    shapes = {f"model.language_model.{k}": v for k, v in text_shapes(text).items()} | tower_shapes(config)
    ple = text["hidden_size_per_layer_input"]
    return {
        k: mx.array(fill(k, shape, seed, ple)).astype(mx.bfloat16).astype(mx.float32) for k, shape in shapes.items()
    }


def make_tiny(
    folder: str | Path,
    family: str = "e2b",
    seed: int = 0,
    dtype: str = "float32",
    *,
    towers: bool = False,
    shards: int = 1,
    tokenizer: bool = True,
    **overrides: Any,
) -> Path:
    """Writes a checkpoint as a Hub repository of this family would look and returns its folder.

    `dtype` is what the shards store (the numbers are the same in float32 and bfloat16); `shards` > 1 writes
    model-0000i-of-0000n.safetensors and the index; `towers` adds one-layer vision (and audio) towers;
    `overrides` go to text_config, e.g. `hidden_size=128, sliding_window=16`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(family, towers=towers, **overrides)
    config["dtype"] = config["text_config"]["dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    weights = {k: v.astype(getattr(mx, dtype)) for k, v in sorted(tiny_weights(config, seed).items())}
    write_shards(folder, weights, shards)
    defaults = {"bos_token_id": 2, "do_sample": True, "eos_token_id": [1, 106, 50], "pad_token_id": 0}
    defaults |= {"temperature": 1.0, "top_k": 64, "top_p": 0.95}
    (folder / "generation_config.json").write_text(json.dumps(defaults, indent=2))
    if tokenizer:
        write_tokenizer(folder, config["text_config"]["vocab_size"])
    return folder


def write_shards(folder: Path, weights: dict[str, mx.array], shards: int = 1, format: str = "pt") -> None:
    """One file, or `shards` of them with the index that names each tensor's file."""
    if shards == 1:
        mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": format})
        return
    names, where = list(weights), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[i::shards]
        mx.save_safetensors(str(folder / file), {k: weights[k] for k in mine}, metadata={"format": format})
        where |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": sum(v.nbytes for v in weights.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


# Gemma 4's turn format, short: system (with <|think|> first when thinking is on), user, model; text only.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- set ns = namespace(rest=messages, system='') -%}
{%- if messages and messages[0].role == 'system' -%}
{%- set ns.system = messages[0].content | trim -%}{%- set ns.rest = messages[1:] -%}
{%- endif -%}
{%- if ns.system or enable_thinking -%}
{{- '<|turn>system\\n' + ('<|think|>\\n' if enable_thinking else '') + ns.system + '<turn|>\\n' -}}
{%- endif -%}
{%- for m in ns.rest -%}
{{- '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + (m.content | trim) + '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|turn>model\\n' -}}{%- endif -%}
"""


_MERGES = "▁ t, h e, ▁t he, ▁ a, i n, e r, o n, ▁ s, r e, a t, u s, us er, m o, d e, mo de, mode l, e l, l o, el lo"


def write_tokenizer(folder: Path, vocab_size: int = VOCAB) -> None:
    """tokenizer.json (byte-fallback BPE built like Gemma's), tokenizer_config.json, chat_template.jinja."""
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import BPE

    merges = [tuple(pair.split()) for pair in _MERGES.split(", ")] + [("\n", "\n")]
    pieces = ["\n", *(f"<0x{b:02X}>" for b in range(256)), "▁", *(chr(c) for c in range(33, 127))]
    pieces += [a + b for a, b in merges]
    taken = {i: token for token, i in SPECIAL.items()}
    rest = iter(pieces)
    # Ids 5..106 hold only control tokens and reserved slots, as in the real vocabulary.
    ids = {i: taken.get(i) or (f"<unused{i}>" if i < 107 else next(rest, f"<unused{i}>")) for i in range(vocab_size)}
    assert next(rest, None) is None, "vocab_size is too small for the pieces"
    vocab = {token: i for i, token in ids.items()}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos>:0 $A:0", pair="<bos>:0 $A:0 <bos>:1 $B:1", special_tokens=[("<bos>", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk", "mask")}
    config |= {"tokenizer_class": "GemmaTokenizer", "padding_side": "left", "model_max_length": 10**30}
    config |= {
        "sot_token": "<|turn>",
        "eot_token": "<turn|>",
        "soc_token": "<|channel>",
        "eoc_token": "<channel|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
