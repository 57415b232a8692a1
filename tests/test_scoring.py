import math
import runpy
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from charloom import scoring
from charloom.architecture import Cell
from charloom.cell import Network
from charloom.checkpoint import Checkpoint
from charloom.decoding.request import Handle, Piece
from charloom.errors import ModelError, OptionError, UnknownTextError
from charloom.model import Model
from charloom.scoring import Score

TINY = runpy.run_path(str(Path(__file__).parent / "tiny_model.py"))
LETTERS = TINY["LETTERS"]
CODE_POINTS = 0x110000


@cache
def make_model(kind: str = "characters", documents: str = "none", cell: Cell = "lstm") -> Model:
    """A small random network whose predictions are far from even."""
    checkpoint = TINY["make_checkpoint"](TINY["make_tokenizer"](kind), documents, cell=cell)
    return Model(checkpoint, threads=1)


def plain_loop(model: Model, tokens: NDArray[np.int32]) -> NDArray[np.float64]:
    """Log-probabilities of all tokens after each but the last, by the readable cell, (N - 1, V)."""
    network = Network.from_tensors(model.checkpoint.architecture, model.checkpoint.tensors)
    state = network.initial_state(1)
    rows = []
    for token in tokens[:-1]:
        logits, state = network.step(np.array([token], np.int32), state)
        scores = logits[0].astype(np.float64)
        rows.append(scores - np.log(np.exp(scores).sum()))
    return np.array(rows)


def joined(scores: list[Score], name: str) -> NDArray[Any]:
    """One column of several scores, one after the other."""
    return np.concatenate([getattr(score, name) for score in scores])


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("documents", ["none", "lines"])
@pytest.mark.parametrize("kind", ["characters", "bytes", "pieces"])
def test_scores_are_those_of_a_plain_loop(kind: str, documents: str, cell: Cell) -> None:
    """Surprise, rank, entropy and alternatives are what a loop over the readable cell gives."""
    model = make_model(kind, documents, cell)
    text = "abc the cat 春 hat" if kind != "characters" else "abc 春 hfg\nabe"
    score = model.score(text, precision="float32", top=3)
    tokens = model.tokenizer.encode(text)
    end = [model.tokenizer.end]
    read = np.concatenate([end, tokens, end]) if documents == "lines" else tokens
    logprobs_NV = plain_loop(model, read.astype(np.int32))
    skipped = len(score.tokens_N) - len(logprobs_NV)
    place = np.arange(len(logprobs_NV))
    own_N = logprobs_NV[place, read[1:]]
    assert score.tokens_N.tolist() == read[1 - skipped :].tolist()
    np.testing.assert_allclose(score.logprobs_N[skipped:], own_N, atol=1e-4)
    ranks_N = (logprobs_NV > own_N[:, None]).sum(axis=1) + 1
    assert score.ranks_N[skipped:].tolist() == ranks_N.tolist()
    entropies_N = -(np.exp(logprobs_NV) * logprobs_NV).sum(axis=1)
    np.testing.assert_allclose(score.entropies_N[skipped:], entropies_N, atol=1e-4)
    top_NT = np.argsort(-logprobs_NV, axis=1)[:, :3]
    assert score.top_NT[skipped:].tolist() == top_NT.tolist()
    np.testing.assert_allclose(
        score.top_logprobs_NT[skipped:],
        np.take_along_axis(logprobs_NV, top_NT, axis=1),
        atol=1e-4,
    )


def test_the_first_token_of_plain_text_has_no_score() -> None:
    """Nothing stands before it, and it counts neither as surprise nor as a character."""
    score = make_model().score("春ab", top=2)
    assert math.isnan(score.logprobs_N[0])
    assert math.isnan(score.entropies_N[0])
    assert score.ranks_N.tolist()[0] == 0
    assert score.top_NT[0].tolist() == [-1, -1]
    assert np.isnan(score.top_logprobs_NT[0]).all()
    assert np.isfinite(score.logprobs_N[1:]).all()
    assert score.nats == pytest.approx(-score.logprobs_N[1:].sum())
    assert (score.characters, score.bytes) == (2, 2)


def test_a_document_is_scored_from_its_first_token_to_its_end() -> None:
    """Its end is one more token, of no character, and its surprise counts."""
    score = make_model(documents="lines").score("春ab")
    assert score.pieces == ("春", "a", "b", "")
    assert score.tokens_N.tolist()[-1] == LETTERS.end
    assert np.isfinite(score.logprobs_N).all()
    assert score.nats == pytest.approx(-score.logprobs_N.sum())
    assert (score.characters, score.bytes) == (3, 5)


