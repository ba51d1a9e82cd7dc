"""`gemma4 kv-check` and what it measures: texts, figures, recommendation, errors. Small models, no timing."""

import json
import math
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from optional import optional
from tiny import make_tiny

from mlx_gemma4 import kv_check, kv_sample, load
from mlx_gemma4.cache import CompressedCache, CompressedOneVectorCache
from mlx_gemma4.cli import app
from mlx_gemma4.cli import kv_check as command
from mlx_gemma4.errors import ContextError, UsageError
from mlx_gemma4.kv_bits import KvBits
from mlx_gemma4.kv_check import Agreement, Measured, Report
from mlx_gemma4.kv_sample import Fact, Passage

CONTEXT = 1024


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(
        make_tiny(
            tmp_path_factory.mktemp("kv") / "tiny",
            "e2b",
            layer_types=["sliding_attention", "full_attention"],
            num_kv_shared_layers=0,
        )
    )


@pytest.fixture(scope="module")
def loaded(folder: str):
    return load(folder)


@pytest.fixture(scope="module")
def tokenizer(loaded):
    return loaded[1]


@pytest.fixture
def base(tokenizer, monkeypatch: pytest.MonkeyPatch):
    """The tokenizer of a pretrained checkpoint: no chat template."""
    monkeypatch.setattr(tokenizer, "has_chat_template", False)
    return tokenizer


# Texts


def test_facts_are_about_different_things():
    told = kv_sample.facts(100, seed=0)
    assert len({f.stem for f in told}) == len(told) == 100
    codes = [f.value for f in told if f.value.isdigit()]
    assert len(set(codes)) == len(codes) > 20
    assert {f.question.split()[0] for f in told} == {"What", "Where"}
    assert kv_sample.facts(100, seed=0) == told != kv_sample.facts(100, seed=1)
    with pytest.raises(UsageError, match="not 1000"):
        kv_sample.facts(1000, seed=0)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("Mia lives in Rome.", True),
        ("rome", True),
        ("In Rome, of course", True),
        ("Jerome", False),
        ("Romeo lives there", False),
        ("", False),
    ],
)
def test_an_answer_names_the_value_as_a_word(answer: str, right: bool):
    assert Fact("Where does Mia live?", "Mia lives in", "Rome").is_in(answer) is right


def test_sample_in_turns_scores_what_the_model_writes(tokenizer):
    passage = kv_sample.sample_passage(tokenizer, CONTEXT)
    text = tokenizer.decode(passage.ids)
    assert abs(len(passage.ids) - 1 - CONTEXT) < 32
    assert passage.head >= CONTEXT * 0.7, "scored positions have most of the text behind them"
    assert len(passage.counts) == len(passage.ids) - passage.head and passage.counts[0]
    written = tokenizer.decode([t for t, c in zip(passage.ids[passage.head :], passage.counts, strict=True) if c])
    answers = [a.strip() for a in written.split("<turn|>") if a.strip()]
    assert len(answers) > 1 and written.count("<turn|>") == len(answers)
    for answer in answers:
        assert text.count(answer) == 2, "told once, asked once"
        assert text.index(answer) < text.index("<turn|>")
    assert "What" not in written and "user" not in written


def test_sample_of_a_base_model_states_its_facts_twice(base):
    passage = kv_sample.sample_passage(base, CONTEXT)
    tail = base.decode(passage.ids[passage.head :])
    said = [s.strip() + "." for s in tail.split(".")[:-1]]
    head = base.decode(passage.ids[: passage.head])
    assert "<|turn>" not in head and all(passage.counts) and len(said) > 3
    assert all(statement in head for statement in said[:-1])


def test_own_text_is_continued_in_the_model_turn(tokenizer):
    text = kv_sample.filled(tokenizer, [], 3000, seed=5)
    passage = kv_sample.text_passage(tokenizer, text, CONTEXT)
    assert len(passage.ids) == pytest.approx(CONTEXT, abs=3) and all(passage.counts)
    assert passage.scored == kv_sample.scored_of(CONTEXT - (CONTEXT - passage.scored * 4))
    head, tail = tokenizer.decode(passage.ids[: passage.head]), tokenizer.decode(passage.ids[passage.head :])
    assert head.endswith("<|turn>model\n")
    told = head.partition("Continue this text.\n\n")[2].partition("<turn|>")[0]
    assert text.startswith(told) and text[len(told) :].lstrip().startswith(tail.lstrip())


