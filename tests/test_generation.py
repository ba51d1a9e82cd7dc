"""Prefill, decode and their ends: same tokens as without a cache, and a cache that is whole whatever stops it."""

import itertools

import mlx.core as mx
import pytest
from tiny import make_tiny

from mlx_gemma4 import generate, generate_step, load, make_sampler, stream_generate
from mlx_gemma4.errors import ContextError, Gemma4Error, UsageError
from mlx_gemma4.generation import cache_offset, prefill, token_budget
from mlx_gemma4.sampling import make_logits_processors

PROMPT = [2, *range(120, 141)]  # 22 ids, beyond the tiny window of 8


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load(make_tiny(tmp_path_factory.mktemp("tiny"), "e2b"), dtype="float32")


@pytest.fixture(scope="module")
def model(loaded):
    return loaded[0]


@pytest.fixture
def tokenizer(loaded):
    """The tiny tokenizer without stop ids, so that random models speak as long as asked."""
    tokenizer = loaded[1]
    tokenizer.eos_token_ids = set()
    return tokenizer


@pytest.fixture(scope="module")
def truth(model):
    """Greedy continuation of PROMPT, every token from a call over everything before it, without a cache."""
    ids = list(PROMPT)
    for _ in range(40):
        ids.append(mx.argmax(model(mx.array([ids]))[0, -1]).item())
    return ids[len(PROMPT) :]


def steps(model, prompt=PROMPT, **kwargs):
    return [token for token, _ in generate_step(mx.array(prompt), model, **kwargs)]


# The same tokens


@pytest.mark.parametrize("chunk", [1, 3, 8, 21, 22, 2048])
def test_chunks_do_not_change_tokens(model, truth, chunk):
    assert steps(model, max_tokens=12, prefill_step_size=chunk) == truth[:12]


def test_long_greedy_continuation(model, truth):
    assert steps(model, max_tokens=40) == truth


def test_logprobs_are_normalised_and_of_the_token(model):
    for token, logprobs in generate_step(mx.array(PROMPT), model, max_tokens=4):
        assert logprobs.shape == (512,)
        assert abs(mx.exp(logprobs).sum().item() - 1) < 1e-4
        assert mx.argmax(logprobs).item() == token


def test_a_prompt_of_one(model):
    want = mx.argmax(model(mx.array([[7]]))[0, -1]).item()
    assert steps(model, [7], max_tokens=1) == [want]


def test_a_cache_continues(model, truth):
    cache = model.make_cache()
    assert prefill(model, mx.array(PROMPT[:15]), cache, step=4) == 15
    assert cache_offset(cache) == 15
    assert steps(model, PROMPT[15:], max_tokens=10, prompt_cache=cache) == truth[:10]


# What is computed


def test_prefill_never_computes_logits(tmp_path):
    """512 positions of 16,384 logits are 32 MiB in float32; the whole prefill stays below half of that."""
    folder = make_tiny(tmp_path, "31b", tokenizer=False, vocab_size=16_384)
    from mlx_gemma4.loading import load_model

    model, ids = load_model(folder, dtype="float32"), mx.arange(512)
    logits = ids.size * 16_384 * 4

    def peak(work):
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        work()
        return mx.get_peak_memory() - before

    assert peak(lambda: prefill(model, ids, model.make_cache())) < logits / 2
    assert peak(lambda: mx.eval(model(ids[None]))) > logits  # so the figure above means something


def test_the_next_step_is_under_way_when_a_token_is_handed_out(model):
    cache = model.make_cache()
    tokens = generate_step(mx.array(PROMPT), model, max_tokens=5, prompt_cache=cache)
    for n, _ in enumerate(tokens, 1):
        assert cache_offset(cache) == len(PROMPT) + min(n, 4)  # nothing follows the fifth: it is not fed


def test_progress(model):
    calls = []
    steps(model, max_tokens=2, prefill_step_size=10, prompt_progress_callback=lambda *c: calls.append(c))
    assert calls == [(0, 22), (10, 22), (20, 22), (21, 22), (22, 22)]


# Ends


