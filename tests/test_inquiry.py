import json
import runpy
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from charloom.architecture import Cell
from charloom.cell import Network, State
from charloom.checkpoint import Checkpoint
from charloom.decoding.decoder import Decoder, Kernel
from charloom.model import Model
from service.engine.inquiry import (
    DetokeniseWork,
    EmbedWork,
    ScoreWork,
    TokeniseWork,
    describe,
)
from service.engine.shelf import Served, Shelf
from service.errors import RequestError
from service.messages import (
    NUMBERS_LIMIT,
    UNLIKELY,
    Describe,
    Detokenise,
    Embed,
    Embeddings,
    ModelCard,
    Prompt,
    Scores,
    ScoreTexts,
    Tokenise,
)
from service.settings import Settings

TINY = runpy.run_path(str(Path(__file__).parent / "tiny_model.py"))
LETTERS = TINY["LETTERS"]


def make_checkpoint(kind: str, documents: str = "none", cell: Cell = "lstm") -> Checkpoint:
    """A small random network over the tokens of one kind."""
    return TINY["make_checkpoint"](TINY["make_tokenizer"](kind), documents, cell=cell)


def serve(
    kind: str = "characters",
    documents: str = "none",
    cell: Cell = "lstm",
    *,
    checkpoint: Checkpoint | None = None,
    precision: str = "float32",
    make_decoder: Callable[[Kernel], Decoder] | None = None,
) -> Served:
    """A model on its shelf, of four rows, stepped by hand, that has read nothing yet."""
    if checkpoint is None:
        checkpoint = make_checkpoint(kind, documents, cell)
    card = ModelCard(
        name="demo",
        created=0,
        fingerprint=checkpoint.fingerprint,
        architecture=checkpoint.architecture.to_json(),
        parameters=checkpoint.architecture.parameters,
        tokenizer=kind,
        vocabulary=checkpoint.architecture.vocabulary,
        documents=documents,
        bits_per_character=None,
        is_loaded=True,
    )
    model = Model(
        checkpoint,
        threads=1,
        own_thread=False,
        spinning=False,
        capacity=4,
        make_decoder=make_decoder,
    )
    settings = Settings(precision=precision)  # type: ignore[arg-type] # as the test says
    return Served(card, model, settings, clock=lambda: 0.0)


def finish(served: Served, work: ScoreWork | EmbedWork) -> None:
    """Step the engines until the work is done."""
    while not work.is_done:
        for engine in served.model.engines:
            engine.step()


def score(served: Served, *texts: str, **options: Any) -> Scores:
    """The answer about some texts, fit for strict JSON."""
    work = ScoreWork(
        served, ScoreTexts(model="demo", texts=list(texts), **options), time.monotonic()
    )
    finish(served, work)
    answer = work.answer()
    json.dumps(msgspec.to_builtins(answer), allow_nan=False)
    return answer


def embed(served: Served, *inputs: Prompt, **options: Any) -> Embeddings:
    """The answer about some inputs."""
    work = EmbedWork(served, Embed(model="demo", inputs=list(inputs), **options), time.monotonic())
    finish(served, work)
    return work.answer()


def refusal(call: Callable[[], object]) -> RequestError:
    """What a question is refused with."""
    with pytest.raises(RequestError) as caught:
        call()
    return caught.value


# Scores


@pytest.mark.parametrize("documents", ["none", "lines"])
@pytest.mark.parametrize("kind", ["characters", "bytes", "pieces"])
def test_scores_are_those_of_the_python_interface(kind: str, documents: str) -> None:
    """Tokens, probabilities, ranks, entropies and sums, without waiting for a thread."""
    texts = ["abc 春 hfg\nabe", "the cat", "", "a"] if kind != "characters" else ["abc 春", "", "a"]
    answer = score(serve(kind, documents), *texts, top=3)
    model = Model(make_checkpoint(kind, documents, "lstm"), threads=1)
    assert (answer.model, answer.precision, len(answer.cards)) == ("demo", "float32", len(texts))
    for text, card in zip(texts, answer.cards, strict=True):
        expected = model.score(text, precision="float32", top=3)
        has_score = expected.ranks_N > 0
        assert tuple(card.judged.tokens) == expected.pieces
        assert card.judged.ids == expected.tokens_N.tolist()
        assert [rank or 0 for rank in card.ranks] == expected.ranks_N.tolist()
        for name, found in (("logprobs_N", card.judged.logprobs), ("entropies_N", card.entropies)):
            numbers = getattr(expected, name)
            assert [number is not None for number in found] == has_score.tolist()
            assert [number for number in found if number is not None] == numbers[has_score].tolist()
        for place, top in enumerate(card.judged.top):
            if top is None:
                assert not has_score[place]
            else:
                assert [logprob for _, logprob in top] == expected.top_logprobs_NT[place].tolist()
                names = [model.tokenizer.decode([token]) for token in expected.top_NT[place]]
                assert [name for name, _ in top] == names
        assert (card.characters, card.unknown) == (expected.characters, expected.unknown)
        if expected.characters:
            assert card.bits_per_character == expected.bits_per_character
            assert card.bits_per_byte == expected.bits_per_byte
        else:
            assert (card.bits_per_character, card.bits_per_byte) == (None, None)