def test_bits_are_shared_among_characters_and_bytes() -> None:
    """Bits are nats over ln 2; characters are code points, bytes those of UTF-8."""
    score = make_model("bytes", "lines").score("a春b")
    assert score.bits == pytest.approx(-np.sum(score.logprobs_N) / math.log(2))
    assert score.pieces == ("a", "", "", "春", "b", "")
    assert score.bits_per_character == pytest.approx(score.bits / 3)
    assert score.bits_per_byte == pytest.approx(score.bits / 5)


@pytest.mark.parametrize("kind", ["characters", "bytes", "pieces"])
@pytest.mark.parametrize("documents", ["none", "lines"])
def test_pieces_are_the_text(kind: str, documents: str) -> None:
    """Joined, what the tokens add is the text."""
    text = "bad 春\nbed"
    score = make_model(kind, documents).score(text)
    assert "".join(score.pieces) == score.text == text
    assert len(score.pieces) == len(score.tokens_N)


@pytest.mark.parametrize("documents", ["none", "lines"])
def test_an_empty_text_costs_nothing_or_its_end(documents: str) -> None:
    """In plain text it has no token; as a document it costs its end, but has no character."""
    score = make_model(documents=documents).score("", top=2)
    assert len(score.tokens_N) == (documents == "lines")
    assert (score.bits > 0.0) == (documents == "lines")
    assert score.top_NT.shape == score.top_logprobs_NT.shape == (len(score.tokens_N), 2)
    assert math.isnan(score.bits_per_character)
    assert math.isnan(score.bits_per_byte)


def test_a_text_of_one_character_has_no_score_in_plain_text() -> None:
    """There is a token, and nothing to say of it."""
    score = make_model().score("a")
    assert score.pieces == ("a",)
    assert str(score.bits) == "0.0"  # and not -0.0
    assert math.isnan(score.bits_per_character)


@pytest.mark.parametrize("documents", ["none", "lines"])
def test_no_texts_have_no_scores(documents: str) -> None:
    """Nothing in, nothing out, apart and together."""
    scorer = make_model(documents=documents).scorer()
    assert list(scorer.apart([])) == list(scorer.together([])) == []


def test_a_character_never_seen_costs_its_choice_among_all_others() -> None:
    """The unknown token's surprise, and that of one code point out of all that it may stand for."""
    model = make_model(documents="lines")
    score = model.score("ažb", precision="float32", top=LETTERS.vocabulary_size)
    read = [LETTERS.end, *LETTERS.encode("ažb", unknown="replace").tolist(), LETTERS.end]
    logprobs_NV = plain_loop(model, np.array(read, np.int32))
    expected = logprobs_NV[1, LETTERS.unknown] - math.log(CODE_POINTS - len(LETTERS.characters))
    assert score.logprobs_N[1] == pytest.approx(expected, abs=1e-4)
    assert score.unknown == 1
    assert make_model().score("aabb").unknown == 0


@pytest.mark.parametrize("documents", ["none", "lines"])
def test_unknown_characters_stand_as_they_were_in_the_pieces(documents: str) -> None:
    """The text is shown as it is and not with stand-ins, apart and together."""
    model = make_model(documents=documents)
    scorer = model.scorer()
    for score in (model.score("aéb"), *scorer.together(["aéb"])):
        assert score.pieces[:3] == ("a", "é", "b")
        assert score.text == "aéb"


def test_half_a_pair_is_an_unknown_character() -> None:
    """A lone surrogate, which has no UTF-8, counts as the stand-in that it is read as."""
    score = make_model(documents="lines").score("a\ud800b")
    assert (score.unknown, score.characters, score.bytes) == (1, 3, 5)


def test_unknown_characters_may_be_skipped_or_refused() -> None:
    """Skipped they are as if they were not there; refused they are named with their position."""
    model = make_model()
    skipped, plain = model.score("abécd", unknown="skip"), model.score("abcd")
    assert skipped.logprobs_N[1:].tolist() == plain.logprobs_N[1:].tolist()
    assert (skipped.pieces, skipped.text) == (("a", "b", "c", "d"), "abécd")
    with pytest.raises(UnknownTextError, match=r"'é'.*position 2"):
        model.score("abécd", unknown="error")


