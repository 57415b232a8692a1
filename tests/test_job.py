import runpy
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from charloom.checkpoint import Checkpoint
from charloom.decoding.decoder import Decoder, GraphDecoder, Kernel
from charloom.decoding.request import Ending, Outcome, Piece
from charloom.model import Model
from charloom.params import BIASES_LIMIT, SamplingParams
from charloom.tokenizer import ByteTokenizer, CharacterTokenizer, Tokenizer
from service.engine.choice import TEXT_AT_ONCE, Choice
from service.engine.job import Job
from service.engine.judgement import Spelling, finite
from service.engine.lane import Lane
from service.engine.shelf import Served
from service.errors import TOLD, RequestError
from service.messages import (
    NUMBERS_LIMIT,
    PROMPTS_LIMIT,
    TEXTS_LIMIT,
    UNLIKELY,
    Accepted,
    Delta,
    Ended,
    ModelCard,
    Submit,
)
from service.settings import Settings

NOW = time.monotonic()
"""A moment by the engines' clock, long before any deadline."""

LETTERS = CharacterTokenizer("abcdefgh \n")
BYTES = ByteTokenizer()

make_checkpoint = runpy.run_path(str(Path(__file__).parent / "tiny_model.py"))["make_checkpoint"]


class Counting:
    """A real decoder that notes how many tokens it was fed in all rows."""

    def __init__(self, decoder: GraphDecoder) -> None:
        self.vocabulary_size, self.capacity = decoder.vocabulary_size, decoder.capacity
        self.fingerprint = decoder.fingerprint
        self.read, self.write = decoder.read, decoder.write
        self.clear, self.move = decoder.clear, decoder.move
        self.fed = 0
        self._step = decoder.step

    def step(self, tokens_B: NDArray[np.int32]) -> NDArray[np.float32]:
        """Feed a token to each of the first rows."""
        self.fed += len(tokens_B)
        return self._step(tokens_B)


class Broken(Counting):
    """One whose steps fail."""

    def step(self, tokens_B: NDArray[np.int32]) -> NDArray[np.float32]:
        """Fail, with words that are nobody's business."""
        raise RuntimeError(f"secret about {len(tokens_B)} rows")


def make_served(
    tokenizer: Tokenizer = LETTERS,
    documents: str = "none",
    *,
    rows: int = 4,
    settings: Settings | None = None,
    wrap: Callable[[GraphDecoder], Any] | None = None,
    checkpoint: Checkpoint | None = None,
) -> Served:
    """A model on its shelf that is stepped by hand and has read nothing yet."""
    found = make_checkpoint(tokenizer, documents) if checkpoint is None else checkpoint

    def make_decoder(kernel: Kernel) -> Decoder:
        decoder = GraphDecoder(found, kernel, capacity=rows, threads=1)
        return decoder if wrap is None else wrap(decoder)

    card = ModelCard(
        name="demo",
        created=0,
        fingerprint=found.fingerprint,
        architecture=found.architecture.to_json(),
        parameters=found.architecture.parameters,
        tokenizer=tokenizer.kind,
        vocabulary=tokenizer.vocabulary_size,
        documents=documents,
        bits_per_character=None,
        is_loaded=True,
    )
    model = Model(found, threads=1, own_thread=False, make_decoder=make_decoder)
    return Served(card, model, Settings() if settings is None else settings, clock=lambda: NOW)


def make_counted() -> tuple[Served, list[Counting]]:
    """The same, and its decoders, which count, as they are made."""
    decoders: list[Counting] = []

    def wrap(decoder: GraphDecoder) -> Counting:
        decoders.append(Counting(decoder))
        return decoders[-1]

    return make_served(wrap=wrap), decoders


@cache
def reference(tokenizer: Tokenizer = LETTERS, documents: str = "none") -> Model:
    """The same model in one's hand."""
    return Model(make_checkpoint(tokenizer, documents), threads=1)


