"""Whole models with pictures, sound and video against transformers' own, from stored references: all four families.

Measured on a CPU (x86, MLX 0.32.4, transformers 5.23.0), largest |logit difference|, logits of size about 20: 1.9e-4
over the cases here; the reference itself is up to 1.6e-4 off float64. With all logits and the costly cases, which are
compared live, 7.6e-4 (E4B, a picture of 1,064 tokens).

The cases: `media_cases.py`. The same with transformers beside it: `test_media_parity_live.py`.
"""

import functools
import itertools

import media_cases as cases
import mlx.core as mx
import numpy as np
import pytest
import recipe
import tiny
from media_cases import CASES, FAMILIES, HEARING, LOOKING_AHEAD
from parity import divergence, worst

from mlx_gemma4.config import Gemma4Config
from mlx_gemma4.errors import Gemma4Error
from mlx_gemma4.generation import generate_step
from mlx_gemma4.media.prompt import Prompt
from mlx_gemma4.models.gemma4 import Model
from mlx_gemma4.models.merging import Media, Soft, batched, encode
from mlx_gemma4.tokenizer import Tokenizer

LIMIT = 1e-3
# One call against several, both ours.
SAME = 1e-4

EVERY = [(family, name) for family in FAMILIES for name in cases.names(family)]
# Prompts are prefilled in so many tokens: one in steps that end within its picture.
GREEDY = [(family, name, 50 if name == "across-window" else 400) for family, name in EVERY if CASES[name].greedy]
# Cases cut into chunks of so many positions. Pictures in them are longer than the window, and cuts fall inside.
CHUNKS = {"across-window": (7, 64), "three-sizes": (100,), "image-video": (40, 250), "two-clips": (7,), "all": (64,)}
CUT = [(family, name, chunk) for family, name in EVERY for chunk in CHUNKS.get(name, ())]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder)
    return Tokenizer.from_folder(folder)


@functools.cache
def references(family: str) -> dict[str, np.ndarray]:
    with np.load(cases.FOLDER / f"{family}.npz") as file:
        return dict(file)


def of(family: str, name: str, what: str) -> np.ndarray:
    return references(family)[f"{name}/{what}"]


def against(family: str, name: str, logits: np.ndarray) -> float:
    """Largest distance of logits [L, V] from the reference, where it has some."""
    return worst(logits[of(family, name, "positions")][:, cases.VOCABULARY], of(family, name, "logits"))


_encoded: dict[tuple[str, str], Media] = {}
_whole: dict[tuple[str, str], np.ndarray] = {}


def media(family: str, name: str, prompt: Prompt) -> Media:
    """The case's features, computed once."""
    if (family, name) not in _encoded:
        _encoded[family, name] = encode(cases.build(family, CASES[name].window), prompt.runs)
    return _encoded[family, name]


def whole(family: str, name: str, prompt: Prompt) -> np.ndarray:
    """Logits [L, V] of one call without a cache, computed once."""
    if (family, name) not in _whole:
        model = cases.build(family, CASES[name].window)
        soft = media(family, name, prompt).soft(0, len(prompt))
        _whole[family, name] = np.array(model(mx.array([prompt.ids]), media=soft)[0])
    return _whole[family, name]


def in_chunks(model, ids: list[int], soft: Media, chunk: int, cache=None) -> np.ndarray:
    """Logits [L, V], chunks as the prefill cuts them."""
    cache, parts, begin = model.make_cache() if cache is None else cache, [], 0
    while begin < len(ids):
        end = soft.step_end(begin, min(begin + chunk, len(ids)))
        parts.append(model(mx.array([ids[begin:end]]), cache=cache, media=soft.soft(begin, end))[0])
        mx.eval(parts[-1], [c.state for c in cache])
        begin = end
    return np.array(mx.concatenate(parts))