def test_own_text_of_a_base_model_stays_as_it_is(base):
    text = kv_sample.filled(base, [], 3000, seed=5)
    passage = kv_sample.text_passage(base, text, CONTEXT)
    assert passage.ids == base.encode(text)[:CONTEXT]


@pytest.mark.parametrize("context", [None, 4000])
def test_a_short_text_says_how_much_is_missing(tokenizer, context):
    text = "word " * 50
    n = len(tokenizer.encode(text, add_special_tokens=False))
    with pytest.raises(UsageError, match=rf"the text has {n:,} tokens; at least [0-9,]+ are needed") as error:
        kv_sample.text_passage(tokenizer, text, context)
    needed = int(str(error.value).split("least ")[1].split(" ")[0].replace(",", ""))
    assert (context or CONTEXT) - 64 < needed < (context or CONTEXT)


@pytest.mark.parametrize("turns", [True, False])
def test_questions_share_all_but_their_end(tokenizer, monkeypatch, turns: bool):
    monkeypatch.setattr(tokenizer, "has_chat_template", turns)
    questions = kv_sample.recall_questions(tokenizer, CONTEXT, 6)
    shared = tokenizer.decode(questions.shared)
    assert questions.in_turns is turns and len(questions.asked) == 6
    for ids, fact in questions.asked:
        assert fact.statement in shared
        assert 0 < len(ids) < 60 and abs(len(questions.shared) + len(ids) - CONTEXT) < 64
        whole = tokenizer.decode(questions.shared + ids)
        assert whole.endswith(f"{fact.question}<turn|>\n<|turn>model\n" if turns else fact.stem)


# Figures


def test_compare_against_numpy():
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((2, 5, 11))
    logits[1, 0] = logits[0, 0]
    p, q = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    following = rng.integers(0, 11, 5)
    got = np.array(kv_check.compare(*(mx.array(x.astype(np.float32)) for x in (p, q)), mx.array(following)))
    np.testing.assert_allclose(got[0], (np.exp(p) * (p - q)).sum(-1), atol=1e-5)
    np.testing.assert_array_equal(got[1], p.argmax(-1) == q.argmax(-1))
    np.testing.assert_allclose(got[2:], -np.stack([x[np.arange(5), following] for x in (p, q)]), atol=1e-5)
    assert got[0, 0] == 0 and got[1, 0] == 1 and (got[0, 1:] > 0.01).all()


def test_summary():
    kl = np.linspace(0, 1, 101)
    same = np.array([1.0] * 100 + [0.0])
    got = kv_check.summary(np.stack([kl, same, np.full(101, math.log(2)), np.full(101, math.log(3))]))
    assert got.kl_mean == pytest.approx(0.5) and got.kl_p99 == pytest.approx(0.99)
    assert got.top1 == pytest.approx(100 / 101)
    assert (got.exact_perplexity, got.perplexity) == pytest.approx((2, 3))


class Spy:
    """A model that keeps how many positions each call had, and the caches it made."""

    def __init__(self, model):
        self._model = model
        self.lengths: list[int] = []
        self.made: list[list] = []

    def __call__(self, tokens, cache):
        self.lengths.append(tokens.shape[1])
        return self._model(tokens, cache=cache)

    def make_cache(self, **options):
        self.made.append(self._model.make_cache(**options))
        return self.made[-1]

    @property
    def text_config(self):
        return self._model.text_config