def make_order(prompt: Any = "abc", **options: Any) -> Submit:
    """A request; options that `Submit` does not have are those of `SamplingParams`."""
    own = {
        name: options.pop(name)
        for name in ("best_of", "is_echoed", "is_streamed", "interval", "timeout", "owner")
        if name in options
    }
    if not isinstance(prompt, list) or (prompt and isinstance(prompt[0], int)):
        prompt = [prompt]
    options.setdefault("seed", 7)
    return Submit(id=1, model="demo", prompts=prompt, params=SamplingParams(**options), **own)


@dataclass
class Text:
    """One choice, put together from its deltas."""

    text: str = ""
    tokens: int = 0
    pieces: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    top: list[Any] = field(default_factory=list)
    finish: str | None = None
    stop_reason: str | None = None
    deltas: int = 0

    def add(self, delta: Delta) -> None:
        """Go on with a delta; the last one comes last."""
        assert self.finish is None
        self.text += delta.text
        self.tokens += delta.tokens
        self.finish, self.stop_reason = delta.finish, delta.stop_reason
        self.deltas += 1
        if delta.judged is not None:
            self.pieces += delta.judged.tokens
            self.ids += delta.judged.ids
            self.logprobs += delta.judged.logprobs
            self.top += delta.judged.top


@dataclass
class Answer:
    """All that a worker is told of a job."""

    accepted: Accepted
    texts: dict[int, Text]
    ended: Ended

    @property
    def plain(self) -> list[str]:
        """The texts in the order of their index."""
        assert sorted(self.texts) == list(range(len(self.texts)))
        return [self.texts[index].text for index in sorted(self.texts)]


def run(job: Job, *, now: Callable[[], float] = time.monotonic, pace: float = 0.0) -> Answer:
    """Take a job through its lane to its end."""
    lane = Lane(job.engine)
    accepted = job.admit(now())
    lane.push(job)
    texts: dict[int, Text] = defaultdict(Text)
    while not job.is_over:
        lane.feed(now())
        job.engine.step()
        lane.collect(now())
        while told := job.tell(now(), pace)[0]:
            assert len({delta.index for delta in told}) == len(told)
            for delta in told:
                texts[delta.index].add(delta)
    assert lane.is_empty
    assert lane.streams == 0
    return Answer(accepted, dict(texts), job.ended())


def write(served: Served, order: Submit, **settings: Any) -> Answer:
    """What a request comes to."""
    return run(Job(order, served, Settings(**settings)))


def refusal(order: Submit, served: Served | None = None, **settings: Any) -> Any:
    """The problem that a request is refused with."""
    with pytest.raises(RequestError) as caught:
        Job(order, make_served() if served is None else served, Settings(**settings))
    return caught.value.problem


# Texts


@pytest.mark.parametrize("precision", ["int8", "float32"])
@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("documents", ["none", "lines"])
def test_texts_are_those_of_the_model(precision: Any, is_streamed: bool, documents: str) -> None:
    """Each choice of each prompt is what `Model.generate` gives for it alone."""
    prompts = ["abc", "", "hgf edc " * 9]
    options = {"max_tokens": 70, "precision": precision, "stop": ("ab", "h h"), "n": 3}
    answer = write(
        make_served(documents=documents), make_order(prompts, is_streamed=is_streamed, **options)
    )
    options["n"] = 1
    for number, prompt in enumerate(prompts):
        for choice in range(3):
            expected = reference(documents=documents).generate(
                prompt, choice=choice, seed=7, **options
            )
            text = answer.texts[3 * number + choice]
            assert text.text == expected.text
            assert text.finish == expected.finish_reason
            assert text.tokens == expected.generated_tokens
    assert answer.ended.completion_tokens == sum(text.tokens for text in answer.texts.values())
    assert answer.accepted.prompt_tokens == sum(map(len, prompts))
    assert answer.accepted.seed == 7
    assert answer.accepted.precision == precision


def test_a_request_without_a_seed_gets_one_for_all_its_texts() -> None:
    """The accepted seed writes every prompt's text again."""
    answer = write(make_served(), make_order(["abc", "abc"], seed=None, max_tokens=20))
    seed = answer.accepted.seed
    text = reference().generate("abc", seed=seed, max_tokens=20).text
    assert answer.plain == [text, text]