@pytest.mark.parametrize("documents", ["none", "lines"])
def test_a_text_can_be_scored_without_waiting(documents: str) -> None:
    """Encoded, submitted, stepped by hand and assembled it has the score that waiting gives."""
    model = Model(make_model(documents=documents).checkpoint, threads=1, own_thread=False)
    scorer = model.scorer(top=2)
    asked = []
    for text in ("abc 春", "", "aéb"):
        tokens = scorer.encode(text)
        asked.append((text, tokens, scorer.submit(tokens, owner="somebody")))
    assert all(handle.take() == [] for _, _, handle in asked)
    (engine,) = model.engines
    while engine.step():
        pass
    for text, tokens, handle in asked:
        score = scorer.assemble(text, tokens, handle.result().prompt_scores)
        expected = make_model(documents=documents).score(text, top=2)
        assert (score.text, score.pieces, score.unknown) == (
            expected.text,
            expected.pieces,
            expected.unknown,
        )
        for name in ("tokens_N", "logprobs_N", "ranks_N", "entropies_N", "top_logprobs_NT"):
            np.testing.assert_array_equal(getattr(score, name), getattr(expected, name))


def test_apart_each_text_is_scored_as_alone() -> None:
    """Many texts, more than there are rows, come in their order with the numbers of each alone."""
    model = make_model(documents="lines")
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefgh "), rng.integers(0, 12))) for _ in range(700)]
    scores = list(model.scorer(top=1).apart(iter(texts)))
    assert [score.text for score in scores] == texts
    for index in (0, 1, 350, 699):
        alone = model.score(texts[index], top=1)
        assert scores[index].logprobs_N.tolist() == alone.logprobs_N.tolist()
        assert scores[index].entropies_N.tolist() == alone.entropies_N.tolist()
        assert scores[index].top_logprobs_NT.tolist() == alone.top_logprobs_NT.tolist()


@given(data=st.data(), kind=st.sampled_from(["characters", "bytes"]), chunk=st.integers(1, 40))
@settings(max_examples=60)
def test_together_texts_are_one_long_text(data: st.DataObject, kind: str, chunk: int) -> None:
    """Wherever a text is cut, and however much is read at once, its tokens' scores are the same."""
    text = data.draw(st.text("abcdefgh \n春", max_size=60), "text")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12), "cuts"))
    parts = [text[start:stop] for start, stop in pairwise([0, *cuts, len(text)])]
    model = make_model(kind)
    whole = model.score(text, top=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "CHUNK", chunk)
        scores = list(model.scorer(top=2).together(iter(parts)))
    assert [score.text for score in scores] == parts
    for name in ("tokens_N", "ranks_N", "logprobs_N", "entropies_N", "top_NT", "top_logprobs_NT"):
        np.testing.assert_array_equal(joined(scores, name), getattr(whole, name))
    assert sum(score.characters for score in scores) == whole.characters