@pytest.mark.parametrize("stop_at", [0, 10, 20, 21, 22])
def test_cancelling_the_prompt(model, tokenizer, stop_at):
    """A callback that says False ends it after that chunk; the cache holds what was done and can go on."""
    cache = model.make_cache()
    options = {"prefill_step_size": 10, "prompt_cache": cache}
    [last] = stream_generate(
        model, tokenizer, PROMPT, prompt_progress_callback=lambda done, _: done < stop_at, **options
    )
    assert (last.finish_reason, last.text, last.token, last.generation_tokens) == ("cancelled", "", -1, 0)
    assert cache_offset(cache) == stop_at


@pytest.mark.parametrize("count", [1, 2, 7])
def test_closing_leaves_a_whole_cache(model, truth, count):
    """The cache then holds the prompt and all tokens handed out, and continues as if nothing had happened."""
    cache = model.make_cache()
    tokens = generate_step(mx.array(PROMPT), model, max_tokens=-1, prompt_cache=cache)
    assert [t for t, _ in itertools.islice(tokens, count)] == truth[:count]
    tokens.close()
    assert cache_offset(cache) == len(PROMPT) + count
    assert steps(model, truth[count : count + 1], max_tokens=5, prompt_cache=cache) == truth[count + 1 : count + 6]


def test_max_tokens(model, tokenizer, truth):
    cache = model.make_cache()
    responses = list(stream_generate(model, tokenizer, PROMPT, max_tokens=6, prompt_cache=cache))
    assert [r.token for r in responses] == truth[:6]
    assert [r.generation_tokens for r in responses] == [1, 2, 3, 4, 5, 6]
    assert [r.finish_reason for r in responses] == [None] * 5 + ["length"]
    assert cache_offset(cache) == len(PROMPT) + 5


def test_one_token(model, tokenizer, truth):
    [only] = stream_generate(model, tokenizer, PROMPT, max_tokens=1)
    assert (only.token, only.finish_reason, only.generation_tps) == (truth[0], "length", 0.0)


def test_stop_tokens_end_and_leave_no_text(model, tokenizer, truth):
    stop = truth[9]
    first = truth.index(stop)
    tokenizer.eos_token_ids = {stop}
    responses = list(stream_generate(model, tokenizer, PROMPT, max_tokens=30))
    assert responses[-1].finish_reason == "stop" and responses[-1].token == stop
    assert responses[-1].generation_tokens == first + 1
    assert "".join(r.text for r in responses) == tokenizer.decode(truth[:first])


def test_text_is_the_decoded_tokens(model, tokenizer, truth):
    assert generate(model, tokenizer, PROMPT, max_tokens=40) == tokenizer.decode(truth)


def test_text_prompts_get_one_bos(model, tokenizer):
    counts = {next(stream_generate(model, tokenizer, p)).prompt_tokens for p in ("hello", "<bos>hello")}
    assert counts == {1 + len(tokenizer.encode("hello", add_special_tokens=False))}


def test_verbose_prints(model, tokenizer, capsys):
    text = generate(model, tokenizer, PROMPT, verbose=True, max_tokens=3)
    printed = capsys.readouterr().out
    assert printed.startswith(text) and "prompt 22 tokens" in printed and "answer 3 tokens" in printed


def test_response_figures(model, tokenizer):
    mx.reset_peak_memory()
    last = list(stream_generate(model, tokenizer, PROMPT, max_tokens=5))[-1]
    assert last.prompt_tokens == 22 and last.prompt_tps > 0 and last.generation_tps > 0
    assert last.peak_memory == pytest.approx(mx.get_peak_memory() / 1e9)
    assert last.from_draft is False and last.logprobs.shape == (512,)


# The context


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    folder = make_tiny(tmp_path_factory.mktemp("short"), "e4b", max_position_embeddings=32)
    model, tokenizer = load(folder, dtype="float32")
    tokenizer.eos_token_ids = set()
    return model, tokenizer


@pytest.mark.parametrize("max_tokens", [-1, 500])
def test_generation_ends_with_the_context(short, max_tokens):
    model, tokenizer = short
    cache = model.make_cache()
    responses = list(stream_generate(model, tokenizer, PROMPT, max_tokens=max_tokens, prompt_cache=cache))
    assert len(responses) == 32 - 22 + 1 and responses[-1].finish_reason == "length"
    assert cache_offset(cache) == 32