# ------------------------------------------------------------------ against transformers


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_prompt_ids_are_the_processors(family, name, tokenizer):
    assert cases.prompt(CASES[name], tokenizer).ids == of(family, name, "ids").tolist()


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_logits(family, name, tokenizer):
    prompt = cases.prompt(CASES[name], tokenizer)
    if len(prompt) > 1000:  # without a cache all scores are computed; see `test_a_long_prompt_in_chunks`
        model = cases.build(family, CASES[name].window)
        found = in_chunks(model, prompt.ids, media(family, name, prompt), 300)
    else:
        found = whole(family, name, prompt)
    error = against(family, name, found)
    print(f"\n{family} {name}: {error:.1e}, the reference {of(family, name, 'noise'):.1e} off float64", end="")
    assert error <= LIMIT


@pytest.mark.parametrize(("family", "name", "step"), GREEDY)
def test_greedy(family, name, step, tokenizer):
    """What transformers' generate() says next, both with caches, ours through the loop that `generate` runs on."""
    model, prompt = cases.build(family, CASES[name].window), cases.prompt(CASES[name], tokenizer)
    steps = generate_step(
        mx.array(prompt.ids), model, media=media(family, name, prompt), prefill_step_size=step, max_tokens=cases.GREEDY
    )
    assert [token for token, _ in steps] == of(family, name, "greedy").tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", cases.BATCHES)
def test_a_batch_of_unequal_prompts(family, name, tokenizer):
    if name not in cases.batches(family):
        return
    prompts = [cases.prompt(row, tokenizer) for row in cases.BATCHES[name]]
    longest, model = max(map(len, prompts)), cases.build(family, 8)
    padding = [longest - len(p) for p in prompts]
    ids = np.array([[0] * n + p.ids for n, p in zip(padding, prompts, strict=True)])
    assert np.array_equal(ids, of(family, name, "ids")) and sorted(padding)[0] == 0 < sorted(padding)[1]
    rows = [encode(model, p.runs) if p.runs else None for p in prompts]
    soft = batched(rows, [(0, len(p)) for p in prompts])
    for cache in (None, model.make_cache(left_padding=padding)):
        found = np.array(model(mx.array(ids), cache=cache, left_padding=None if cache else padding, media=soft))
        for b, at in enumerate(of(family, name, "positions")):
            assert worst(found[b, at][:, cases.VOCABULARY], of(family, name, "logits")[b]) <= LIMIT, b
    # And one more token of each, from the caches.
    following = np.array([[40], [41], [42]])
    after = np.array(model(mx.array(following), cache=cache))[:, 0]
    for b, p in enumerate(prompts):
        alone = rows[b].soft(0, len(p)) if rows[b] is not None else None
        expected = model(mx.array([p.ids + following[b].tolist()]), media=longer(alone))
        assert worst(after[b], np.array(expected)[0, -1]) <= LIMIT, b


def longer(soft: Soft | None) -> Soft | None:
    """The same step with one token more."""
    if soft is None or soft.blocks is None:
        return soft
    return Soft(soft.positions, soft.features, mx.pad(soft.blocks, [(0, 0), (0, 1)], constant_values=-1))


# ------------------------------------------------------------------ chunks and caches


@pytest.mark.parametrize(("family", "name", "chunk"), CUT)
def test_chunks_are_one_call(family, name, chunk, tokenizer):
    model, prompt = cases.build(family, CASES[name].window), cases.prompt(CASES[name], tokenizer)
    soft = media(family, name, prompt)
    bounds = set(range(0, len(prompt), chunk))
    assert any(run.start < b < run.stop for run in prompt.runs for b in bounds), "no cut inside a picture or sound"
    found = in_chunks(model, prompt.ids, soft, chunk)
    assert worst(found, whole(family, name, prompt)) <= SAME
    assert against(family, name, found) <= LIMIT


