import itertools
import runpy
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray

import charloom
from charloom.cell import Floats, Network, State
from charloom.checkpoint import Checkpoint
from charloom.decoding.decoder import choose_kernel
from charloom.decoding.draws import uniforms
from charloom.decoding.request import Handle, Prompt, Request
from charloom.errors import (
    BusyError,
    CheckpointError,
    ClosedError,
    ModelError,
    ModelMissingError,
    OptionError,
    UnknownTextError,
)
from charloom.model import Model, Stream
from charloom.params import CHOICE_LIMIT, SEED_LIMIT, Precision, SamplingParams
from charloom.tokenizer import ByteTokenizer, CharacterTokenizer, Tokenizer

TINY = runpy.run_path(str(Path(__file__).parent / "tiny_model.py"))
LETTERS = CharacterTokenizer("abcdefgh ")


def make_checkpoint(
    tokenizer: Tokenizer = LETTERS,
    *,
    documents: str = "none",
    token_counts: Mapping[str, int] | None = None,
    tensors: Mapping[str, Floats] | None = None,
) -> Checkpoint:
    """A tiny random LSTM, wide enough in its weights that its texts vary."""
    found: Checkpoint = TINY["make_checkpoint"](tokenizer, documents, hidden=16, seed=0)
    if token_counts is not None:
        counts = np.zeros(tokenizer.vocabulary_size, np.int64)
        for character, count in token_counts.items():
            counts[tokenizer.encode(character)] = count
        found = replace(found, token_counts=counts)
    return found if tensors is None else replace(found, tensors=tensors)


class ScriptedDecoder:
    """Says what it is told: after n tokens of a row it is certain of `script[n - 1]`.

    A row's state counts the tokens read; `read_tokens` lists those of all rows. Beyond the script's
    end, where a text that has ended may be stepped on, its last word is said again.
    """

    def __init__(self, vocabulary_size: int, script: list[int], *, capacity: int = 8) -> None:
        self.vocabulary_size = vocabulary_size
        self.capacity = capacity
        self.fingerprint = "script"
        self.script = script
        self.read_tokens: list[int] = []
        self._fed = np.zeros(capacity, np.int64)

    def step(self, tokens_B: NDArray[np.int32]) -> NDArray[np.float32]:
        """The next word of the script for each row."""
        self.read_tokens += tokens_B.tolist()
        rows = np.arange(len(tokens_B))
        places = np.minimum(self._fed[rows], len(self.script) - 1)
        logits = np.full((len(rows), self.vocabulary_size), -100, np.float32)
        logits[rows, np.array(self.script)[places]] = 100
        self._fed[rows] += 1
        return logits

    def read(self, row: int) -> State:
        """How many tokens a row has read."""
        return np.full((1, 1, 1), self._fed[row], np.float32)

    def write(self, row: int, state_LPH: State) -> None:
        """Let a row have read as many."""
        self._fed[row] = int(state_LPH[0, 0, 0])

    def clear(self, row: int) -> None:
        """Nothing read yet."""
        self._fed[row] = 0

    def move(self, source: int, target: int) -> None:
        """Let one row have read what another has."""
        self._fed[target] = self._fed[source]


def scripted(
    text_after_prompt: str, *, prompt: str = "", documents: str = "none", end: bool = False
) -> tuple[Model, ScriptedDecoder]:
    """A model that goes on from `prompt` with a given text, and perhaps the end token."""
    tokens = LETTERS.encode(text_after_prompt).tolist() + [LETTERS.end] * end
    silent = len(prompt) - (documents == "none")
    decoder = ScriptedDecoder(LETTERS.vocabulary_size, [0] * silent + tokens)
    model = Model(make_checkpoint(documents=documents), make_decoder=lambda _: decoder)
    return model, decoder


MODEL = Model(make_checkpoint())


def test_pieces_are_the_text() -> None:
    """The pieces of a stream together are the text that generate gives."""
    options = SamplingParams(max_tokens=60, seed=5, stop=("ab", "h h"))
    pieces = list(MODEL.stream("abc", options))
    assert len(pieces) > 1
    assert "".join(pieces) == MODEL.generate("abc", options).text


def test_a_half_read_stream_still_gives_the_whole_result() -> None:
    """result() holds the pieces taken before it was asked for."""
    stream = MODEL.stream("a", max_tokens=20, seed=1)
    first = next(stream)
    assert stream.finish_reason is None
    result = stream.result()
    assert result.text.startswith(first)
    assert result == MODEL.generate("a", max_tokens=20, seed=1)
    assert list(stream) == []