def test_a_prompt_that_fills_the_context_gets_one_token(short):
    assert len(steps(short[0], list(range(108, 140)), max_tokens=9)) == 1


@pytest.mark.parametrize("held", [0, 20])
def test_longer_prompts_are_refused_with_both_numbers(short, held):
    model, tokenizer = short
    cache = model.make_cache()
    prefill(model, mx.array(PROMPT[:held], mx.int32), cache)
    prompt = [7] * (40 - held)
    for run in (lambda: steps(model, prompt, prompt_cache=cache), lambda: token_budget(model, cache, len(prompt))):
        with pytest.raises(ContextError, match=r"40 tokens.*32"):
            run()
    with pytest.raises(ContextError):
        list(stream_generate(model, tokenizer, prompt, prompt_cache=cache))
    assert cache_offset(cache) == held


# Sampling and processors


def test_sampled_tokens_follow_the_seed(model, tokenizer):
    def run(sampler_seed, **more):
        return [
            r.token
            for r in stream_generate(model, tokenizer, PROMPT, 12, sampler=make_sampler(1.5, seed=sampler_seed), **more)
        ]

    assert run(1) == run(1) == run(9, seed=1)
    assert run(1) != run(2)


def test_seed_is_harmless_for_greedy_and_refused_for_foreign_samplers(model, tokenizer, truth):
    assert [r.token for r in stream_generate(model, tokenizer, PROMPT, 3, seed=5)] == truth[:3]
    with pytest.raises(UsageError, match="seed"):
        list(stream_generate(model, tokenizer, PROMPT, 3, seed=5, sampler=lambda p: mx.argmax(p, axis=-1)))


@pytest.mark.parametrize("prior", [[], PROMPT[:9]])
def test_processors_see_every_token_so_far(model, truth, prior):
    seen = []

    def spy(tokens, logits):
        assert logits.shape == (1, 512)
        seen.append(tokens.tolist())
        return logits

    cache = model.make_cache()
    prefill(model, mx.array(prior, mx.int32), cache)
    got = steps(
        model,
        PROMPT[len(prior) :],
        max_tokens=4,
        prompt_cache=cache,
        prior_tokens=prior,
        logits_processors=[spy],
        prefill_step_size=5,
    )
    assert got == truth[:4]
    assert seen == [PROMPT + truth[:n] for n in range(4)]


def test_suppressed_tokens_do_not_appear(model, truth):
    banned = set(truth[:5])
    got = steps(model, max_tokens=20, logits_processors=make_logits_processors(suppress_tokens=list(banned)))
    assert len(got) == 20 and not banned & set(got)


# Refusals


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"prefill_step_size": 0}, "prefill_step_size"),
        ({"max_kv_size": 512}, "max_kv_size is not supported"),
        ({"kv_bits": 4}, "make_cache"),
        ({"prompt": []}, "at least one token"),
        ({"prompt": [[1, 2]]}, "at least one token"),
    ],
)
def test_unusable_arguments(model, options, says):
    prompt = options.pop("prompt", PROMPT)
    with pytest.raises(UsageError, match=says):
        next(generate_step(mx.array(prompt), model, **options))


@pytest.mark.parametrize("kv_bits", [None, 16])
def test_plain_kv_bits_are_accepted(model, truth, kv_bits):
    assert steps(model, max_tokens=2, kv_bits=kv_bits) == truth[:2]


def test_logits_that_are_no_numbers(model):
    class Broken:
        text_config = model.text_config
        make_cache = staticmethod(model.make_cache)

        def __call__(self, tokens, cache):
            return model(tokens, cache=cache) * mx.array(float("nan"))

    with pytest.raises(Gemma4Error, match="--check"):
        steps(Broken())


def test_a_torn_cache_is_noticed(model):
    cache = model.make_cache()
    prefill(model, mx.array(PROMPT), cache)
    cache[-1].offset -= 1
    with pytest.raises(Gemma4Error, match="middle of a step"):
        steps(model, prompt_cache=cache)
