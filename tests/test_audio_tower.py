"""The audio tower against transformers' own, from stored references; batches, groups, names, and loading.

The same comparisons with transformers and mlx-vlm running beside: `test_audio_live.py`.
"""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import audio_cases as cases
import mlx.core as mx
import numpy as np
import pytest
import tiny
from checkpoints import edit_config
from mlx.utils import tree_flatten
from published import SIZES, config, tensors

from mlx_gemma4 import loading
from mlx_gemma4.config import Gemma4Config
from mlx_gemma4.config_audio import AudioConfig
from mlx_gemma4.conversions.convert import convert
from mlx_gemma4.conversions.names import to_mlx_name
from mlx_gemma4.errors import ConfigError, UsageError, WeightsError
from mlx_gemma4.media.audio import ProcessedClip, Sound, clips_of
from mlx_gemma4.models.audio import AudioTower, channels_last, encode_clips
from mlx_gemma4.models.gemma4 import Model
from mlx_gemma4.models.tower_parts import Projector

REFERENCE = np.load(cases.FOLDER / "towers.npz")
# Of the root mean square; float32 itself is 3e-6 from float64 here.
CLOSE = 1e-4

CASES = pytest.mark.parametrize("case", cases.CASES)


def hearing(case: str, **options) -> SimpleNamespace:
    """What `encode_clips` needs of a model."""
    tower, projector = cases.build(case, **options)
    return SimpleNamespace(audio_tower=tower, embed_audio=projector, config=SimpleNamespace(audio={}))


def clips() -> list[ProcessedClip]:
    out = []
    for seed, samples in enumerate(cases.SAMPLES):
        out += clips_of(Sound(cases.sound(samples, seed)))
    return out


def alone(tower: AudioTower, clip: ProcessedClip) -> mx.array:
    features, mask = tower(mx.array(clip.mel)[None], mx.ones((1, len(clip.mel)), mx.bool_))
    assert mask.all().item() and features.shape[1] == clip.tokens
    return features[0]


@CASES
def test_each_clip_alone(case):
    tower, projector = cases.build(case)
    for samples, clip in zip(cases.SAMPLES, clips(), strict=True):
        rows, features = cases.kept(clip.tokens), alone(tower, clip)
        for found, kind in ((features, "features"), (projector(features), "embeddings")):
            assert cases.relative(np.array(found)[rows], REFERENCE[f"{case}/{samples}/{kind}"]) <= CLOSE, samples


@CASES
def test_unequal_clips_in_one_batch(case):
    """Rows of the batch, cut by the mask that comes with them; whatever stands in the padding."""
    tower, _ = cases.build(case)
    found = clips()
    longest = max(len(clip.mel) for clip in found)
    mel = np.full((len(found), longest + 9, 128), 1e3, np.float32)
    mask = np.zeros(mel.shape[:2], bool)
    for row, clip in enumerate(found):
        mel[row, : len(clip.mel)], mask[row, : len(clip.mel)] = clip.mel, True
    features, valid = (np.array(x) for x in tower(mx.array(mel), mx.array(mask)))
    assert features.shape[1] == valid.shape[1] == math.ceil((longest + 9) / 4)
    for row, samples in enumerate(cases.SAMPLES):
        mine = features[row][valid[row]]
        assert len(mine) == found[row].tokens
        assert cases.relative(mine[cases.kept(len(mine))], REFERENCE[f"{case}/{samples}/features"]) <= CLOSE, samples


@CASES
def test_encode_clips(case):
    """In the order given, each with its own tokens, whatever goes through the tower together."""
    model, found = hearing(case), clips()
    for order in (range(len(found)), [3, 0, 6, 1, 5, 4, 2], [4, 4, 4, 2]):
        encoded = encode_clips(model, [found[i] for i in order])
        for i, out in zip(order, encoded, strict=True):
            assert out.shape == (found[i].tokens, cases.TEXT_WIDTH)
            rows = cases.kept(found[i].tokens)
            reference = REFERENCE[f"{case}/{cases.SAMPLES[i]}/embeddings"]
            assert cases.relative(np.array(out)[rows], reference) <= CLOSE, (i, list(order))
    assert encode_clips(model, []) == []