def test_generation_equals_a_plain_loop() -> None:
    """The text is the plain loop's over the readable cell: softmax, cumulative sum, uniform p."""
    prompt = LETTERS.encode("hello".replace("l", "b").replace("o", "a")).tolist()
    checkpoint = make_checkpoint()
    network = Network.from_tensors(checkpoint.architecture, checkpoint.tensors)
    state = network.initial_state(1)
    for token in prompt:
        logits, state = network.step(np.array([token], np.int32), state)
    allowed = LETTERS.drawable(documents=False)
    expected: list[int] = []
    for position in range(len(prompt), len(prompt) + 50):
        scores = np.where(allowed, logits[0].astype(np.float64) / 0.7, -np.inf)
        shares = np.exp(scores - scores.max())
        (uniform,) = uniforms(99, 0, np.array([position]))
        expected.append(int(np.searchsorted(shares.cumsum() / shares.sum(), uniform, "right")))
        logits, state = network.step(np.array(expected[-1:], np.int32), state)
    result = MODEL.generate("hebba", max_tokens=50, temperature=0.7, seed=99, precision="float32")
    assert result.text == LETTERS.decode(expected)
    assert (result.prompt_tokens, result.generated_tokens) == (5, 50)


def test_temperature_zero_needs_no_seed() -> None:
    """The most likely text is the same under every seed."""
    texts = {MODEL.generate("a", temperature=0, max_tokens=40, seed=seed).text for seed in range(5)}
    assert len(texts) == 1