def test_tokens_are_a_prompt_too() -> None:
    """A list of numbers is continued like the text that they spell."""
    tokens = LETTERS.encode("abc").tolist()
    answer = write(make_served(), make_order([tokens, tokens[:1]], max_tokens=20))
    assert answer.plain == [
        reference().generate(prompt, seed=7, max_tokens=20).text for prompt in ("abc", "a")
    ]


def test_more_texts_than_rows_come_one_after_the_other() -> None:
    """A request for many texts never has more in the making than there are rows."""
    served = make_served(rows=2)
    job = Job(make_order(n=7, max_tokens=5), served, Settings())
    lane = Lane(job.engine)
    job.admit(NOW)
    lane.push(job)
    ended = 0
    while not job.is_over:
        lane.feed(NOW)
        assert job.engine.load.active + job.engine.load.waiting <= 2
        job.engine.step()
        lane.collect(NOW)
        ended += len(job.tell(NOW, 0.0)[0])
    assert ended == 7


def test_choices_share_the_reading_of_a_long_prompt() -> None:
    """However many choices there are, the prompt is read once."""
    served, decoders = make_counted()
    prompt = "abcdefgh " * 50
    answer = write(served, make_order(prompt, n=3, max_tokens=4))
    assert len(set(answer.plain)) > 1
    assert decoders[0].fed < len(prompt) + 200


def test_a_prompt_that_is_known_is_not_read_again() -> None:
    """Tokens that the cache stands for are told, once for all choices."""
    served = make_served()
    prompt = "abcdefgh " * 50
    first = write(served, make_order(prompt, n=2, max_tokens=4))
    again = write(served, make_order(prompt, n=2, max_tokens=4))
    assert first.ended.cached_tokens == 0
    assert again.ended.cached_tokens == len(prompt) - 1
    assert again.plain == first.plain


def test_other_owners_share_no_states() -> None:
    """What one owner's prompt left in the cache does not make another's quicker."""
    served = make_served()
    write(served, make_order("abcdefgh " * 50, owner="one", max_tokens=1))
    other = write(served, make_order("abcdefgh " * 50, owner="two", max_tokens=1))
    assert other.ended.cached_tokens == 0


# Streams


def test_a_stream_tells_each_choice_at_once_and_then_at_its_interval() -> None:
    """The first delta waits for nothing, later ones for the interval, the last for nothing."""
    job = Job(make_order(is_streamed=True, interval=1.0, max_tokens=400), make_served(), Settings())
    lane = Lane(job.engine)
    job.admit(NOW)
    lane.push(job)
    lane.feed(NOW)
    told: list[tuple[float, int]] = []
    now = NOW
    while not job.is_over:
        job.engine.step()
        lane.collect(now)
        told += [(now, delta.tokens) for delta in job.tell(now, 0.0)[0]]
        now += 0.3
    assert told[0] == (NOW, 1)
    gaps = np.diff([moment for moment, _ in told])
    assert (gaps[:-1] >= 1.0).all()
    assert sum(tokens for _, tokens in told) == 400


def test_the_pace_widens_the_interval() -> None:
    """No stream is told more often than the process asks for."""
    job = Job(make_order(is_streamed=True, interval=0.0, max_tokens=100), make_served(), Settings())
    answer = run(job, pace=1.0)
    assert answer.texts[0].deltas == 2


def test_a_text_that_is_not_streamed_is_one_delta() -> None:
    """It comes whole, with its end."""
    answer = write(make_served(), make_order(max_tokens=300))
    assert answer.texts[0].deltas == 1


def test_a_very_long_text_comes_in_several_deltas() -> None:
    """No delta is longer than a message may be, and the last one alone says how it ended."""
    choice = Choice(0, LETTERS, Spelling(LETTERS), top=None)
    choice.add("x" * (TEXT_AT_ONCE + 1), TEXT_AT_ONCE + 1, None)
    choice.end("stop", "y")
    first, is_first_all = choice.tell(1)
    second, is_second_all = choice.tell(1)
    assert (len(first.text), first.finish, is_first_all) == (TEXT_AT_ONCE, None, False)
    assert (second.text, second.finish, second.stop_reason, is_second_all) == (
        "x",
        "stop",
        "y",
        True,
    )