def test_check_on_a_small_model(loaded, tokenizer):
    model = Spy(loaded[0])
    passage = kv_sample.sample_passage(tokenizer, CONTEXT)
    wanted = command.settings("16,4,2,4/2")
    report = kv_check.check(model, tokenizer, wanted, passage, step=256)
    by_name = {m.name: m for m in report.settings}
    assert list(by_name) == ["16", "4", "2", "4/2"] and report.scored == passage.scored
    assert (report.context, report.questions, report.exact_recall) == (len(passage.ids) - 1, 0, None)

    same = by_name["16"].agreement
    assert (same.kl_mean, same.kl_p99, same.top1) == (0, 0, 1) and same.perplexity == same.exact_perplexity
    # The same text under the exact cache, whichever setting stands beside it.
    assert len({m.agreement.exact_perplexity for m in report.settings}) == 1
    assert 0 < by_name["4"].agreement.kl_mean < by_name["4/2"].agreement.kl_mean
    assert by_name["4/2"].agreement.kl_mean <= by_name["2"].agreement.kl_mean * 1.2
    for m in report.settings[1:]:
        assert m.agreement.kl_mean <= m.agreement.kl_p99 and m.recall is None
        assert m.cache_bytes < report.exact_bytes
    assert [m.real_bits for m in report.settings] == pytest.approx([16, 4.25, 2.25, 3.25])
    assert by_name["2"].cache_bytes < by_name["4/2"].cache_bytes < by_name["4"].cache_bytes

    # Nothing long but the chunks of a prompt, so logits stay few; and codes lie before the first scored position.
    tail = len(passage.ids) - passage.head
    long = [n for n in model.lengths if n > kv_check.CHUNK]
    assert max(model.lengths) <= 256 and sum(long) <= 5 * passage.head
    assert sum(model.lengths) == 5 * (passage.head - 1) + 8 * tail
    coded = [c.coded for cache in model.made for c in cache if isinstance(c, CompressedCache) and c.coded]
    assert len(coded) == 3 and min(coded) > passage.head - 128


def test_one_vector_models_take_one_number(tmp_path):
    model, tokenizer = load(make_tiny(tmp_path / "tiny", "31b"))
    passage = kv_sample.sample_passage(tokenizer, CONTEXT)
    model = Spy(model)
    with pytest.raises(UsageError, match="one number"):
        kv_check.check(model, tokenizer, command.settings("4,4/3"), passage)
    assert not model.lengths, "refused before anything is computed"
    report = kv_check.check(model, tokenizer, command.settings("4"), passage)
    assert report.settings[0].agreement.kl_mean > 0
    assert any(isinstance(c, CompressedOneVectorCache) and c.coded for c in model.made[-1])


def test_what_does_not_fit_is_refused(loaded, tokenizer):
    passage = Passage([5] * 4200, 4000, [True] * 200)
    with pytest.raises(ContextError, match="4,199 positions and the model has 4,096"):
        kv_check.check(loaded[0], tokenizer, command.settings("4"), passage)
    with pytest.raises(UsageError, match="nothing to compare"):
        kv_check.check(loaded[0], tokenizer, command.settings("4"), Passage([5] * 40, 30, [False] * 10))


def test_recall_of_the_built_in_model():
    """It knows what it was told, through an exact cache and through codes; and a lost fact is noticed."""
    from mlx_gemma4 import demo

    model, tokenizer = load(demo.path())
    questions = kv_sample.recall_questions(tokenizer, CONTEXT, 3)
    (bits,) = command.settings("3.5").values()
    assert kv_check.recall(model, tokenizer, questions, kv_check.make_cache(model, bits)) == 3
    (first, _), *others = questions.asked
    missed = kv_sample.Questions(questions.shared, [(first, Fact("", "", "nowhere")), *others], in_turns=True)
    assert kv_check.recall(model, tokenizer, missed, kv_check.make_cache(model)) == 2


# Recommendation


def measured(bits: float, kl: float = 0.001, top1: float = 0.99, recall: int | None = 20) -> Measured:
    return Measured(f"{bits:g}", KvBits(bits, bits), bits, int(bits * 1000), Agreement(kl, kl, top1, 2, 2), recall)


@pytest.mark.parametrize(
    ("settings", "best"),
    [
        ([measured(4), measured(3.5), measured(3)], "3"),
        ([measured(4), measured(3, kl=kv_check.MOST_KL * 1.01)], "4"),
        ([measured(4), measured(3, kl=kv_check.MOST_KL)], "3"),
        ([measured(4), measured(3, top1=kv_check.LEAST_TOP1 - 0.001)], "4"),
        ([measured(4), measured(3, recall=19)], "4"),
        ([measured(4, recall=None), measured(3, recall=None)], "3"),
        ([measured(2, kl=1)], None),
        ([measured(16)], None),
        ([measured(4), measured(3, kl=1), measured(2)], "4"),
    ],
    ids=[
        "smallest",
        "divergence",
        "at the limit",
        "first choice",
        "recall",
        "no questions",
        "none",
        "exact only",
        "luck",
    ],
)
def test_recommendation(settings: list[Measured], best: str | None):
    report = Report(4096, 500, 20, 16000, 20, settings)
    assert (report.recommended and report.recommended.name) == best
    line = command.recommendation(report)
    assert f"--kv-bits {best}," in line if best else "keep 16 bits" in line