class Certain:
    """A network to which b is impossible, whatever it reads."""

    vocabulary_size = LETTERS.vocabulary_size
    capacity = 1
    fingerprint = "certain"

    def step(self, tokens_B: NDArray[np.int32]) -> NDArray[np.float32]:
        """All other tokens are equally likely."""
        logits_BV = np.zeros((len(tokens_B), self.vocabulary_size), np.float32)
        logits_BV[:, LETTERS.encode("b")] = -np.inf
        return logits_BV

    def read(self, _row: int) -> State:
        """Nothing is remembered."""
        return np.zeros((1, 1, 1), np.float32)

    def write(self, row: int, state_LPH: State) -> None:
        """Nothing is remembered."""

    def clear(self, row: int) -> None:
        """Nothing is remembered."""

    def move(self, source: int, target: int) -> None:
        """Nothing is remembered."""


def test_what_is_impossible_has_numbers_that_json_carries() -> None:
    """The logarithm of nothing is -9999, and an infinite mean is null."""
    served = serve(make_decoder=lambda _: Certain())
    (card,) = score(served, "abc", top=LETTERS.vocabulary_size).cards
    assert card.judged.logprobs[:2] == [None, UNLIKELY]
    assert card.judged.top[1] is not None
    assert card.judged.top[1][-1] == ("b", UNLIKELY)
    assert card.ranks == [None, LETTERS.vocabulary_size, 4]
    assert (card.bits_per_character, card.bits_per_byte, card.characters) == (None, None, 2)


def test_unknown_characters_are_replaced_skipped_or_refused() -> None:
    """Replaced they are counted; refused, the text and the place are named."""
    served = serve()
    assert score(served, "aéb").cards[0].unknown == 1
    assert score(served, "aéb", unknown="skip").cards[0].judged.tokens == ["a", "b"]
    ask = ScoreTexts(model="demo", texts=["ab", "aéb"], unknown="error")
    problem = refusal(lambda: ScoreWork(served, ask, time.monotonic())).problem
    assert (problem.status, problem.param) == (400, "text")
    assert problem.message.startswith("text 1 (counted from 0): The character 'é' (U+00E9) at")
    assert 'or set unknown to "replace"' in problem.message  # and no option of a command


def test_more_texts_than_rows_are_scored() -> None:
    """All of them, in their order."""
    texts = ["ab" * length for length in range(1, 30)]
    answer = score(serve(documents="lines"), *texts)
    assert ["".join(card.judged.tokens) for card in answer.cards] == texts