# Echo and log-probabilities


@pytest.mark.parametrize("is_streamed", [False, True])
def test_echo_puts_the_prompt_before_each_text(is_streamed: bool) -> None:
    """Texts and lists of tokens come back as text, before every choice."""
    prompts = ["abc", LETTERS.encode("fed").tolist()]
    order = make_order(prompts, n=2, max_tokens=9, is_echoed=True, is_streamed=is_streamed)
    answer = write(make_served(), order)
    texts = [
        prompt + reference().generate(prompt, seed=7, max_tokens=9, choice=choice).text
        for prompt in ("abc", "fed")
        for choice in range(2)
    ]
    assert answer.plain == texts
    assert all(text.tokens == 9 for text in answer.texts.values())


def test_an_unknown_character_is_echoed_as_it_stood() -> None:
    """A stand-in does not take its place, and one that is left out is not there."""
    replaced = write(make_served(), make_order("aXb", is_echoed=True, unknown="replace"))
    skipped = write(make_served(), make_order("aXb", is_echoed=True, unknown="skip"))
    assert replaced.texts[0].text.startswith("aXb")
    assert skipped.texts[0].text.startswith("ab")


def test_half_a_character_in_a_prompt_is_echoed_as_its_stand_in() -> None:
    """The bytes of a prompt are decoded as the tokenizer decodes them."""
    tokens = [*"é".encode(), "é".encode()[0]]
    answer = write(make_served(BYTES), make_order(tokens, is_echoed=True, max_tokens=0))
    assert answer.plain == [BYTES.decode(tokens)]


@pytest.mark.parametrize("documents", ["none", "lines"])
@pytest.mark.parametrize("tokenizer", [LETTERS, BYTES], ids=["letters", "bytes"])
def test_echo_without_new_tokens_scores_the_prompt(tokenizer: Tokenizer, documents: str) -> None:
    """Echo, logprobs and max_tokens 0 give what `Model.score` gives, from the second token on."""
    prompt = "abcdefgh a\nb" * 5
    order = make_order([prompt, "b"], max_tokens=0, logprobs=3, is_echoed=True)
    answer = write(make_served(tokenizer, documents), order)
    score = reference(tokenizer, documents).score(prompt, top=3)
    length = len(prompt)
    text = answer.texts[0]
    assert text.text == prompt
    assert text.tokens == 0
    assert text.pieces == list(prompt)
    assert text.ids == tokenizer.encode(prompt).tolist()
    assert text.logprobs == [None, *score.logprobs_N[1:length].tolist()]
    assert text.top[0] is None
    assert [[value for _, value in entry] for entry in text.top[1:]] == (
        score.top_logprobs_NT[1:length].tolist()
    )
    assert answer.texts[1].logprobs == [None]
    assert answer.texts[1].text == "b"


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("documents", ["none", "lines"])
def test_log_probabilities_of_a_text_are_the_models(is_streamed: bool, documents: str) -> None:
    """Tokens, log-probabilities and alternatives are those of `Model.generate`, prompt first."""
    order = make_order(
        "abcd" * 12, n=2, max_tokens=12, logprobs=2, is_echoed=True, is_streamed=is_streamed
    )
    answer = write(make_served(documents=documents), order)
    score = reference(documents=documents).score("abcd" * 12, top=2)
    for choice in range(2):
        expected = reference(documents=documents).generate(
            "abcd" * 12, choice=choice, seed=7, max_tokens=12, logprobs=2
        )
        assert expected.logprobs is not None
        text = answer.texts[choice]
        assert text.text == "abcd" * 12 + expected.text
        assert "".join(text.pieces) == text.text
        assert text.ids[48:] == list(expected.tokens)
        assert text.logprobs[48:] == expected.logprobs.logprobs_N.tolist()
        assert text.logprobs[:48] == [None, *score.logprobs_N[1:48].tolist()]
        assert [[value for _, value in entry] for entry in text.top[48:]] == (
            expected.logprobs.top_logprobs_NT.tolist()
        )