def test_clips_of_like_length_go_together(monkeypatch):
    """No more than a fifth of what the tower computes is padding, and no pass has more than eight clips."""
    model, shapes = hearing("published"), []
    tower = model.audio_tower
    model.audio_tower = lambda mel, mask: (shapes.append((*mel.shape[:2], mask.sum().item())), tower(mel, mask))[1]
    frames = [20, 300, 22, 19, *[290] * 10, 21, 21, 25]
    mels = [np.full((n, 128), -2, np.float32) for n in frames]
    encode_clips(model, [ProcessedClip(m, 0, len(m) / 100) for m in mels])
    assert sorted(shape[0] for shape in shapes) == [3, 6, 8]
    assert sum(shape[2] for shape in shapes) == sum(frames)
    assert all(valid >= 0.8 * rows * length for rows, length, valid in shapes)


def test_bfloat16():
    """As close to float32 as the format allows: eight bits of mantissa through three layers."""
    found = clips()
    out = encode_clips(hearing("published", dtype=mx.bfloat16), found)
    for clip, encoded, exact in zip(found, out, encode_clips(hearing("published"), found), strict=True):
        assert encoded.dtype == mx.bfloat16
        difference = np.array(encoded.astype(mx.float32) - exact)
        assert np.sqrt(np.mean(difference**2)) <= 0.03 * np.sqrt(np.mean(np.array(exact) ** 2)), clip.tokens


def test_float16_overflow_is_bounded():
    """Activations beyond float16 become its largest number, not infinity, and no NaN comes out."""
    model = hearing("published", dtype=mx.float16)
    layer = model.audio_tower.layers[0].feed_forward1
    for name in ("output_max", "output_min"):
        layer.ffw_layer_2[name] = mx.array(math.inf if name.endswith("max") else -math.inf, mx.float16)
    layer.ffw_layer_2.linear.weight = layer.ffw_layer_2.linear.weight * 60_000
    out = encode_clips(model, clips()[:2])
    assert all(mx.isfinite(x).all().item() for x in out)


def test_models_that_cannot_hear():
    deaf = Model(Gemma4Config.from_dict(config("31b")), towers=True)
    with pytest.raises(UsageError, match="does not hear: only E2B and E4B"):
        encode_clips(deaf, clips()[:1])
    asleep = Model(Gemma4Config.from_dict(config("e2b")))
    with pytest.raises(UsageError, match="towers=True"):
        encode_clips(asleep, clips()[:1])


