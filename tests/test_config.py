"""config.json: what the four published files mean, both styles they come in, and what is refused."""

import copy
import json

import pytest
from published import SIZES, config
from tiny import tiny_config

from mlx_gemma4.config import GLOBAL, SLIDING, Gemma4Config, RopeConfig, TextConfig
from mlx_gemma4.errors import ConfigError


def text(size: str) -> TextConfig:
    return Gemma4Config.from_dict(config(size)).text


def saved_style(raw: dict) -> dict:
    """As transformers 5.23 writes it: global layers' own shapes layer by layer, indices with leading zeros."""
    raw = copy.deepcopy(raw)
    t = raw["text_config"]
    own = {"head_dim": t.pop("global_head_dim")}
    heads = t.pop("num_global_key_value_heads")
    if t["attention_k_eq_v"] and heads is not None:
        own["num_key_value_heads"] = heads
    digits = len(str(t["num_hidden_layers"] - 1))
    layers = [i for i, kind in enumerate(t["layer_types"]) if kind == GLOBAL]
    t["per_layer_config"] = {f"{i:0{digits}}": dict(own) for i in layers}
    if raw.get("vision_config"):
        raw["vision_config"]["rope_parameters"] = {"rope_theta": 100.0, "rope_type": "axial"}
    return raw


# layers, hidden, MLP, query heads, KV heads sliding and global, window, context, sharing, PLE, experts, width, chosen
TABLE = {
    "e2b": (35, 1536, 6144, 8, 1, 1, 512, 131072, 20, 256, 0, 0, 0),
    "e4b": (42, 2560, 10240, 8, 2, 2, 512, 131072, 18, 256, 0, 0, 0),
    "26b-a4b": (30, 2816, 2112, 16, 8, 2, 1024, 262144, 0, 0, 128, 704, 8),
    "31b": (60, 5376, 21504, 32, 16, 4, 1024, 262144, 0, 0, 0, 0, 0),
}


@pytest.mark.parametrize("size", SIZES)
def test_published(size):
    t = text(size)
    assert TABLE[size] == (
        t.num_hidden_layers,
        t.hidden_size,
        t.intermediate_size,
        t.num_attention_heads,
        t.num_key_value_heads,
        t.num_global_key_value_heads,
        t.sliding_window,
        t.max_position_embeddings,
        t.num_kv_shared_layers,
        t.hidden_size_per_layer_input,
        t.num_experts,
        t.moe_intermediate_size,
        t.top_k_experts,
    )
    assert (t.head_dim, t.global_head_dim, t.vocab_size) == (256, 512, 262144)
    assert t.rope_sliding == RopeConfig(1e4, "default")
    assert t.rope_global == RopeConfig(1e6, "proportional", 0.25)
    assert (t.final_logit_softcapping, t.rms_norm_eps, t.tie_word_embeddings) == (30.0, 1e-6, True)
    whole = Gemma4Config.from_dict(config(size))
    assert whole.eos_token_ids == (1, 106)
    assert whole.dtype == "bfloat16" and whole.quantization is None and whole.model_type == "gemma4"
    assert whole.vision is not None and (whole.audio is not None) == size.startswith("e")


@pytest.mark.parametrize("size", SIZES)
def test_layer_tables(size):
    t, period = text(size), 5 if size == "e2b" else 6
    for i in range(t.num_hidden_layers):
        sliding = (i + 1) % period != 0
        assert t.is_sliding(i) == sliding
        assert t.width_of(i) == (256 if sliding else 512)
        assert t.kv_heads_of(i) == (t.num_key_value_heads if sliding else t.num_global_key_value_heads)
        assert t.k_is_v(i) == (not sliding and size in ("26b-a4b", "31b"))
        wide = size == "e2b" and i >= 15
        assert t.mlp_width_of(i) == t.intermediate_size * (2 if wide else 1)
    producers = {"e2b": (15, 13, 14), "e4b": (24, 22, 23)}
    if size in producers:
        first, sliding, full = producers[size]
        assert t.first_shared_layer == first
        assert [t.producer_of(i) for i in range(first)] == list(range(first))
        shared = range(first, t.num_hidden_layers)
        assert all(t.producer_of(i) == (sliding if t.is_sliding(i) else full) for i in shared)
    else:
        assert all(t.producer_of(i) == i for i in range(t.num_hidden_layers))


@pytest.mark.parametrize("size", SIZES)
def test_both_styles_mean_the_same(size):
    a, b = Gemma4Config.from_dict(config(size)), Gemma4Config.from_dict(saved_style(config(size)))
    assert a.text == b.text and a.eos_token_ids == b.eos_token_ids


def test_styles_with_other_shapes():
    for family, fields in [
        ("31b", {"num_global_key_value_heads": None}),
        ("e4b", {"global_head_dim": 16}),
        ("e2b", {}),
    ]:
        raw = tiny_config(family, **fields)
        assert Gemma4Config.from_dict(raw).text == Gemma4Config.from_dict(saved_style(raw)).text
    # Global layers like sliding ones: nothing is overridden, and the empty table says so.
    raw = saved_style(tiny_config("31b", num_global_key_value_heads=None))
    raw["text_config"]["per_layer_config"] = {}
    found = Gemma4Config.from_dict(raw).text
    assert (found.global_head_dim, found.num_global_key_value_heads) == (16, 2)