def test_log_probabilities_change_no_text() -> None:
    """A text is the same with and without them."""
    plain = write(make_served(), make_order(n=3, max_tokens=30))
    judged = write(make_served(), make_order(n=3, max_tokens=30, logprobs=1))
    echoed = write(make_served(), make_order(n=3, max_tokens=30, logprobs=1, is_echoed=True))
    assert judged.plain == plain.plain
    assert [text.removeprefix("abc") for text in echoed.plain] == plain.plain


def test_a_least_length_is_that_of_the_texts_alone() -> None:
    """A prompt is judged without writing anything, however long the texts have to be."""
    order = make_order(max_tokens=9, min_tokens=9, logprobs=1, is_echoed=True)
    text = write(make_served(), order).texts[0]
    assert text.text.startswith("abc")
    assert text.tokens == 9
    assert len(text.logprobs) == 3 + 9


def test_without_alternatives_each_token_still_has_its_own() -> None:
    """Logprobs 0 asks for the drawn tokens' log-probabilities alone."""
    text = write(make_served(), make_order(max_tokens=6, logprobs=0)).texts[0]
    assert len(text.logprobs) == 6
    assert text.top == [[]] * 6


def test_a_prompt_is_judged_once_for_all_its_choices() -> None:
    """Echoed log-probabilities cost one reading of the prompt, not one per choice."""
    served, decoders = make_counted()
    prompt = "abcdefgh " * 50
    order = make_order(prompt, n=4, max_tokens=3, logprobs=1, is_echoed=True)
    answer = write(served, order)
    assert decoders[0].fed < len(prompt) + 200
    assert len({tuple(text.logprobs[: len(prompt)]) for text in answer.texts.values()}) == 1


def test_a_token_and_the_likeliest_one_have_equal_numbers() -> None:
    """Where the likeliest token was drawn its number equals the first alternative's exactly."""
    text = write(make_served(), make_order(max_tokens=40, temperature=0.5, logprobs=1)).texts[0]
    is_likeliest = [
        piece == entry[0][0] for piece, entry in zip(text.pieces, text.top, strict=True)
    ]
    assert 0 < sum(is_likeliest) < 40
    assert is_likeliest == [
        logprob == entry[0][1] for logprob, entry in zip(text.logprobs, text.top, strict=True)
    ]


def test_many_log_probabilities_come_in_several_deltas() -> None:
    """A long judged text is told bit by bit, and its end with the last of them."""
    served = make_served(BYTES)
    order = make_order("a" * 900, max_tokens=0, logprobs=300, is_echoed=True)
    text = write(served, order).texts[0]
    assert text.deltas > 10
    assert len(text.logprobs) == 900
    assert text.finish == "length"


def test_what_cannot_be_drawn_has_a_number_that_json_can_carry() -> None:
    """Neither infinity nor NaN leaves the engine."""
    assert finite(np.array([-np.inf, np.nan, -1.5])) == [UNLIKELY, UNLIKELY, -1.5]


# The likeliest of several


@given(
    n=st.integers(1, 3),
    more=st.integers(0, 3),
    prompts=st.lists(st.sampled_from(["a", "b c", "hgf " * 20]), min_size=1, max_size=3),
    seed=st.integers(0, 5),
    logprobs=st.sampled_from([None, 1]),
)
def test_best_of_answers_with_the_likeliest_per_token(
    n: int, more: int, prompts: list[str], seed: int, logprobs: int | None
) -> None:
    """They are the ones that brute force over all choices finds, the likeliest first."""
    best_of = n + more
    order = make_order(
        prompts, n=n, best_of=best_of, seed=seed, max_tokens=6, stop=("e",), logprobs=logprobs
    )
    answer = write(_SHARED, order)
    written = 0
    for number, prompt in enumerate(prompts):
        ranked = []
        for choice in range(best_of):
            text = reference().generate(
                prompt, choice=choice, seed=seed, max_tokens=6, stop=("e",), logprobs=0
            )
            assert text.logprobs is not None
            written += text.generated_tokens
            ranked.append((-text.logprobs.logprobs_N.mean(), choice, text.text))
        if best_of > 1:
            ranked.sort()
        texts = [answer.texts[number * n + rank] for rank in range(n)]
        assert [text.text for text in texts] == [text for _, _, text in ranked[:n]]
        assert all(bool(text.logprobs) == (logprobs is not None) for text in texts)
    assert len(answer.texts) == len(prompts) * n
    assert answer.ended.completion_tokens == written


