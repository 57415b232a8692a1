"""Frames: any cutting of the bytes gives the same messages, and bytes that are none are refused."""

import contextlib
import time
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from charloom.params import SamplingParams
from service import frames
from service.errors import Problem, invalid
from service.frames import FrameError, FrameReader, FrameTooLongError
from service.messages import (
    FRAME_LIMIT,
    Accepted,
    Answer,
    Cancel,
    Delta,
    Deltas,
    Embeddings,
    Ended,
    FromEngine,
    FromWorker,
    Hello,
    Judged,
    Question,
    Refused,
    Status,
    Submit,
    Tally,
    Tokenise,
    TurnedAway,
    Welcome,
)

WORKER: list[FromWorker] = [
    Hello(version=1, pid=7),
    Submit(
        id=1,
        model="demo",
        prompts=["Ωmega 𝄞", [3, 1, 4]],
        params=SamplingParams(temperature=0.0, stop=("\n",), logit_bias={"e": -5.0, 3: 1.5}),
        is_streamed=True,
    ),
    Cancel(id=1),
    Question(id=2, ask=Tokenise(model="demo", texts=["", "a"])),
    Tally(answers=[("/v1/completions", "POST", 200, 0.25)]),
    Tally(
        answers=[("/v1/score", "POST", 503, 0.25)],
        refusals=[TurnedAway(code="draining", is_request=False)],
    ),
]

ENGINE: list[FromEngine] = [
    Welcome(version=1, pid=8),
    Accepted(
        id=1,
        created=1_700_000_000,
        model="demo",
        fingerprint="ab" * 32,
        precision="int8",
        seed=2**53 - 1,
        prompt_tokens=10,
    ),
    Refused(id=2, problem=invalid("max_tokens is -1; give 0 or more.", "max_tokens").problem),
    Deltas(
        parts=[
            Delta(
                id=1,
                index=0,
                text="𝄞\0",
                tokens=2,
                judged=Judged(
                    tokens=["𝄞", "\0"],
                    ids=[5, 0],
                    logprobs=[-0.5, None],
                    top=[[("𝄞", -0.5), ("a", -2.0)], None],
                ),
                finish="stop",
                stop_reason="\n",
            ),
            Delta(id=1, index=1, text="", tokens=0),
        ]
    ),
    Ended(id=1, completion_tokens=2),
    Answer(
        id=3,
        body=Embeddings(
            model="demo", fingerprint="ab", precision="int8", vectors=[b"\0\xff" * 300], tokens=1
        ),
    ),
    Answer(id=4, body=Status(active=0, waiting=0, queue=128, models=1, step_age=0.0)),
]


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """The bytes in parts that end at these places."""
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


@given(st.lists(st.sampled_from(ENGINE), max_size=8), st.lists(st.integers(0, 2**16), max_size=40))
def test_any_cutting_of_the_stream_gives_the_same_messages(
    sent: list[FromEngine], places: list[int]
) -> None:
    """However a stream of frames is cut into reads, its messages arrive whole and in order."""
    reader: FrameReader[FromEngine] = FrameReader(FromEngine)
    got: list[FromEngine] = []
    for part in cut(b"".join(map(frames.encode, sent)), places):
        got += reader.push(part)
    assert got == sent


def test_each_message_returns_as_it_was() -> None:
    """Every message of a worker arrives equal to what was sent, byte by byte of reading."""
    reader: FrameReader[FromWorker] = FrameReader(FromWorker)
    got: list[FromWorker] = []
    for byte in b"".join(map(frames.encode, WORKER)):
        got += reader.push(bytes([byte]))
    assert got == WORKER


def test_a_message_is_given_by_the_read_that_completes_it() -> None:
    """No message waits for bytes after its own last one."""
    reader: FrameReader[FromEngine] = FrameReader(FromEngine)
    data = frames.encode(ENGINE[0])
    assert reader.push(data[:-1]) == []
    assert reader.push(data[-1:]) == [ENGINE[0]]
    assert reader.push(data) == [ENGINE[0]]


