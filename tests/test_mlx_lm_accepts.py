"""mlx-lm's own generation and evaluation with our model and tokenizer, unwrapped."""

import math

import mlx.core as mx
import mlx_lm
import pytest
from tiny import make_tiny

from mlx_gemma4 import load, make_logits_processors, make_sampler, stream_generate

PROMPT = "hello user, the model"


@pytest.fixture(scope="module", params=["e2b", "26b-a4b"])
def loaded(request, tmp_path_factory):
    model, tokenizer = load(make_tiny(tmp_path_factory.mktemp("tiny"), request.param), dtype="float32")
    tokenizer.eos_token_ids, tokenizer.eos_token_id = set(), None  # random models stop anywhere otherwise
    return model, tokenizer


def test_stream_generate_gives_our_tokens_and_fields(loaded):
    theirs = list(mlx_lm.stream_generate(*loaded, PROMPT, max_tokens=16, prefill_step_size=5))
    ours = list(stream_generate(*loaded, PROMPT, max_tokens=16))
    assert [r.token for r in theirs] == [r.token for r in ours]
    # No comparison of texts: theirs shows characters that a later byte undoes, on random bytes.
    assert "".join(r.text for r in ours) == loaded[1].decode([r.token for r in ours])
    assert vars(theirs[0]).keys() == vars(ours[0]).keys()
    assert theirs[-1].prompt_tokens == ours[-1].prompt_tokens
    assert theirs[-1].generation_tokens == ours[-1].generation_tokens
    assert theirs[-1].finish_reason == ours[-1].finish_reason == "length"
    for a, b in zip(theirs, ours, strict=True):
        assert mx.allclose(a.logprobs, b.logprobs, atol=1e-4)


def test_their_samplers_and_processors_in_our_loop_and_ours_in_theirs(loaded):
    from mlx_lm.sample_utils import make_logits_processors as their_processors
    from mlx_lm.sample_utils import make_sampler as their_sampler

    def run(generate, sampler, processors):
        options = {"sampler": sampler, "logits_processors": processors}
        return [r.token for r in generate(*loaded, PROMPT, max_tokens=12, **options)]

    greedy = {"repetition_penalty": 1.3, "repetition_context_size": 7}
    runs = [
        run(g, s(0.0), p(**greedy))
        for g in (mlx_lm.stream_generate, stream_generate)
        for s in (their_sampler, make_sampler)
        for p in (their_processors, make_logits_processors)
    ]
    assert all(tokens == runs[0] for tokens in runs)
    sampled = [run(g, make_sampler(1.0, 0.9, seed=3), []) for g in (mlx_lm.stream_generate, stream_generate)]
    assert sampled[0] == sampled[1]


def test_their_prompt_cache_functions(loaded):
    """make_prompt_cache takes our caches; a cache filled by their loop continues in ours."""
    from mlx_lm.models.cache import make_prompt_cache

    model, tokenizer = loaded
    whole = [r.token for r in stream_generate(model, tokenizer, PROMPT, max_tokens=9)]
    cache = make_prompt_cache(model)
    for response in mlx_lm.stream_generate(model, tokenizer, PROMPT, max_tokens=4, prompt_cache=cache):
        last = response.token
    held = cache[0].offset
    assert {c.offset for c in cache} == {held}
    # Their loop feeds the last token too, ours does not: continue from whatever was fed.
    prompt = len(tokenizer.encode(PROMPT))
    rest = whole[held - prompt :]
    assert last == whole[3]
    got = [r.token for r in stream_generate(model, tokenizer, rest[:1], max_tokens=4, prompt_cache=cache)]
    assert got == rest[1:5]


def test_perplexity_evaluation(loaded, capsys):
    from mlx_lm.perplexity import eval_ppl

    model, tokenizer = loaded
    text = "hello user, the model reads the text in tokens; " * 4
    ids = tokenizer.encode(text)[:64]
    data = mx.array([ids, ids[::-1], ids])
    perplexity, error = eval_ppl(model, data, batch_size=2)
    logits = model(data[:, :-1])
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mean = mx.take_along_axis(logprobs, data[:, 1:, None], axis=-1).mean().item()
    assert perplexity == pytest.approx(math.exp(-mean), rel=1e-4) and error > 0


def test_their_tokenizer_wrapper(loaded):
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    tokenizer = loaded[1]
    wrapper = TokenizerWrapper(tokenizer)
    assert wrapper.has_chat_template and wrapper.has_thinking and len(wrapper) == len(tokenizer)
    messages = [{"role": "user", "content": "hello"}]
    ids = wrapper.apply_chat_template(messages, add_generation_prompt=True)
    assert ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=True)


def test_their_training_data_classes(loaded):
    from mlx_lm.tuner.datasets import ChatDataset, TextDataset

    tokenizer = loaded[1]
    text = TextDataset([{"text": "hello"}], tokenizer)
    assert text.process(text[0])[0][: len(tokenizer.encode("hello"))] == tokenizer.encode("hello")
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "user"}]
    chat = ChatDataset([{"messages": messages}], tokenizer, mask_prompt=True)
    ids, offset = chat.process(chat[0])
    assert tokenizer.decode(ids[offset:]) == "user<turn|>\n"