_SHARED = make_served()


# Ends


def test_a_deadline_ends_texts_that_have_no_row_too() -> None:
    """What could not be begun in time ends with "length", the reason and its echo."""
    served = make_served(rows=2)
    job = Job(make_order(n=5, max_tokens=10_000, timeout=5.0, is_echoed=True), served, Settings())
    lane = Lane(job.engine)
    job.admit(NOW)
    lane.push(job)
    lane.feed(NOW)
    assert job.has_more
    lane.feed(NOW + 4.9)
    assert job.has_more
    lane.feed(NOW + 5.0)
    assert not job.has_more
    assert job.result == "deadline"
    told = job.tell(NOW, 0.0)[0]
    assert [(delta.index, delta.text, delta.finish, delta.stop_reason) for delta in told] == [
        (index, "abc", "length", "deadline") for index in (2, 3, 4)
    ]


@pytest.mark.parametrize("options", [{}, {"is_streamed": True}, {"logprobs": 1, "is_echoed": True}])
def test_no_time_is_no_text(options: Any) -> None:
    """A request whose time is up from the first still gets all its ends."""
    order = make_order(["abc", "d"], n=3, max_tokens=10, timeout=0.0, **options)
    answer = write(make_served(rows=2), order)
    assert len(answer.texts) == 6
    assert {text.stop_reason for text in answer.texts.values()} == {"deadline"}
    assert {text.finish for text in answer.texts.values()} == {"length"}
    assert answer.ended.problem is None


def test_best_of_answers_at_the_deadline_too() -> None:
    """Choices that were never begun are the last to be chosen."""
    answer = write(make_served(), make_order(n=2, best_of=4, max_tokens=9, timeout=0.0))
    assert sorted(answer.texts) == [0, 1]


def test_cancelling_tells_nothing_but_the_end() -> None:
    """What was written and not told yet is dropped, and the engine is left empty."""
    served = make_served(rows=2)
    job = Job(make_order(n=6, max_tokens=1000, is_streamed=True), served, Settings())
    lane = Lane(job.engine)
    job.admit(NOW)
    lane.push(job)
    for _ in range(3):
        lane.feed(NOW)
        job.engine.step()
        lane.collect(NOW)
    job.cancel()
    lane.remove(job)
    assert job.tell(NOW, 0.0) == ([], 0)
    assert not job.is_over
    job.engine.step()
    lane.collect(NOW)
    assert job.is_over
    assert lane.is_empty
    assert job.engine.load.active == 0
    assert job.ended().is_cancelled
    assert job.result == "cancelled"


def test_a_failing_step_ends_the_request_without_its_words() -> None:
    """What the runtime said is for the log."""
    answer = write(make_served(wrap=Broken), make_order(n=3, max_tokens=10))
    problem = answer.ended.problem
    assert problem is not None
    assert (problem.status, problem.code) == (500, "decoding_failed")
    assert "secret" not in problem.message


@pytest.mark.parametrize("is_failing", [False, True])
def test_text_held_back_by_what_is_stopped_is_not_told(is_failing: bool) -> None:
    """Its pieces come with its outcome, when the job is over: nothing of it stays."""
    job = Job(
        make_order(n=2, max_tokens=40, stop=("zzz",), is_streamed=True), make_served(), Settings()
    )
    job.admit(NOW)
    one, other = job.start(NOW), job.start(NOW)
    if is_failing:
        job.take(other, [outcome(error=RuntimeError("broken"))], NOW)
    else:
        job.cancel()
        job.take(other, [outcome(ending="cancelled")], NOW)
    job.take(one, [Piece(text="zz", tokens=[5], logprobs=None), outcome(ending="cancelled")], NOW)
    assert not job.has_news
    assert job.is_over