def test_recommendation_names_both_flags():
    split = Measured("4/3", KvBits(4, 3), 3.5, 100, Agreement(0, 0, 1, 2, 2), 20)
    line = command.recommendation(Report(4096, 500, 20, 16000, 20, [split]))
    assert "--kv-key-bits 4 --kv-value-bits 3" in line


# The command


@pytest.fixture
def gemma4(capsys: pytest.CaptureFixture[str]):
    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        return app.run(["kv-check", *arguments]), *capsys.readouterr()

    return run


def test_command_prints_a_table(gemma4, folder):
    code, out, err = gemma4(folder, "--context", "1k", "--bits", "4,2", "--questions", "1")
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert "scored; 1 questions" in lines[0] and lines[1].split() == " ".join(command.HEAD).split()
    assert [line.split()[0] for line in lines[2:5]] == ["exact", "4", "2"]
    assert lines[5].startswith("Recommendation: ") and len(lines) == 6


def test_command_prints_json_about_a_file(gemma4, folder, tokenizer, tmp_path):
    file = tmp_path / "own.txt"
    file.write_text(kv_sample.filled(tokenizer, [], 2000, seed=9))
    arguments = ["--text", str(file), "--context", "1k", "--questions", "0", "--bits", "3.5", "--json"]
    code, out, err = gemma4(folder, *arguments)
    record = json.loads(out)
    assert (code, err) == (0, "") and out.count("\n") == 1
    (setting,) = record["settings"]
    assert setting["name"] == "3.5" and setting["bits"] == {
        "keys": 3.5,
        "values": 3.5,
        "sliding": 16,
        "mode": "trellis",
    }
    assert setting["agreement"].keys() >= {"kl_mean", "kl_p99", "top1", "perplexity", "exact_perplexity"}
    assert setting["agreement"]["kl_mean"] > 0 and setting["cache_bytes"] < record["exact_bytes"]
    assert record["recommended"] == ("3.5" if setting["within_limits"] else None)
    assert record["limits"] == {"kl_mean": 0.02, "top1": 0.97, "recall_lost": 0.01}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--bits", "3.3"], 2, "--bits takes 16, 4, 3.5, 3, 2.5 or 2, not 3.3"),
        (["--bits", "4,abc"], 2, "not abc"),
        (["--bits", "4,"], 2, "such as 4,3.5 or 4/3, not '4,'"),
        (["--bits", "4/16"], 2, "both below 16"),
        (["--mode", "zip"], 2, "trellis, pairs or paper, not zip"),
        (["--context", "x"], 2, "not 'x'"),
        (["--context", "100"], 2, "at least 1,024"),
        (["--context", "64k", "--questions", "0"], 1, "the model has 4,096"),
        (["--text", "missing.txt"], 1, "missing.txt"),
        (["--plot", "figure.pdf"], 2, ".png"),
        (["--plot", "missing/figure.png"], 2, "no folder missing"),
    ],
)
def test_errors_are_one_line(gemma4, folder, monkeypatch, tmp_path, arguments: list[str], code: int, message: str):
    monkeypatch.chdir(tmp_path)
    got, out, err = gemma4(folder, *arguments)
    assert (got, out) == (code, "") and err.count("\n") == 1 and message in err, err


def test_a_short_file_is_one_line(gemma4, folder, tmp_path):
    (tmp_path / "short.txt").write_text("not much")
    code, out, err = gemma4(folder, "--text", str(tmp_path / "short.txt"))
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "tokens; at least" in err
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    code, _, err = gemma4(folder, "--text", str(tmp_path / "latin.txt"))
    assert code == 2 and "not UTF-8" in err


def test_without_matplotlib_nothing_is_loaded(gemma4, monkeypatch, tmp_path):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    code, out, err = gemma4(str(tmp_path / "no-model"), "--plot", str(tmp_path / "x.png"))
    assert (code, out) == (1, "") and err.count("\n") == 1
    assert "pip install 'mlx-gemma4[plot]'" in err, "told before the missing model is"


def test_plot(tmp_path: Path):
    optional("matplotlib", "plot")
    report = Report(4096, 500, 20, 16000, 20, [measured(16, kl=0), measured(4), measured(2, kl=0.3, recall=11)])
    command.draw(report, "tiny", tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "matplotlib.pyplot" not in sys.modules, "no window, no state of the process"