def test_time_grows_with_the_bytes_only() -> None:
    """200,000 small frames in one read, and 8 MB in reads of 64 bytes, are no work for minutes."""
    started = time.monotonic()
    small: FrameReader[FromWorker] = FrameReader(FromWorker)
    assert len(small.push(frames.encode(Cancel(id=1)) * 200_000)) == 200_000

    large = frames.encode(Question(id=1, ask=Tokenise(model="demo", texts=["a" * (8 << 20)])))
    reader: FrameReader[FromWorker] = FrameReader(FromWorker)
    count = sum(len(reader.push(large[at : at + 64])) for at in range(0, len(large), 64))
    assert count == 1
    # A copy of the rest at each read would move half a terabyte.
    assert time.monotonic() - started < 30


def test_a_frame_beyond_the_limit_is_refused_by_its_length() -> None:
    """The limit is checked when the length is read, before any memory is taken for it."""
    reader: FrameReader[FromWorker] = FrameReader(FromWorker)
    with pytest.raises(FrameError, match=f"{FRAME_LIMIT + 1} bytes was announced"):
        reader.push((FRAME_LIMIT + 1).to_bytes(4, "big"))


def test_a_message_beyond_the_limit_is_not_sent() -> None:
    """A sender is told that its message is too long, rather than cut off by the reader."""
    message = Question(id=1, ask=Tokenise(model="demo", texts=["a" * FRAME_LIMIT]))
    with pytest.raises(FrameTooLongError, match=f"send at most {FRAME_LIMIT}"):
        frames.encode(message)


@pytest.mark.parametrize("params", [SamplingParams(top_k=2**70), SamplingParams(stop=("\ud800",))])
def test_a_value_without_encoding_is_named_as_such(params: SamplingParams) -> None:
    """Numbers beyond 64 bits and lone surrogates give the error that senders expect."""
    with pytest.raises(FrameError, match="cannot be passed on") as caught:
        frames.encode(Submit(id=1, model="demo", prompts=["a"], params=params))
    assert not isinstance(caught.value, FrameTooLongError)


@given(st.binary(max_size=60))
def test_bytes_that_are_no_message_raise_nothing_else(body: bytes) -> None:
    """Whatever a frame holds, reading it gives messages or a FrameError."""
    reader: FrameReader[FromWorker] = FrameReader(FromWorker)
    with contextlib.suppress(FrameError):
        assert len(reader.push(len(body).to_bytes(4, "big") + body)) == 1


def test_endless_nesting_is_refused() -> None:
    """A frame nested deeper than Python's stack is refused like any other that is no message."""
    body = b"\x82\xa4type\xa6Cancel\xa1x" + b"\x91" * 1_000_000 + b"\x01"
    reader: FrameReader[FromWorker] = FrameReader(FromWorker)
    with pytest.raises(FrameError, match="no message"):
        reader.push(len(body).to_bytes(4, "big") + body)


def test_a_message_of_the_other_side_is_refused() -> None:
    """A worker's message is none of an engine's."""
    reader: FrameReader[FromEngine] = FrameReader(FromEngine)
    with pytest.raises(FrameError, match="no message"):
        reader.push(frames.encode(Cancel(id=1)))


def test_options_beyond_their_limits_are_refused() -> None:
    """Sampling options are checked again where they arrive."""
    data = frames.encode(
        Submit(id=1, model="demo", prompts=["a"], params=SamplingParams(temperature=0.5))
    )
    number = msgspec.msgpack.encode(0.5)
    assert data.count(number) == 1
    reader: FrameReader[FromWorker] = FrameReader(FromWorker)
    with pytest.raises(FrameError, match=r"temperature is -0\.5; .*[^.]\.$"):
        reader.push(data.replace(number, msgspec.msgpack.encode(-0.5)))


def test_a_problem_keeps_all_its_fields() -> None:
    """What a client is told survives the socket unchanged."""
    problem = Problem(
        status=429, type="rate_limit_error", code="x", message="Wait.", retry_after=0.5
    )
    reader: FrameReader[FromEngine] = FrameReader(FromEngine)
    (refused,) = reader.push(frames.encode(Refused(id=9, problem=problem)))
    assert refused == Refused(id=9, problem=problem)