def outcome(ending: Ending = "failed", error: BaseException | None = None) -> Outcome:
    """The end of a text of which nothing else is known."""
    return Outcome(
        ending=ending,
        text="",
        tokens=[],
        stop=None,
        cached_tokens=0,
        prompt_scores=None,
        logprobs=None,
        error=error,
    )


def test_texts_that_wait_for_a_failed_one_wait_no_longer() -> None:
    """They were to go on from the prompt that it did not read to its end."""
    job = Job(make_order("abc" * 20, n=3, max_tokens=9), make_served(wrap=Broken), Settings())
    lane = Lane(job.engine)
    job.admit(NOW)
    lane.push(job)
    for _ in range(3):
        lane.feed(NOW)
        job.engine.step()
        lane.collect(NOW)
    assert job.is_over
    assert lane.is_empty


@pytest.mark.parametrize(
    ("bias", "expected"),
    [(None, (500, "model_damaged", None)), ({"a": 1.0}, (400, None, "logit_bias"))],
    ids=["plain", "biased"],
)
def test_a_damaged_model_is_said_to_be_one(bias: Any, expected: Any) -> None:
    """Where no token is left to draw the weights are to blame, or a bias, which is named."""
    sound = make_checkpoint(LETTERS)
    nothing = np.full(LETTERS.vocabulary_size, -np.inf, np.float32)
    tensors = {**sound.tensors, "output.bias": nothing}
    order = make_order(logit_bias=bias, precision="float32")
    damaged = make_served(checkpoint=replace(sound, tensors=tensors))
    problem = write(damaged, order).ended.problem
    assert problem is not None
    assert (problem.status, problem.code, problem.param) == expected


# What is refused


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([], "prompt is an empty list"),
        (["abc", []], "prompt 1 is an empty list of tokens"),
        ([[2, 99]], "99 at index 1"),
        ([[-1]], "-1 at index 0"),
        ([[2**63 + 1]], "prompt"),
        (["abX"], "'X' (U+0058) at position 2"),
        (["a", "X"], "prompt 1"),
        (["a"] * (PROMPTS_LIMIT + 1), f"at most {PROMPTS_LIMIT}"),
    ],
    ids=["none", "no tokens", "beyond", "negative", "huge", "unknown", "second", "many"],
)
def test_a_prompt_that_cannot_be_read_is_refused_by_name(prompts: Any, words: str) -> None:
    """The sentence says which prompt, and what of it."""
    order = Submit(id=1, model="demo", prompts=prompts, params=SamplingParams(max_tokens=1))
    problem = refusal(order)
    assert (problem.status, problem.param) == (400, "prompt")
    assert words in problem.message
    assert "command line" not in problem.message


def test_of_many_biases_that_are_wrong_a_few_are_told() -> None:
    """A refusal stays a few sentences however much is wrong with the request."""
    problem = refusal(make_order(logit_bias=dict.fromkeys(range(1000, 1000 + BIASES_LIMIT), 1.0)))
    assert (problem.status, problem.param) == (400, "logit_bias")
    assert f"There are {BIASES_LIMIT - TOLD} more problems." in problem.message
    assert problem.message.startswith(
        "logit_bias names 1000, which is no token of this model; give numbers from 0 to "
    )
    assert "text" not in problem.message


def test_a_bias_on_what_is_no_token_is_refused_by_name() -> None:
    """The model's own sentence comes with the field."""
    problem = refusal(make_order(logit_bias={"abc": 1.0}))
    assert (problem.status, problem.param) == (400, "logit_bias")