def test_global_key_value_heads_count_with_k_eq_v_only():
    both = {"num_key_value_heads": 2, "num_global_key_value_heads": 1}
    assert Gemma4Config.from_dict(tiny_config("e4b", **both)).text.num_global_key_value_heads == 2
    assert Gemma4Config.from_dict(tiny_config("31b", **both)).text.num_global_key_value_heads == 1


def test_text_only_file():
    raw = tiny_config("e2b")
    alone = Gemma4Config.from_dict(raw["text_config"])
    assert alone.text == Gemma4Config.from_dict(raw).text
    assert alone.model_type == "gemma4_text" and alone.eos_token_ids == (1,) and alone.vision is None


def test_moe_fields_count_with_the_block_only():
    dense = Gemma4Config.from_dict(tiny_config("31b", num_experts=8, top_k_experts=2, moe_intermediate_size=64))
    assert (dense.text.num_experts, dense.text.top_k_experts, dense.text.moe_intermediate_size) == (0, 0, 0)
    older = tiny_config("26b-a4b", moe_intermediate_size=None, expert_intermediate_size=64)
    assert Gemma4Config.from_dict(older).text.moe_intermediate_size == 64


def test_rope_parameters():
    raw = tiny_config("e2b")
    raw["text_config"]["rope_parameters"][GLOBAL] |= {"partial_rotary_factor": 0.5, "rope_theta": 5e5, "factor": 2.0}
    raw["text_config"]["rope_parameters"][SLIDING]["partial_rotary_factor"] = 0.5  # means nothing for "default"
    found = Gemma4Config.from_dict(raw).text
    assert found.rope_global == RopeConfig(5e5, "proportional", 0.5, 2.0)
    assert found.rope_sliding == RopeConfig(1e4, "default")
    del raw["text_config"]["rope_parameters"]
    assert Gemma4Config.from_dict(raw).text.rope_global == RopeConfig(1e6, "proportional", 0.25)


def test_quantization_of_mlx_shards():
    raw = tiny_config("31b") | {"quantization": {"group_size": 64, "bits": 4}}
    assert Gemma4Config.from_dict(raw).quantization == {"group_size": 64, "bits": 4}


def changed(family: str = "e2b", outer: dict | None = None, drop: str = "", **fields) -> dict:
    raw = tiny_config(family, **fields) | (outer or {})
    raw["text_config"].pop(drop, None)
    return raw


LAYERS = [SLIDING, SLIDING, GLOBAL]
REFUSED = {
    "another model": ({"model_type": "llama"}, "model_type 'llama'"),
    "no model type": ({}, "model_type None"),
    "no text": ({"model_type": "gemma4"}, "text_config"),
    "unknown attention": (
        changed(layer_types=["linear_attention", GLOBAL], num_kv_shared_layers=0),
        "linear_attention",
    ),
    "missing field": (changed(drop="hidden_size"), "hidden_size"),
    "missing global width": (changed(drop="global_head_dim"), "global_head_dim"),
    "bias": (changed(attention_bias=True), "attention_bias"),
    "activation": (changed(hidden_activation="silu"), "silu"),
    "rope": (changed(rope_parameters={SLIDING: {"rope_type": "yarn"}}), "yarn"),
    "heads": (changed(num_key_value_heads=3), "num_key_value_heads"),
    "experts": (changed("26b-a4b", num_experts=None), "num_experts"),
    "more chosen than there are": (changed("26b-a4b", top_k_experts=9), "top_k_experts"),
    "all layers share": (changed("e4b", num_kv_shared_layers=6), "num_kv_shared_layers"),
    "no producer": (changed("e4b", layer_types=[SLIDING] * 4 + [GLOBAL] * 2), "full_attention"),
    "last layer": (changed("31b", layer_types=[*LAYERS, SLIDING]), "last layer"),
    "bidirectional": (changed(use_bidirectional_attention="all"), "use_bidirectional_attention"),
    "foreign quantization": (changed(outer={"quantization_config": {"quant_method": "gptq"}}), "gptq"),
    "sliding override": (changed("31b", per_layer_config={"0": {"head_dim": 32}}), "layer 0"),
    "uneven overrides": (changed("31b", per_layer_config={"2": {"head_dim": 32}}), "different shapes"),
    "unknown override": (changed("31b", per_layer_config={"2": {"sliding_window": 3}}), "sliding_window"),
    "override of no layer": (changed("31b", per_layer_config={"full_attention": {"head_dim": 32}}), "layer numbers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    raw, says = REFUSED[name]
    with pytest.raises(ConfigError) as error:
        Gemma4Config.from_dict(raw)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_layer_count_must_agree():
    raw = tiny_config("31b")
    raw["text_config"]["num_hidden_layers"] = 7
    with pytest.raises(ConfigError, match="num_hidden_layers says 7"):
        Gemma4Config.from_dict(raw)


@pytest.mark.parametrize(
    ("content", "says"), [(None, "no config.json"), (b"{", "not valid JSON"), (b"[]", "no JSON object")]
)
def test_bad_files(tmp_path, content, says):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        Gemma4Config.from_folder(tmp_path)


def test_from_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config("e2b")))
    assert Gemma4Config.from_folder(tmp_path) == Gemma4Config.from_dict(config("e2b"))