@pytest.mark.parametrize("family", ["e2b", "31b"])
def test_a_boundary_anywhere_in_a_picture(family, tokenizer):
    """A picture of some 70 tokens after 50 of text, a window of 100: two chunks, cut at every tenth place or so."""
    prompt, model = cases.prompt(CASES["across-window"], tokenizer), cases.build(family, 100)
    soft, (run,) = media(family, "across-window", prompt), prompt.runs
    expected = whole(family, "across-window", prompt)
    for cut in [run.start - 1, run.start, run.start + 1, *range(run.start + 5, run.stop, 14), run.stop - 1, run.stop]:
        found = in_chunks(model, prompt.ids, soft, cut)
        assert worst(found, expected) <= SAME, cut


@pytest.mark.parametrize("family", HEARING)
def test_token_by_token(family, tokenizer):
    """Where pictures are read like text, a chunk may be a single position."""
    prompt, model = cases.prompt(CASES["image-audio"], tokenizer), cases.build(family, 8)
    found = in_chunks(model, prompt.ids, media(family, "image-audio", prompt), 1)
    assert worst(found, whole(family, "image-audio", prompt)) <= SAME


@pytest.mark.parametrize("family", LOOKING_AHEAD)
def test_a_chunk_never_ends_inside_a_picture_that_is_seen_at_once(family, tokenizer):
    prompt = cases.prompt(CASES["image-video"], tokenizer)
    soft = media(family, "image-video", prompt)
    for begin, end in itertools.combinations(range(0, len(prompt) + 1, 3), 2):
        stop = soft.step_end(begin, end)
        assert begin < stop and not any(run.start < stop < run.stop for run in prompt.runs)
    assert any(soft.step_end(0, end) != end for end in range(1, len(prompt)))


@pytest.mark.parametrize("family", FAMILIES)
def test_from_a_cached_beginning(family, tokenizer):
    """A conversation whose first picture is in the cache: features and positions count from there on."""
    prompt, model = cases.prompt(CASES["image-video"], tokenizer), cases.build(family, 32)
    first, cut = media(family, "image-video", prompt), prompt.runs[1].start - 1
    cache = model.make_cache()
    model(mx.array([prompt.ids[:cut]]), cache=cache, media=first.soft(0, cut))
    rest = encode(model, prompt.runs, since=cut).after(cut)
    found = in_chunks(model, prompt.ids[cut:], rest, 64, cache)
    assert worst(found, whole(family, "image-video", prompt)[cut:]) <= SAME


@pytest.mark.parametrize("family", FAMILIES)
def test_caches_of_16_bits_change_nothing(family, tokenizer):
    prompt, model = cases.prompt(CASES["across-window"], tokenizer), cases.build(family, 100)
    soft = media(family, "across-window", prompt)
    found = in_chunks(model, prompt.ids, soft, 64, model.make_cache(kv_bits=16))
    assert worst(found, whole(family, "across-window", prompt)) <= SAME


@pytest.mark.parametrize("family", FAMILIES)
def test_compressed_caches_stay_near(family, tokenizer):
    """Mean KL to the exact logits, in nats."""
    prompt, model = cases.prompt(CASES["image-video"], tokenizer), cases.build(family, 32)
    soft = media(family, "image-video", prompt)
    found = in_chunks(model, prompt.ids, soft, 64, model.make_cache(kv_bits=3.5))
    distance = divergence(whole(family, "image-video", prompt), found).mean()
    print(f"\n{family}: KL {distance:.1e}", end="")
    assert 0 < distance <= 0.1


@pytest.mark.parametrize("family", ["e2b", "31b"])
def test_compressed_rings_stay_near(family, tokenizer):
    """The codec takes heads of 32 or more, and 128 positions of a ring stay exact: another model, another window."""
    raw = cases.config(family, 160)
    raw["text_config"]["head_dim"] = 32
    tower = cases.build(family, 32)
    model = Model(Gemma4Config.from_dict(raw))
    weights = recipe.mlx_weights(raw, cases.SEED, cases.QK_NORM)
    model.load_weights(list(model.sanitize(weights).items()), strict=True)
    prompt = cases.prompt(CASES["image-video"], tokenizer)
    soft = encode(tower, prompt.runs)
    caches = (None, model.make_cache(kv_bits=4, kv_bits_sliding=4))
    exact, found = (in_chunks(model, prompt.ids, soft, 64, cache) for cache in caches)
    distance = divergence(exact, found).mean()
    print(f"\n{family}: KL {distance:.1e}", end="")
    assert 0 < distance <= 0.1