@pytest.mark.parametrize(
    ("options", "cost"),
    [
        ({"max_tokens": 10, "n": 3}, 2 * 3 * 10 + 6),
        ({"max_tokens": 10, "best_of": 4}, 2 * 4 * 10 + 6),
        ({"max_tokens": 0}, 6),
        ({"max_tokens": 0, "n": 3, "is_echoed": True}, 3 * 6),
    ],
)
def test_work_is_prompts_and_all_that_may_be_written(options: Any, cost: int) -> None:
    """A request that may cost more than the setting is refused, one that may not is not."""
    order = make_order(["abc", "def"], **options)
    assert Job(order, make_served(), Settings(work=cost)).cost == cost
    problem = refusal(order, work=cost - 1)
    assert (problem.status, problem.code) == (400, "too_much_work")
    assert str(cost) in problem.message


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"n": TEXTS_LIMIT + 1, "max_tokens": 0}, "n"),
        ({"max_tokens": NUMBERS_LIMIT // 3, "logprobs": 2}, "logprobs"),
        ({"max_tokens": NUMBERS_LIMIT, "logprobs": 0}, "logprobs"),
    ],
)
def test_cheap_texts_and_dear_answers_have_a_limit_too(options: Any, param: str) -> None:
    """Neither endless empty texts nor endless log-probabilities are admitted."""
    problem = refusal(make_order(**options), work=2 * NUMBERS_LIMIT)
    assert (problem.status, problem.param, problem.code) == (400, param, "too_much_work")
    assert ("fewer alternatives" in problem.message) == (options.get("logprobs", 0) > 0)


def test_the_services_precision_is_that_of_requests_that_ask_for_none() -> None:
    """A setting decides about "auto", and only about that."""
    settings = Settings(precision="float32")
    served = make_served(settings=settings)
    assert Job(make_order(), served, settings).arithmetic == "float32"
    assert Job(make_order(precision="int8"), served, settings).arithmetic == "int8"


# Lanes


def test_owners_take_turns() -> None:
    """Another owner's request does not wait for all of a large one."""
    served = make_served(rows=1)
    lane = Lane(served.model.engine("auto"))
    jobs = [
        Job(make_order(n=50, max_tokens=2, owner="large"), served, Settings()),
        Job(make_order(n=50, max_tokens=2, owner="large"), served, Settings()),
        Job(make_order(max_tokens=2, owner="small"), served, Settings()),
    ]
    for job in jobs:
        job.admit(NOW)
        lane.push(job)
    steps = 0
    while not jobs[2].is_over:
        lane.feed(NOW)
        lane.engine.step()
        lane.collect(NOW)
        jobs[2].tell(NOW, 0.0)
        steps += 1
    assert steps <= 5
    assert not jobs[0].is_over


def test_a_prompt_being_read_leaves_other_rows_to_others() -> None:
    """Choices that wait for their long prompt hold no row that another job could have."""
    served = make_served(rows=4)
    lane = Lane(served.model.engine("auto"))
    long = Job(make_order("abcdefgh" * 400, n=4, max_tokens=2, owner="long"), served, Settings())
    short = Job(make_order("a", max_tokens=2, owner="short"), served, Settings())
    for job in (long, short):
        job.admit(NOW)
        lane.push(job)
    rounds = 0
    while not short.is_over:
        lane.feed(NOW)
        lane.engine.step()
        lane.collect(NOW)
        short.tell(NOW, 0.0)
        rounds += 1
    assert rounds <= 3
    assert long.completion_tokens == 0
    while not long.is_over:
        lane.feed(NOW)
        lane.engine.step()
        lane.collect(NOW)
        long.tell(NOW, 0.0)
    assert lane.is_empty


def test_a_job_waits_until_its_first_text_has_a_row() -> None:
    """The lane knows how many jobs wait, and how many more would not."""
    served = make_served(rows=2)
    lane = Lane(served.model.engine("auto"))
    jobs = [Job(make_order(max_tokens=9), served, Settings()) for _ in range(4)]
    rooms = []
    for job in jobs:
        rooms.append(lane.room)
        job.admit(NOW)
        lane.push(job)
        lane.feed(NOW)
    assert rooms == [2, 1, 0, 0]
    assert lane.waiting == 2
    assert [job.is_waiting for job in jobs] == [False, False, True, True]