def test_an_answer_that_would_fill_the_memory_is_refused() -> None:
    """Before anything is read: the more alternatives, the less text."""
    served = serve()
    text = "ab" * (NUMBERS_LIMIT // 40)
    assert ScoreWork(served, ScoreTexts(model="demo", texts=[text]), 0.0).cost == len(text)
    ask = ScoreTexts(model="demo", texts=[text], top=10**6)
    problem = refusal(lambda: ScoreWork(served, ask, 0.0)).problem
    assert (problem.status, problem.param, problem.code) == (400, "text", "too_much_work")
    assert f"{len(text)} tokens" in problem.message
    assert problem.message.endswith("send less text at a time, or ask for fewer alternatives.")
    long = Tokenise(model="demo", texts=["ab" * NUMBERS_LIMIT])
    problem = refusal(lambda: TokeniseWork(served, long)).problem
    assert problem.param == "prompt"
    assert problem.message.endswith("send less text at a time.")  # it has no alternatives


def test_no_texts_have_no_scores() -> None:
    """Nothing in, nothing out."""
    assert score(serve()).cards == []


# Embeddings


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("documents", ["none", "lines"])
@pytest.mark.parametrize("kind", ["characters", "bytes", "pieces"])
def test_an_embedding_is_the_last_hidden_state(kind: str, documents: str, cell: Cell) -> None:
    """The last layer's h after all tokens of the input, as the readable cell has it."""
    text = "abc 春 hgf"
    served = serve(kind, documents, cell)
    answer = embed(served, text, "a")
    checkpoint = served.model.checkpoint
    network = Network.from_tensors(checkpoint.architecture, checkpoint.tensors)
    tokenizer = checkpoint.tokenizer
    for given, vector in zip((text, "a"), answer.vectors, strict=True):
        tokens = tokenizer.encode(given).tolist()
        state = network.initial_state(1)
        for token in [tokenizer.end] * (documents == "lines") + tokens:
            _, state = network.step(np.array([token], np.int32), state)
        found = np.frombuffer(vector, "<f4")
        np.testing.assert_allclose(found, state[-1, 0, 0], atol=1e-4)
    assert answer.tokens == len(tokenizer.encode(text)) + len(tokenizer.encode("a"))


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_an_embedding_is_the_same_alone_and_in_a_crowd(precision: str) -> None:
    """Bit for bit, from a prompt that was read now, before, or in part."""
    texts = ["abc", "abcdefgh " * 40, "abcdefgh " * 40 + "b", "春"]
    served = serve(precision=precision)
    together = embed(served, *texts, *texts).vectors
    assert together[:4] == together[4:]
    assert embed(served, *texts).vectors == together[:4]
    assert [embed(serve(precision=precision), text).vectors[0] for text in texts] == together[:4]


def test_tokens_are_embedded_like_their_text() -> None:
    """A list of tokens is an input too."""
    served = serve()
    answer = embed(served, "abc", LETTERS.encode("abc").tolist())
    assert answer.vectors[0] == answer.vectors[1]
    assert answer.tokens == 6


def test_an_input_that_was_read_before_is_known_to_its_owner_alone() -> None:
    """States that are kept are not shared with other owners."""
    served = serve()
    embed(served, "abcdef", owner="x")
    for owner, known in (("x", 6), ("y", 0)):
        work = EmbedWork(
            served, Embed(model="demo", inputs=["abcdef"], owner=owner), time.monotonic()
        )
        finish(served, work)
        work.answer()
        assert work.handles[0].result().cached_tokens == known


@pytest.mark.parametrize(
    ("inputs", "options", "sentence"),
    [
        ([""], {}, "input has no token; give at least one character that the model knows."),
        (["a", []], {}, "input 1 has no token; give at least one character that the model knows."),
        (["é"], {"unknown": "skip"}, "input has no token"),
        (["é"], {}, "The character 'é'"),
        ([[0, 1, 99]], {}, "tokens holds 99 at index 2; the tokens of this model are 0 to 12."),
        (["a", [-1]], {}, "input 1 (counted from 0): tokens holds -1 at index 0"),
        ([[2**70]], {}, "tokens is not a list of whole numbers"),
    ],
)
def test_an_input_that_cannot_be_read_is_named(
    inputs: list[Prompt], options: dict[str, Any], sentence: str
) -> None:
    """Which of them, what is wrong, and what to do."""
    ask = Embed(model="demo", inputs=inputs, **options)
    problem = refusal(lambda: EmbedWork(serve(), ask, time.monotonic())).problem
    assert (problem.status, problem.param) == (400, "input")
    assert problem.message.startswith(sentence)


# Works


def works(served: Served, **options: Any) -> list[ScoreWork | EmbedWork]:
    """One work of each kind."""
    text = "abcdefgh" * 50
    return [
        ScoreWork(served, ScoreTexts(model="demo", texts=[text, ""], **options), time.monotonic()),
        EmbedWork(served, Embed(model="demo", inputs=[text], **options), time.monotonic()),
    ]


def test_nothing_is_submitted_before_it_is_asked_for() -> None:
    """The cost is known before, and a work that is cancelled then leaves nothing behind."""
    served = serve()
    for work, cost in zip(works(served), (401, 400), strict=True):
        assert work.cost == cost
        work.cancel()
        assert work.is_done
        assert refusal(work.answer).problem.status == 503
    for engine in served.model.engines:
        assert (engine.load.waiting, engine.step()) == (0, False)


def test_a_work_that_is_cancelled_is_done_soon() -> None:
    """Its answer is a refusal, and its rows are free."""
    served = serve()
    for work in works(served):
        assert not work.is_done
        for engine in served.model.engines:
            engine.step()
        work.cancel()
        finish(served, work)
        assert refusal(work.answer).problem.code == "cancelled"
        assert all(engine.load.active == 0 for engine in served.model.engines)


@pytest.mark.parametrize("is_begun", [False, True])
def test_a_work_on_a_model_that_is_let_go_is_refused(is_begun: bool) -> None:
    """Whether its engine had begun with it or takes no more requests."""
    served = serve()
    asked = works(served)
    assert not any(work.is_done for work in asked if is_begun)
    for engine in served.model.engines:
        engine.close()
    for work in asked:
        assert work.is_done
        assert refusal(work.answer).problem.status == 503


def test_a_work_has_its_time() -> None:
    """What is not read by its deadline is refused with a remedy, and may be asked for again."""
    served = serve()
    for work in works(served, timeout=0.0):
        finish(served, work)
        problem = refusal(work.answer).problem
        assert (problem.status, problem.code) == (503, "deadline")
        assert problem.message == (
            "The texts were not read within 0 seconds; send fewer or shorter ones, or ask again "
            "later."
        )


def test_a_network_that_overflows_gives_no_answer() -> None:
    """Logits that are no numbers are a damaged model, which no waiting mends."""
    checkpoint = make_checkpoint("characters", "none", "lstm")
    tensors = {
        **checkpoint.tensors,
        "output.bias": np.full(LETTERS.vocabulary_size, 3e38, np.float32),
        "output.weight": np.full_like(checkpoint.tensors["output.weight"], 3e38),
    }
    served = serve(checkpoint=replace(checkpoint, tensors=tensors))
    for work in works(served):
        finish(served, work)
        problem = refusal(work.answer).problem
        assert (problem.status, problem.code) == (500, "model_damaged")


def test_the_precision_is_the_service_s_unless_asked_for() -> None:
    """The answer says which it came to."""
    served = serve(precision="float32")
    assert score(served, "ab").precision == "float32"
    asked = score(served, "ab", precision="int8").precision
    assert asked == embed(served, "ab", precision="int8").precision
    assert asked == served.model.arithmetic("int8")


# Tokens


@pytest.mark.parametrize("kind", ["characters", "bytes", "pieces"])
def test_tokens_are_a_text_s_and_back(kind: str) -> None:
    """The pieces are the text, and the tokens' text is that too."""
    served, texts = serve(kind), ["abc 春\nh", ""]
    answer = TokeniseWork(served, Tokenise(model="demo", texts=texts)).answer()
    for text, tokens, pieces in zip(texts, answer.tokens, answer.pieces, strict=True):
        assert tokens == served.model.tokenizer.encode(text).tolist()
        assert "".join(pieces) == text
        assert len(pieces) == len(tokens)
        work = DetokeniseWork(served, Detokenise(model="demo", tokens=tokens))
        assert (work.answer().text, work.cost) == (text, len(tokens))


def test_unknown_characters_in_a_text_to_tokenise() -> None:
    """Refused by name, or shown by their stand-in."""
    served = serve()
    ask = Tokenise(model="demo", texts=["aé"])
    problem = refusal(lambda: TokeniseWork(served, ask)).problem
    assert (problem.status, problem.param) == (400, "prompt")
    assert "'é'" in problem.message
    replaced = TokeniseWork(served, Tokenise(model="demo", texts=["aé"], unknown="replace"))
    assert replaced.answer().pieces == [["a", "\ufffd"]]


@pytest.mark.parametrize("token", [-1, LETTERS.vocabulary_size, 2**31])
def test_a_number_that_is_no_token_is_named(token: int) -> None:
    """With the tokens there are."""
    ask = Detokenise(model="demo", tokens=[2, token])
    problem = refusal(lambda: DetokeniseWork(serve(), ask)).problem
    assert (problem.status, problem.param) == (400, "tokens")
    assert "0 to 12" in problem.message


# Models


def test_models_are_described(tmp_path: Path) -> None:
    """All of them, or one by its name."""
    checkpoint = make_checkpoint("characters", "none", "gru")
    for name in ("b", "a"):
        TINY["save"](checkpoint, tmp_path / name)
    shelf = Shelf(Settings(models=tmp_path), wake=lambda: None)
    assert [card.name for card in describe(shelf, Describe()).cards] == ["a", "b"]
    assert [card.name for card in describe(shelf, Describe(model="b")).cards] == ["b"]
    problem = refusal(lambda: describe(shelf, Describe(model="c"))).problem
    assert (problem.status, problem.code, problem.param) == (404, "model_not_found", "model")
    shelf.close()