@pytest.mark.parametrize("size", SIZES)
def test_published_names_and_shapes(size):
    """The tower's tensors are exactly the file's, with channels last; 26B and 31B have none."""
    raw = config(size)
    prefixes = ("audio_tower.", "embed_audio.")
    files = {to_mlx_name(name): mx.zeros(shape, mx.bfloat16) for name, shape in tensors(size).items()}
    found = channels_last({name: value for name, value in files.items() if name.startswith(prefixes)})
    model = Model(Gemma4Config.from_dict(raw), towers=True)
    wanted = {n: v.shape for n, v in tree_flatten(model.parameters()) if n.startswith(prefixes)}
    assert {name: value.shape for name, value in found.items()} == wanted
    assert len(wanted) == (752 if size in ("e2b", "e4b") else 0)
    parameters = sum(math.prod(shape) for name, shape in wanted.items() if name.startswith(prefixes[0]))
    assert round(parameters / 1e6, 1) == (304.8 if wanted else 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_with_towers(tmp_path, dtype):
    """From the Hub's layout and from MLX's, the same sound; without towers=True no tensor of them."""
    hub = tiny.make_tiny(tmp_path / "hub", "e2b", dtype=dtype, towers=True)
    model = loading.load_model(hub, towers=True)
    found = encode_clips(model, clips()[:3])
    assert all(mx.abs(x).max().item() > 0 for x in found)
    mlx = tmp_path / "mlx"
    mlx.mkdir()
    (mlx / "config.json").write_text((hub / "config.json").read_text())
    tiny.write_shards(mlx, dict(tree_flatten(model.parameters())), shards=2, format="mlx")
    again = encode_clips(loading.load_model(mlx, towers=True), clips()[:3])
    assert all(mx.array_equal(a, b).item() for a, b in zip(found, again, strict=True))
    names = [name for name, _ in tree_flatten(loading.load_model(hub).parameters())]
    assert names and all(name.startswith("language_model.") for name in names)


def test_a_converted_checkpoint_hears_the_same(tmp_path):
    """Packing to 4 bits leaves the tower and its projector as they are."""
    hub = tiny.make_tiny(tmp_path / "hub", "e4b", towers=True)
    convert(hub, tmp_path / "mlx", 4)
    before, after = (encode_clips(loading.load_model(f, towers=True), clips()[:2]) for f in (hub, tmp_path / "mlx"))
    assert all(mx.array_equal(a, b).item() for a, b in zip(before, after, strict=True))


def test_another_thread_than_the_one_that_loaded(tmp_path):
    """MLX's streams belong to threads: nothing of the tower may be left unevaluated."""
    model = loading.load_model(tiny.make_tiny(tmp_path, "e2b", towers=True), towers=True)
    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(encode_clips, model, clips()[:3]).result()
    assert [len(x) for x in found] == [clip.tokens for clip in clips()[:3]]
    assert all(mx.array_equal(a, b).item() for a, b in zip(found, encode_clips(model, clips()[:3]), strict=True))


def test_channels_last_leaves_what_it_does_not_know():
    weights = {"language_model.model.layers.0.conv.weight": mx.zeros((2, 3, 4, 5)), "audio_tower.x": mx.zeros((3,))}
    assert {n: v.shape for n, v in channels_last(weights).items()} == {n: v.shape for n, v in weights.items()}


def test_unbounded_ranges_load_with_check(tmp_path):
    """A range of +-infinity clips nothing; it is no damaged weight."""
    folder = tiny.make_tiny(tmp_path, "e2b", towers=True)
    edit_config(folder, vision_config=None)
    weights = dict(mx.load(str(folder / "model.safetensors")))
    name = "model.audio_tower.layers.0.self_attn.q_proj.input_max"
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights | {name: mx.array(math.inf)})
    loading.load_model(folder, towers=True, check=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights | {name: mx.array(math.nan)})
    with pytest.raises(WeightsError, match=r"q_proj\.input_max holds NaN"):
        loading.load_model(folder, towers=True, check=True)


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("attention_context_right", 2, "future"),
        ("attention_context_left", 20, "attention_chunk_size"),
        ("hidden_act", "gelu", "silu"),
        ("model_type", "whisper", "gemma4_audio"),
        ("num_attention_heads", 7, "multiple"),
        ("subsampling_conv_channels", [64, 32], "128"),
    ],
)
def test_configurations_the_graph_does_not_compute(field, value, match):
    raw = config("e2b")["audio_config"]
    with pytest.raises(ConfigError, match=match) as error:
        AudioConfig.from_dict(raw | {field: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", ["e2b", "e4b"])
def test_published_configurations(size):
    raw = config(size)["audio_config"]
    parsed = AudioConfig.from_dict(raw)
    assert parsed == AudioConfig() == AudioConfig.from_dict(json.loads(json.dumps(raw)))
    assert parsed.window == 12 and parsed.head_dim == 128
    tower = AudioTower(parsed)
    assert len(tower.layers) == 12 and Projector(
        parsed.output_proj_dims, 1536, parsed.rms_norm_eps
    ).embedding_projection.weight.shape == (1536, 1536)