# ------------------------------------------------------------------ what the references notice


def changed(family: str, name: str, prompt: Prompt, change) -> float:
    """The error of one call when `change` has had its way with what it is told about media."""
    soft = media(family, name, prompt).soft(0, len(prompt))
    assert soft is not None
    model = cases.build(family, CASES[name].window)
    return against(family, name, np.array(model(mx.array([prompt.ids]), media=change(soft, model))[0]))


@pytest.mark.parametrize("family", LOOKING_AHEAD)
@pytest.mark.parametrize("name", ["image", "across-window", "within-window", "adjacent", "video-scaled"])
def test_who_sees_whom_is_noticed(family, name, tokenizer):
    prompt = cases.prompt(CASES[name], tokenizer)
    causal = changed(family, name, prompt, lambda soft, _: Soft(soft.positions, soft.features))
    assert causal > 30 * LIMIT


@pytest.mark.parametrize("family", LOOKING_AHEAD)
def test_pictures_side_by_side_are_apart(family, tokenizer):
    prompt = cases.prompt(CASES["adjacent"], tokenizer)
    first, second = prompt.runs
    blocks = np.full((1, len(prompt)), -1, np.int32)
    blocks[0, first.start : second.stop] = 0  # the marks between them, too
    joined = changed(family, "adjacent", prompt, lambda soft, _: Soft(soft.positions, soft.features, mx.array(blocks)))
    assert joined > 30 * LIMIT


@pytest.mark.parametrize("family", HEARING)
def test_nobody_looks_ahead_in_small_models(family, tokenizer):
    prompt = cases.prompt(CASES["across-window"], tokenizer)
    soft = media(family, "across-window", prompt).soft(0, len(prompt))
    assert soft.blocks is None
    (run,) = prompt.runs
    blocks = np.full((1, len(prompt)), -1, np.int32)
    blocks[0, run.start : run.stop] = 0
    ahead = changed(
        family, "across-window", prompt, lambda soft, _: Soft(soft.positions, soft.features, mx.array(blocks))
    )
    assert ahead > 30 * LIMIT


@pytest.mark.parametrize(
    ("family", "name"), [(f, "adjacent") for f in FAMILIES] + [(f, "image-audio") for f in HEARING]
)
def test_features_and_their_order_are_noticed(family, name, tokenizer):
    prompt = cases.prompt(CASES[name], tokenizer)

    def backwards(soft, _):
        return Soft(soft.positions[::-1], soft.features, soft.blocks)

    def scaled(soft, model):
        return Soft(soft.positions, soft.features * model.text_config.hidden_size**0.5, soft.blocks)

    for change in (backwards, scaled):
        assert changed(family, name, prompt, change) > 30 * LIMIT, change


@pytest.mark.parametrize("family", HEARING)
def test_neutral_ids_are_noticed(family, tokenizer, monkeypatch):
    """The per-layer embeddings of the placeholders themselves would do otherwise."""
    prompt = cases.prompt(CASES["image-audio"], tokenizer)
    monkeypatch.setattr(Soft, "replace_ids", lambda self, tokens, neutral: tokens)
    assert changed(family, "image-audio", prompt, lambda soft, _: soft) > 30 * LIMIT


def test_a_count_that_does_not_agree_is_an_error(tokenizer):
    prompt = cases.prompt(CASES["image"], tokenizer)
    (run,) = prompt.runs
    model = cases.build("31b", 8)

    class Store(dict):
        def put(self, key, value):
            pass

    short = Store({run.key: mx.zeros((run.part.tokens - 1, 64))})
    with pytest.raises(Gemma4Error, match=r"embeddings for \d+ places"):
        encode(model, prompt.runs, short)  # type: ignore[arg-type]