@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_together_the_texts_of_a_document_are_one_without_its_end(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first token follows the document's start, later texts the ones before them."""
    monkeypatch.setattr(scoring, "CHUNK", chunk)
    model = make_model(documents="files")
    scores = list(model.scorer().together(["", "ab", "", "c春", "d"]))
    assert [len(score.tokens_N) for score in scores] == [0, 2, 0, 2, 1]
    whole = model.score("abc春d")
    assert joined(scores, "logprobs_N").tolist() == whole.logprobs_N[:-1].tolist()


def test_texts_are_taken_as_they_are_needed() -> None:
    """An endless source gives scores: no more of it is read than is kept ahead."""
    taken = 0

    def lines() -> Any:
        nonlocal taken
        while True:
            taken += 1
            yield "abcdefgh\n"

    for documents, limit in (("none", 2 * scoring.CHUNK // 9), ("lines", 1024)):
        taken = 0
        scorer = make_model(documents=documents).scorer()
        scores = (scorer.together if documents == "none" else scorer.apart)(lines())
        assert next(scores).text == "abcdefgh\n"
        assert taken <= limit


@pytest.mark.parametrize("documents", ["none", "lines"])
def test_where_the_texts_pause_those_before_are_scored(documents: str) -> None:
    """None stands for a pause: what came before it is told first, and no number changes."""
    scorer = make_model(documents=documents).scorer()
    told: list[str] = []
    written: list[str] = []
    pauses = 0

    def lines() -> Any:
        nonlocal pauses
        for text in ("ab\n", None, None, "c", "de", None, ""):
            if text is not None:
                written.append(text)
            yield text
            if text is None:
                assert told == written
                pauses += 1

    for score_all in (scorer.apart, scorer.together):
        told, written = [], []
        whole = list(score_all(["ab\n", "c", "de", ""]))
        scores = []
        for score in score_all(lines()):
            told.append(score.text)
            scores.append(score)
        for name in ("tokens_N", "logprobs_N"):
            np.testing.assert_array_equal(joined(scores, name), joined(whole, name))
    assert pauses == 6


LONG = "abcdefgh" * 500


def close_apart(model: Model) -> None:
    """Take the first of several scores and no other."""
    scores = model.scorer().apart(["a", LONG, LONG])
    next(scores)
    scores.close()


def read_pieces(model: Model) -> None:
    """Judge pieces of tokens, as evaluation does."""
    tokens_N = np.ones(3000, np.int32)
    list(model.scorer().pieces(tokens_N, np.array([0, 1000]), np.array([1000, 1000])))


@pytest.mark.parametrize(
    ("score", "answered"),
    [
        (close_apart, 1),
        (lambda model: model.score(LONG), 0),
        (lambda model: list(model.scorer().apart(["a", LONG, LONG])), 1),
        (lambda model: list(model.scorer().together([LONG, LONG])), 0),
        (read_pieces, 0),
    ],
    ids=["close", "score", "apart", "together", "pieces"],
)
def test_a_text_that_is_no_longer_waited_for_is_read_no_further(
    score: Callable[[Model], Any], answered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After close or Ctrl-C nothing is left to do, even while the traceback is kept."""
    model = Model(make_model().checkpoint, threads=1, own_thread=False)
    engine = model.engine("auto")
    waits = 0

    def wait(handle: Handle) -> Piece | None:
        nonlocal waits
        waits += 1
        if waits > answered:
            raise KeyboardInterrupt
        while handle.outcome is None:
            engine.step()
            handle.take()
        return None

    monkeypatch.setattr(Handle, "next", wait)
    kept = None
    try:
        score(model)
    except KeyboardInterrupt as interrupt:
        kept = interrupt
    assert not engine.step()
    assert (kept is None) == (score is close_apart)


def test_a_scored_text_changes_no_text_written_later() -> None:
    """Scoring shares the engine with sampling and leaves nothing behind."""
    model = make_model(documents="lines")
    before = model.generate("ab", seed=1, max_tokens=30)
    model.score("ab" + before.text)
    assert model.generate("ab", seed=1, max_tokens=30) == before


def test_what_a_text_cost_to_write_it_costs_to_read() -> None:
    """Scores of a text are the log-probabilities it was written with, bit for bit."""
    for precision in ("float32", "int8"):
        options: dict[str, Any] = {"precision": precision}
        model = make_model()
        written = model.generate("ab", seed=1, max_tokens=50, logprobs=0, **options)
        assert written.logprobs is not None
        read = model.score("ab" + written.text, **options)
        assert read.logprobs_N[2:].tolist() == written.logprobs.logprobs_N.tolist()


def test_more_alternatives_than_tokens_are_all_of_them() -> None:
    """However many are asked for, and whether a text has a score or not."""
    scorer = make_model().scorer(top=10**6)
    for score in (*scorer.apart(["", "a", "ab"]), *scorer.together(["", "a"])):
        assert score.top_NT.shape == (len(score.tokens_N), LETTERS.vocabulary_size)
        assert score.top_logprobs_NT.shape == score.top_NT.shape


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"top": -1}, "top is -1; give a whole number of at least 0."),
        ({"top": None}, "top is None; give a whole number of at least 0."),
        ({"unknown": "ignore"}, "unknown is 'ignore'; choose one of error, replace, skip."),
        ({"precision": "int4"}, "precision is 'int4'; choose one of auto, int8, float32."),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], sentence: str) -> None:
    """Field, value and remedy, as in sampling."""
    with pytest.raises(OptionError) as caught:
        make_model().score("ab", **options)
    assert str(caught.value) == sentence


def test_what_is_no_text_is_named() -> None:
    """Bytes are not guessed at."""
    text: Any = b"ab"
    with pytest.raises(OptionError, match="text is b'ab'; give a text"):
        make_model().score(text)


def test_a_model_that_overflows_gives_no_scores() -> None:
    """Logits that are no numbers are a sentence, not a text of no surprise."""
    checkpoint = make_model().checkpoint
    tensors = {
        **checkpoint.tensors,
        "output.bias": np.full(LETTERS.vocabulary_size, 3e38, np.float32),
    }
    tensors["output.weight"] = np.full_like(checkpoint.tensors["output.weight"], 3e38)
    model = Model(
        Checkpoint(
            path=checkpoint.path,
            architecture=checkpoint.architecture,
            tokenizer=LETTERS,
            tensors=tensors,
            token_counts=checkpoint.token_counts,
            documents="none",
            summary={},
            fingerprint="1" * 64,
        ),
        threads=1,
    )
    with pytest.raises(ModelError, match=r"logits are not .*weights are damaged"):
        model.score("abab", precision="float32")