def test_the_seed_decides_the_text() -> None:
    """The same seed writes the same text, other seeds other ones; seed 0 is a seed."""
    texts = [
        MODEL.generate("a", seed=seed, max_tokens=40).text for seed in (0, 0, 1, SEED_LIMIT - 1)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def test_a_seed_that_was_drawn_is_told() -> None:
    """Without a seed two texts differ, and each can be written again from the seed it names."""
    first, second = MODEL.generate("a", max_tokens=40), MODEL.generate("a", max_tokens=40)
    assert first.seed != second.seed
    assert 0 <= first.seed < SEED_LIMIT
    assert MODEL.generate("a", max_tokens=40, seed=first.seed) == first


def test_choices_do_not_depend_on_their_number() -> None:
    """Choice k is the same text whether one, three or k + 1 are asked for, or it alone."""
    three = list(MODEL.choices("ab", n=3, seed=4, max_tokens=30))
    assert [result.choice for result in three] == [0, 1, 2]
    assert len({result.text for result in three}) == 3
    assert [MODEL.generate("ab", seed=4, max_tokens=30, choice=k) for k in range(3)] == three
    assert list(MODEL.choices("ab", seed=4, max_tokens=30)) == three[:1]


def test_streams_may_be_taken_in_turns() -> None:
    """Streams of one prompt do not disturb each other."""
    streams = [MODEL.stream("ab", seed=4, max_tokens=30, choice=k) for k in range(3)]
    texts = [""] * 3
    for pieces in itertools.zip_longest(*streams, fillvalue=""):
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    assert texts == [MODEL.generate("ab", seed=4, max_tokens=30, choice=k).text for k in range(3)]


def test_more_choices_than_rows_come_in_order() -> None:
    """Those beyond the rows wait for one, and each is the text it would be alone."""
    decoder = ScriptedDecoder(LETTERS.vocabulary_size, LETTERS.encode("abcab").tolist(), capacity=3)
    model = Model(make_checkpoint(), make_decoder=lambda _: decoder)
    results = list(model.choices("h", n=20, max_tokens=5))
    assert [result.choice for result in results] == list(range(20))
    assert {result.text for result in results} == {"abcab"}


def test_choices_without_a_seed_share_one() -> None:
    """One seed is drawn for a request, not for each choice."""
    assert len({result.seed for result in MODEL.choices("a", n=4, max_tokens=1)}) == 1


def test_an_engine_can_be_stepped_by_hand() -> None:
    """Without a thread of its own nothing moves until it is stepped, and the text is the same."""
    model = Model(make_checkpoint(), own_thread=False, spinning=False, capacity=3, waiting=2)
    assert (model.engines, model.kernels, model.is_open("float32")) == ((), (), False)
    engine = model.engine("float32")
    assert model.engine("float32") is engine
    assert (model.engines, model.kernels) == ((engine,), ("float32",))
    assert model.is_open("float32")
    assert engine.capacity == 3
    params = SamplingParams(max_tokens=20, logit_bias={"a": 3.0})
    handle = engine.submit(
        Request(
            prompt=Prompt(LETTERS.encode("ab")), params=params, seed=4, bias_V=model.bias(params)
        )
    )
    assert handle.take() == []
    while engine.step():
        pass
    expected = MODEL.generate("ab", params, seed=4, precision="float32")
    assert handle.result().text == expected.text
    assert model.arithmetic("float32") == expected.precision


def test_requests_beyond_those_that_may_wait_are_refused() -> None:
    """How many may wait is the model's to say."""
    engine = Model(make_checkpoint(), own_thread=False, capacity=3, waiting=2).engine("auto")
    request = Request(prompt=Prompt(LETTERS.encode("a")), params=SamplingParams(), seed=0)
    handles = [engine.submit(request) for _ in range(5)]
    with pytest.raises(BusyError):
        engine.submit(request)
    engine.close()
    assert {handle.result().ending for handle in handles} == {"cancelled"}


@pytest.mark.parametrize("waiting", [0, 1, 2, 100])
def test_more_choices_than_may_wait_are_written(waiting: int) -> None:
    """As many are under way as have rows or may wait, so none is refused."""
    model = Model(make_checkpoint(), capacity=2, waiting=waiting)
    texts = [result.text for result in model.choices("ab", n=9, max_tokens=5, seed=3)]
    assert texts == [result.text for result in MODEL.choices("ab", n=9, max_tokens=5, seed=3)]


def test_a_text_names_what_its_bytes_depend_on() -> None:
    """The signature is that of equal models, whatever their threads, and of no other model or
    decoder.
    """
    result = MODEL.generate("ab", max_tokens=3, precision="float32")
    assert result.fingerprint == MODEL.signature("float32")
    assert result.fingerprint == Model(make_checkpoint(), threads=2).signature("float32")
    changed = replace(make_checkpoint(), fingerprint="1" * 64)
    others = [Model(changed).signature("float32"), scripted("a")[0].signature("float32")]
    assert len({result.fingerprint, *others}) == 3


@pytest.mark.skipif(choose_kernel("int8") == "float32", reason="int8 is not exact here")
def test_each_arithmetic_has_its_own_signature() -> None:
    """A text in 8 bits is not promised to be the one in float32."""
    assert MODEL.signature("int8") != MODEL.signature("float32")


def test_no_states_are_kept_where_there_is_no_room_for_them() -> None:
    """A model whose cache holds nothing reads its prompts again, and writes the same."""
    model = Model(make_checkpoint(), cache=0)
    texts = {model.generate("abc" * 100, max_tokens=9, seed=1).text for _ in range(2)}
    assert texts == {MODEL.generate("abc" * 100, max_tokens=9, seed=1).text}
    assert (model.cache.entries, model.cache.hits) == (0, 0)


def test_a_model_says_whether_it_knows_documents() -> None:
    """Then it begins with their end, and may draw it."""
    kinds = {"none": False, "lines": True, "files": True, "records": True}
    for documents, expected in kinds.items():
        assert Model(make_checkpoint(documents=documents)).documents == expected


def test_the_prompt_is_read_once_for_all_choices() -> None:
    """All of it but its last token is stepped once; each choice steps that and its own text."""
    model, decoder = scripted("abc", prompt="hegf")
    for result in model.choices("hegf", n=3, max_tokens=3):
        assert result.text == "abc"
    assert sorted(decoder.read_tokens) == sorted(LETTERS.encode("heg" + "fab" * 3).tolist())


def test_a_prompt_that_was_read_before_is_not_read_again() -> None:
    """A later request with the same prompt goes on from its kept state."""
    model, decoder = scripted("ab", prompt="hegf")
    model.generate("hegf", max_tokens=2)
    decoder.read_tokens.clear()
    assert model.generate("hegf", max_tokens=2).text == "ab"
    assert decoder.read_tokens == LETTERS.encode("fa").tolist()


def test_a_text_can_be_continued() -> None:
    """A prompt that holds the beginning of a text goes on as that text did, at any cut."""
    whole = MODEL.generate("ab", seed=8, max_tokens=40).text
    for cut in (1, 7, 39):
        rest = MODEL.generate("ab" + whole[:cut], seed=8, max_tokens=40 - cut).text
        assert whole[:cut] + rest == whole


def test_an_empty_prompt_can_be_continued() -> None:
    """So can a text that started from nothing, whose first token had nothing to read."""
    for documents in ("none", "lines"):
        model = Model(make_checkpoint(documents=documents))
        whole = model.generate(seed=13, max_tokens=20).text
        assert len(whole) > 1
        assert model.generate(whole[:1], seed=13, max_tokens=19).text == whole[1:]


def test_each_token_is_stepped_once_and_the_last_not_at_all() -> None:
    """The cost of a character does not grow with the text, and nothing is computed for later."""
    model, decoder = scripted("abcd", prompt="he")
    assert model.generate("he", max_tokens=4).text == "abcd"
    assert decoder.read_tokens == LETTERS.encode("heabc").tolist()


def test_a_model_of_documents_reads_its_end_token_first() -> None:
    """The prompt stands at the start of a document, as it did in training."""
    model, decoder = scripted("ab", prompt="he", documents="lines")
    assert model.generate("he", max_tokens=2).text == "ab"
    assert decoder.read_tokens == [LETTERS.end, *LETTERS.encode("hea").tolist()]


def test_a_model_of_documents_starts_an_empty_prompt_from_its_end_token() -> None:
    """Nothing given means a whole new document."""
    model, decoder = scripted("abc", documents="files")
    assert model.generate(max_tokens=3).text == "abc"
    assert decoder.read_tokens == [LETTERS.end, *LETTERS.encode("ab").tolist()]


def test_the_end_token_ends_a_document() -> None:
    """Drawing it finishes with "stop"; it is no part of the text."""
    model, _ = scripted("ab", prompt="he", documents="records", end=True)
    result = model.generate("he", max_tokens=50)
    assert (result.text, result.finish_reason, result.generated_tokens) == ("ab", "stop", 3)


@pytest.mark.parametrize("documents", ["none", "lines"])
def test_a_text_has_its_least_length(documents: str) -> None:
    """A network that is certain of the end does not draw it before, and then does."""
    model, _ = scripted("ab", prompt="he", documents=documents, end=True)
    result = model.generate("he", min_tokens=7, max_tokens=20)
    assert len(result.text) == (7 if documents == "lines" else 20)
    assert result.generated_tokens == (8 if documents == "lines" else 20)


def test_the_end_of_a_document_can_be_ignored() -> None:
    """It is never drawn, so that the text has the length that was asked for."""
    model, _ = scripted("ab", prompt="he", documents="lines", end=True)
    result = model.generate("he", ignore_eos=True, max_tokens=20)
    assert (len(result.text), result.finish_reason) == (20, "length")
    assert LETTERS.end not in result.tokens


def test_a_stop_string_can_be_shown() -> None:
    """The text ends with it, whole and in pieces, of which none waits for another."""
    model, _ = scripted("abcdefgh", prompt="h")
    options = SamplingParams(stop=("cde",), max_tokens=8, include_stop_str_in_output=True)
    result = model.generate("h", options)
    assert (result.text, result.finish_reason, result.generated_tokens) == ("abcde", "stop", 5)
    assert "".join(model.stream("h", options)) == "abcde"


def test_a_stop_string_comes_after_the_least_length() -> None:
    """One that is drawn earlier is text like any other."""
    model, _ = scripted("abcabcab", prompt="h")
    result = model.generate("h", stop=("bc",), min_tokens=4, max_tokens=8)
    assert (result.text, result.generated_tokens) == ("abca", 6)


def test_a_model_of_plain_text_never_ends_by_itself() -> None:
    """Where the network is certain of the end token, another one is drawn."""
    model, _ = scripted("", prompt="he", end=True)
    result = model.generate("he", max_tokens=1)
    assert len(result.text) == 1
    assert result.finish_reason == "length"


def test_an_empty_prompt_draws_from_the_token_counts() -> None:
    """The first character comes as often as in the training text; what it lacks never comes."""
    model = Model(make_checkpoint(token_counts={"a": 700, "c": 300}))
    count = 2000
    first = [result.text for result in model.choices(n=count, max_tokens=1, seed=0)]
    assert set(first) == {"a", "c"}
    spread = (count * 0.7 * 0.3) ** 0.5
    assert abs(first.count("a") - 0.7 * count) < 4 * spread


def test_a_model_of_nothing_says_so() -> None:
    """Token counts of zero leave an empty prompt nothing to draw, which is a sentence."""
    model = Model(make_checkpoint(token_counts={}))
    with pytest.raises(ModelError, match="no token to draw"):
        model.generate()
    assert model.generate("a", max_tokens=2).generated_tokens == 2


@pytest.mark.parametrize("precision", get_args(Precision))
def test_damaged_weights_are_a_sentence(precision: Precision) -> None:
    """Weights that are no numbers end with an error, not with a text, in 8 bits too."""
    checkpoint = make_checkpoint()
    damaged = {name: np.full_like(tensor, np.nan) for name, tensor in checkpoint.tensors.items()}
    model = Model(make_checkpoint(tensors=damaged))
    with pytest.raises(CheckpointError, match="not finite: its weights are damaged"):
        model.generate("a", precision=precision)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_are_a_sentence(value: float) -> None:
    """A network that overflows in its step ends with an error, not with a text."""

    class OverflowingDecoder(ScriptedDecoder):
        def step(self, tokens_B: NDArray[np.int32]) -> NDArray[np.float32]:
            return np.full_like(super().step(tokens_B), value)

    decoder = OverflowingDecoder(LETTERS.vocabulary_size, [0])
    model = Model(make_checkpoint(), make_decoder=lambda _: decoder)
    with pytest.raises(ModelError, match=r"none has a finite logit.*weights are damaged"):
        model.generate("a")


def test_no_tokens_asked_for_gives_an_empty_text() -> None:
    """max_tokens 0 is not "not given": nothing is written, because of the length."""
    result = MODEL.generate("a", max_tokens=0)
    assert (result.text, result.finish_reason, result.generated_tokens) == ("", "length", 0)


def test_a_stop_string_ends_the_text() -> None:
    """The text ends before it, and the prompt is not searched."""
    model, _ = scripted("abcdefgh", prompt="cd")
    result = model.generate("cd", stop=("ef", "cd"), max_tokens=8)
    assert (result.text, result.finish_reason) == ("ab", "stop")


def test_a_stop_string_is_never_shown_in_part() -> None:
    """No prefix of what the pieces say goes beyond the text before the stop."""
    model, _ = scripted("abcdefgh", prompt="h")
    assert list(model.stream("h", stop=("cde",), max_tokens=8)) == ["a", "b"]


def test_a_prompt_with_an_unknown_character_is_an_error() -> None:
    """The sentence names the character, and nothing is written."""
    with pytest.raises(UnknownTextError, match=r"'é'.*U\+00E9"):
        MODEL.generate("abé")


def test_unknown_characters_can_be_replaced_or_skipped() -> None:
    """With "replace" the network reads the unknown token, with "skip" nothing."""
    for policy, read in (("replace", [LETTERS.unknown]), ("skip", [])):
        model, decoder = scripted("a", prompt="a" if policy == "skip" else "aé")
        options: dict[str, Any] = {"unknown": policy, "max_tokens": 1}
        assert model.generate("aé", **options).text == "a"
        assert decoder.read_tokens == [*LETTERS.encode("a").tolist(), *read]


def test_the_penalty_counts_prompt_and_text() -> None:
    """With logits 3 for a and 2 for b, penalty 2 makes the most likely text alternate."""

    class ConstantDecoder(ScriptedDecoder):
        def step(self, tokens_B: NDArray[np.int32]) -> NDArray[np.float32]:
            logits = super().step(tokens_B)
            logits[:, LETTERS.encode("ab")] = 3, 2
            return logits

    decoder = ConstantDecoder(LETTERS.vocabulary_size, [0])
    model = Model(make_checkpoint(), make_decoder=lambda _: decoder)
    options = SamplingParams(temperature=0, repetition_penalty=2, max_tokens=3)
    assert model.generate("c", options).text == "aba"  # 3; 1.5 < 2; then both are halved
    assert model.generate("a", options).text == "baa"
    assert model.generate("a", options, repetition_penalty=None).text == "aaa"


def test_several_choices_are_not_squeezed_into_one_text() -> None:
    """Both calls that write one text say where to ask for several instead of ignoring n."""
    for call in (MODEL.generate, MODEL.stream):
        with pytest.raises(OptionError, match=r"n is 2, .*Model\.choices"):
            call("a", n=2)


@pytest.mark.parametrize("choice", [-1, CHOICE_LIMIT, 1.0, True])
def test_a_choice_out_of_range_is_named(choice: Any) -> None:
    """The index of a choice is a whole number that the generator's counter can hold."""
    with pytest.raises(OptionError, match="choice is"):
        MODEL.generate("a", choice=choice)


def test_options_out_of_range_come_before_any_work() -> None:
    """They are told when a stream is asked for, not when it is read."""
    model, decoder = scripted("abc", prompt="a")
    with pytest.raises(OptionError, match="temperature is -1"):
        model.choices("a", temperature=-1)
    assert decoder.read_tokens == []


def test_a_misspelt_option_is_refused() -> None:
    """An unknown keyword is an error, never ignored."""
    options: dict[str, Any] = {"temprature": 1.0}
    with pytest.raises(TypeError, match="temprature"):
        MODEL.generate("a", **options)


def test_keywords_go_over_params() -> None:
    """A keyword replaces that field of the parameters given and no other."""
    params = SamplingParams(seed=3, max_tokens=10)
    assert MODEL.generate("a", params, max_tokens=5) == MODEL.generate("a", seed=3, max_tokens=5)


def test_the_answer_says_which_precision() -> None:
    """Whatever was asked, the result names the arithmetic used; "auto" is one of the two."""
    named = {
        precision: MODEL.generate("a", max_tokens=1, precision=precision).precision
        for precision in get_args(Precision)
    }
    assert named["int8"] == "int8"
    assert named["float32"] == "float32"
    assert named["auto"] in ("int8", "float32")


def test_a_stream_that_is_closed_ends() -> None:
    """It gives no further piece, tells no reason, and says so when asked for the whole text."""
    stream = MODEL.stream("a", max_tokens=10**8)
    assert next(stream)
    stream.close()
    for _ in stream:  # what was written before the engine heard of it
        pass
    assert stream.finish_reason is None
    with pytest.raises(ClosedError, match="closed before its text had ended"):
        stream.result()


def test_a_stream_that_is_forgotten_is_written_no_further() -> None:
    """Its row is free for the next text at once."""
    decoder = ScriptedDecoder(LETTERS.vocabulary_size, LETTERS.encode("a").tolist(), capacity=1)
    model = Model(make_checkpoint(), make_decoder=lambda _: decoder)
    stream = model.stream("h", max_tokens=10**9)
    assert next(stream)
    del stream
    assert model.generate("h", max_tokens=3).text == "aaa"


@pytest.mark.parametrize(
    "write",
    [
        lambda model: model.generate("h", max_tokens=10**9),
        lambda model: list(model.choices("h", max_tokens=10**9, n=3)),
    ],
    ids=["generate", "choices"],
)
def test_a_text_that_is_no_longer_waited_for_is_written_no_further(
    write: Callable[[Model], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After Ctrl-C the rows are free, even while the traceback is kept, as a notebook does."""
    decoder = ScriptedDecoder(LETTERS.vocabulary_size, LETTERS.encode("a").tolist(), capacity=1)
    model = Model(make_checkpoint(), make_decoder=lambda _: decoder)
    wait = Handle.next

    def interrupted(_: Handle) -> None:
        monkeypatch.setattr(Handle, "next", wait)
        raise KeyboardInterrupt

    monkeypatch.setattr(Handle, "next", interrupted)
    with pytest.raises(KeyboardInterrupt) as kept:
        write(model)
    assert model.generate("h", max_tokens=3).text == "aaa"
    assert kept.tb is not None


def test_a_bias_names_a_token_by_text_or_number() -> None:
    """Both forms mean the same token: one makes it certain, the other all but forbids it."""
    number = int(LETTERS.encode("c")[0])
    for name in ("c", number):
        assert MODEL.generate("a", logit_bias={name: 100}, max_tokens=5, seed=0).text == "ccccc"
        forbidden = MODEL.generate("a", logit_bias={name: -100}, max_tokens=200, seed=0).text
        assert "c" not in forbidden


@pytest.mark.parametrize("name", ["ab", "é", "\ud800", LETTERS.vocabulary_size])
def test_a_bias_of_what_is_no_token_is_named(name: str | int) -> None:
    """Text of several tokens, unknown text and numbers beyond the vocabulary are one sentence."""
    with pytest.raises(OptionError) as caught:
        MODEL.generate("a", logit_bias={"a": 1.0, name: 1.0})
    (problem,) = caught.value.problems
    assert problem.startswith(f"logit_bias names {name!r}, which is not one token of this model;")


def test_log_probabilities_are_given_where_asked_for() -> None:
    """Each drawn token has its own and as many alternatives as asked, and nothing unasked."""
    assert MODEL.generate("a", max_tokens=5, seed=0).logprobs is None
    result = MODEL.generate("a", max_tokens=5, seed=0, logprobs=2)
    assert result.logprobs is not None
    assert tuple(result.logprobs.tokens_N) == result.tokens
    assert result.logprobs.top_NT.shape == (5, 2)
    assert (result.logprobs.logprobs_N < 0).all()


def test_texts_with_log_probabilities_can_be_compared() -> None:
    """Two results are equal when everything in them is, arrays included."""
    options = SamplingParams(max_tokens=5, seed=0, logprobs=2)
    assert MODEL.generate("a", options) == MODEL.generate("a", options)
    assert MODEL.generate("a", options) != MODEL.generate("a", options, top_k=1)


@pytest.mark.parametrize("prompt", ["春眠不覺曉", "مرحبا", "👩‍👩‍👧‍👦", "a\r\nb\tc\0", "e\u0301"])
@pytest.mark.parametrize("kind", ["characters", "bytes"])
def test_every_script_survives(prompt: str, kind: str) -> None:
    """Prompts of any script are read, and what is written is whole characters."""
    tokenizer = ByteTokenizer() if kind == "bytes" else CharacterTokenizer(sorted(set(prompt)))
    result = Model(make_checkpoint(tokenizer)).generate(prompt, max_tokens=80, seed=0)
    assert result.text
    assert "\ufffd" not in result.text
    assert result.text.encode().decode() == result.text
    if kind == "characters":
        assert set(result.text) <= set(prompt)


def test_threads_may_share_a_model() -> None:
    """Texts written at the same time are those written one after another."""
    seeds = range(8)

    def write(seed: int) -> str:
        return MODEL.generate("ab", seed=seed, max_tokens=60).text

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(write, seeds)) == [write(seed) for seed in seeds]


def test_a_saved_model_writes_what_it_wrote_in_memory(tmp_path: Path) -> None:
    """Loading a folder, given as text or path, gives the same texts."""
    checkpoint = make_checkpoint(documents="lines")
    TINY["save"](checkpoint, tmp_path / "tiny")
    expected = Model(checkpoint).generate("ab", seed=1, max_tokens=50)
    for path in (tmp_path / "tiny", str(tmp_path / "tiny")):
        model = charloom.load(path)
        saved = replace(expected, fingerprint=model.signature("auto"))  # one made up in memory
        assert model.generate("ab", seed=1, max_tokens=50) == saved
        assert len(model.fingerprint) == 64


def test_a_missing_folder_is_a_sentence(tmp_path: Path) -> None:
    """Loading what is not there names the path."""
    with pytest.raises(ModelMissingError, match="nowhere"):
        charloom.load(tmp_path / "nowhere")


def test_stream_is_an_iterator_of_text() -> None:
    """A stream can be looped over directly, as documented."""
    stream = MODEL.stream("a", max_tokens=3)
    assert isinstance(stream, Stream)
    assert all(isinstance(piece, str) for piece in stream)
    assert stream.finish_reason == "length"


@pytest.mark.parametrize("threads", [0, -1, 257, 10**15, 1.5, True])
def test_a_number_of_threads_that_makes_no_sense_is_refused(threads: Any) -> None:
    """Threads lie between 1 and 256; the sentence names what was given."""
    with pytest.raises(OptionError, match=f"threads is {threads!r}; give a whole number from 1"):
        Model(make_checkpoint(), threads=threads)


def test_a_token_has_one_bias() -> None:
    """A token named by its text and by its number is refused, since one of them would be lost."""
    token = int(LETTERS.encode("e")[0])
    with pytest.raises(OptionError, match=r"logit_bias names .* twice"):
        MODEL.generate("a", max_tokens=1, logit_bias={"e": 1.0, token: -2.0})


def test_threads_may_share_a_stream() -> None:
    """Each piece goes to one of the threads that iterate over it, and all come to its end."""
    stream = MODEL.stream("a", max_tokens=300, seed=3)
    with ThreadPoolExecutor(3) as pool:
        parts = list(pool.map(lambda _: list(stream), range(3)))
    text = MODEL.generate("a", max_tokens=300, seed=3).text
    assert sum(len("".join(part)) for part in parts) == len(text)
