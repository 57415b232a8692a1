"""One promise on the real decoder, in both arithmetics: the same request gives the same bytes."""

import json
import runpy
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from charloom.architecture import Architecture, Cell
from charloom.checkpoint import Checkpoint
from charloom.cli import main
from charloom.cli.judgements import judgements
from charloom.decoding.decoder import GraphDecoder, Kernel, choose_kernel
from charloom.decoding.request import Handle, Piece, Prompt, Request
from charloom.model import Generation, Model, Stream
from charloom.params import SEED_LIMIT, SamplingParams
from charloom.tokenizer import ByteTokenizer, CharacterTokenizer, Tokenizer

pytestmark = pytest.mark.slow

save = runpy.run_path(str(Path(__file__).parent / "tiny_model.py"))["save"]
LETTERS = "abcdefgh \n"

CROWD = 64
"""Texts written together, of which one looks at one or a few."""

Precise = Literal["float32", "int8"]

KINDS: dict[str, tuple[Cell, int, int, Tokenizer, str]] = {
    "lstm of characters": ("lstm", 2, 48, CharacterTokenizer(LETTERS), "none"),
    "gru of bytes, lines": ("gru", 2, 48, ByteTokenizer(), "lines"),
    "rnn of bytes": ("rnn", 1, 41, ByteTokenizer(), "none"),
    # So many that top-k and top-p look at some of them alone.
    "lstm of many characters": (
        "lstm",
        1,
        24,
        CharacterTokenizer(LETTERS + "".join(map(chr, range(0x4E00, 0x4E00 + 700)))),
        "none",
    ),
}

everywhere = pytest.mark.parametrize("precision", ["float32", "int8"])
of_all_kinds = pytest.mark.parametrize("kind", list(KINDS))


@cache
def make_checkpoint(kind: str) -> Checkpoint:
    """A small random network."""
    cell, layers, hidden, tokenizer, documents = KINDS[kind]
    architecture = Architecture(
        cell=cell,
        vocabulary=tokenizer.vocabulary_size,
        embedding=16,
        hidden=hidden,
        layers=layers,
    )
    rng = np.random.default_rng(1)
    return Checkpoint(
        path=Path("memory"),
        architecture=architecture,
        tokenizer=tokenizer,
        tensors={
            name: rng.uniform(-0.5, 0.5, shape).astype(np.float32)
            for name, shape in architecture.tensor_shapes().items()
        },
        token_counts=rng.integers(1, 50, tokenizer.vocabulary_size),
        documents=documents,
        summary={},
        fingerprint="0" * 64,
    )


@cache
def make_decoder(kind: str, kernel: Kernel) -> GraphDecoder:
    """The real decoder, made once, for models that are used one at a time."""
    return GraphDecoder(make_checkpoint(kind), kernel, capacity=4, threads=1)


class Counted(GraphDecoder):
    """The real decoder for a crowd; `fed` says how many rows each step had."""

    def __init__(self, kind: str, kernel: Kernel) -> None:
        self.fed: list[int] = []
        super().__init__(make_checkpoint(kind), kernel, capacity=CROWD, threads=1)

    def step(self, tokens_B: NDArray[np.int32]) -> NDArray[np.float32]:
        """Feed a token to each of the first rows."""
        self.fed.append(len(tokens_B))
        return super().step(tokens_B)


make_counted_decoder = cache(Counted)


def make_lonely_model(kind: str) -> Model:
    """A model whose cache is empty and whose engine has nothing else to do."""
    return Model(make_checkpoint(kind), make_decoder=lambda kernel: make_decoder(kind, kernel))


@cache
def make_model(kind: str, threads: int) -> Model:
    """A model as it is loaded; what earlier tests have left in its cache stays there."""
    return Model(make_checkpoint(kind), threads=threads)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """All that a text depends on, beside the model."""

    prompt: str
    params: SamplingParams
    choice: int

    def request(self, model: Model, is_streamed: bool) -> Request:
        """The same as the engine is asked it."""
        assert self.params.seed is not None
        return Request(
            prompt=Prompt(model.tokenizer.encode(self.prompt, unknown=self.params.unknown)),
            params=self.params,
            seed=self.params.seed,
            choice=self.choice,
            bias_V=model.bias(self.params),
            is_streamed=is_streamed,
        )


def ask(model: Model, asked: Asked) -> Generation:
    """The text, whole."""
    return model.generate(asked.prompt, asked.params, choice=asked.choice)


def ask_alone(kind: str, asked: Asked) -> Generation:
    """The text that is to be the same everywhere."""
    return ask(make_lonely_model(kind), asked)


PROMPTS = st.one_of(
    st.text(LETTERS, max_size=12),
    # Longer than the strides at which a text's states are kept.
    st.builds(
        lambda text, length: (text * 600)[:length],
        st.text(LETTERS, min_size=1, max_size=5),
        st.integers(30, 400),
    ),
)
SHARES = st.floats(0.05, 1.0)


def some(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """None or a value."""
    return st.none() | strategy


def requests(precision: Precise, *, stop: bool = True) -> st.SearchStrategy[Asked]:
    """Any request; every other one has such options as a row that is alone draws by lists."""
    lengths = st.integers(0, 40)
    plain = st.builds(
        SamplingParams,
        max_tokens=lengths,
        temperature=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
        top_p=some(SHARES),
        min_p=some(st.floats(0.0, 0.3)),
        ignore_eos=st.booleans(),
        seed=st.integers(0, SEED_LIMIT - 1),
        precision=st.just(precision),
    )
    params = plain | st.builds(
        lambda first, second, **options: SamplingParams(
            min_tokens=min(first, second), max_tokens=max(first, second), **options
        ),
        first=st.just(0) | lengths,
        second=lengths,
        include_stop_str_in_output=st.booleans(),
        ignore_eos=st.booleans(),
        temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
        top_k=some(st.integers(1, 12) | st.integers(1, 900)),
        top_p=some(SHARES),
        min_p=some(st.floats(0.0, 0.3)),
        typical_p=some(SHARES),
        repetition_penalty=some(st.floats(0.5, 2.0)),
        frequency_penalty=some(st.floats(-1.0, 1.0)),
        presence_penalty=some(st.floats(-1.0, 1.0)),
        logit_bias=some(st.dictionaries(st.sampled_from("abc "), st.floats(-5, 5), max_size=3)),
        logprobs=some(st.integers(0, 3)),
        seed=st.integers(0, SEED_LIMIT - 1),
        stop=st.lists(st.text(LETTERS, min_size=1, max_size=2), max_size=2).map(tuple)
        if stop
        else st.just(()),
        precision=st.just(precision),
    )
    return st.builds(
        Asked, prompt=PROMPTS, params=params, choice=st.sampled_from([0, 1, 2, 77, 2**32 - 1])
    )


def make_crowd(model: Model, precision: Precise, rng: np.random.Generator) -> Iterator[Stream]:
    """Texts of all sorts under way in a model."""
    while True:
        yield model.stream(
            "".join(rng.choice(list(LETTERS), rng.integers(0, 20))),
            max_tokens=int(rng.integers(0, 60)),
            temperature=float(rng.uniform(0, 2)),
            top_k=None if rng.random() < 0.7 else int(rng.integers(1, 400)),
            top_p=None if rng.random() < 0.5 else float(rng.choice([0.5, 0.9, 0.9999])),
            min_p=None if rng.random() < 0.8 else 0.01,
            typical_p=None if rng.random() < 0.7 else float(rng.uniform(0.1, 1)),
            repetition_penalty=None if rng.random() < 0.5 else 1.3,
            logit_bias=None if rng.random() < 0.5 else {"a": 2.0},
            ignore_eos=bool(rng.random() < 0.3),
            logprobs=None if rng.random() < 0.5 else 1,
            precision=precision,
        )


@everywhere
@of_all_kinds
@given(data=st.data())
@settings(max_examples=8)
def test_alone_and_in_a_crowd(kind: str, precision: Precise, data: st.DataObject) -> None:
    """Among 63 others at every step, which come and go, a request gets the text it gets alone."""
    asked = data.draw(st.lists(requests(precision), min_size=1, max_size=6), "asked")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "crowd"))
    expected = [ask_alone(kind, one) for one in asked]
    decoder = make_counted_decoder(kind, choose_kernel(precision))
    decoder.fed.clear()
    model = Model(make_checkpoint(kind), own_thread=False, make_decoder=lambda _: decoder)
    engine = model.engine(precision)
    crowd = make_crowd(model, precision, rng)
    others: list[Stream] = []
    handles: list[Handle] = []
    pieces: dict[Handle, str] = {}
    while len(others) < 2 * CROWD or any(handle.outcome is None for handle in handles):
        # More than there are rows, as some have nothing to write and never take one.
        while engine.load.active + engine.load.waiting < CROWD + 20:
            others.append(next(crowd))
        if len(handles) < len(asked):
            handles.append(engine.submit(asked[len(handles)].request(model, rng.random() < 0.5)))
        if rng.random() < 0.3:
            others[-int(rng.integers(1, CROWD))].close()
        engine.step()
        for handle in handles:
            told = [event.text for event in handle.take() if isinstance(event, Piece)]
            pieces[handle] = pieces.get(handle, "") + "".join(told)
    assert set(decoder.fed) == {CROWD}
    engine.close()
    for handle, result in zip(handles, expected, strict=True):
        outcome = handle.result()
        assert (outcome.text, tuple(outcome.tokens)) == (result.text, result.tokens)
        assert (outcome.ending, outcome.logprobs) == (result.finish_reason, result.logprobs)
        assert pieces[handle] in ("", result.text)


@everywhere
@of_all_kinds
@given(data=st.data())
@settings(max_examples=12)
def test_streamed_kept_or_in_two_threads(
    kind: str, precision: Precise, data: st.DataObject
) -> None:
    """Whole or in pieces, prompt read or remembered in part or whole, with one thread or two."""
    asked = data.draw(requests(precision), "asked")
    expected = ask_alone(kind, asked)
    model = make_lonely_model(kind)
    cut = data.draw(st.integers(0, len(asked.prompt)), "cut")
    model.generate(asked.prompt[:cut], max_tokens=3, seed=0, precision=precision)
    assert ask(model, asked) == expected  # from what was kept of its beginning
    assert ask(model, asked) == expected  # from what was kept of all of it
    stream = make_model(kind, 2).stream(asked.prompt, asked.params, choice=asked.choice)
    assert "".join(stream) == expected.text
    assert stream.result() == expected
    assert ask(make_model(kind, 2), asked) == expected


@everywhere
@of_all_kinds
@given(data=st.data())
@settings(max_examples=8)
def test_branched_from_a_prompt_read_once(
    kind: str, precision: Precise, data: st.DataObject
) -> None:
    """Choice k of several, among others, is the text that is asked for as choice k."""
    asked = data.draw(requests(precision), "asked")
    count = data.draw(st.integers(1, 9), "count")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "crowd"))
    model = make_model(kind, 1)
    crowd = make_crowd(model, precision, rng)
    others = [next(crowd) for _ in range(20)]
    choices = list(model.choices(asked.prompt, replace(asked.params, n=count)))
    assert choices == [ask_alone(kind, replace(asked, choice=k)) for k in range(count)]
    for other in others:
        if rng.random() < 0.3:
            other.close()
        else:
            other.result()


@everywhere
@of_all_kinds
@given(data=st.data())
@settings(max_examples=20)
def test_continued_from_its_own_beginning(
    kind: str, precision: Precise, data: st.DataObject
) -> None:
    """A prompt that holds the beginning of a text gives the rest of it, probabilities included."""
    asked = data.draw(requests(precision, stop=False), "asked")
    whole = ask_alone(kind, asked)
    cut = data.draw(st.integers(0, len(whole.text)), "cut")
    begun = len(make_checkpoint(kind).tokenizer.encode(whole.text[:cut]))
    rest = ask_alone(
        kind,
        Asked(
            prompt=asked.prompt + whole.text[:cut],
            params=replace(
                asked.params,
                max_tokens=asked.params.max_tokens - begun,
                min_tokens=max(asked.params.min_tokens - begun, 0),
            ),
            choice=asked.choice,
        ),
    )
    assert (rest.text, rest.tokens) == (whole.text[cut:], whole.tokens[begun:])
    assert rest.finish_reason == whole.finish_reason
    assert rest.logprobs == (
        whole.logprobs[begun:] if whole.logprobs is not None and rest.tokens else None
    )


@of_all_kinds
def test_asked_from_many_threads_at_the_same_time(kind: str) -> None:
    """Callers that share a model, in both arithmetics at once, get what each gets alone."""
    rng = np.random.default_rng(0)
    asked = [
        Asked(
            prompt=LETTERS * int(rng.integers(1, 4)),
            params=SamplingParams(
                max_tokens=int(rng.integers(1, 60)),
                seed=int(rng.integers(SEED_LIMIT)),
                top_p=0.9,
                logprobs=1,
                precision="int8" if index % 2 else "float32",
            ),
            choice=0,
        )
        for index in range(48)
    ]
    model = make_model(kind, 1)
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda one: ask(model, one), asked))
    assert together == [ask_alone(kind, one) for one in asked]


@everywhere
@of_all_kinds
def test_asked_on_the_command_line(kind: str, precision: Precise, tmp_path: Path) -> None:
    """A process of its own, with another number of threads, writes what Python gives."""
    save(make_checkpoint(kind), tmp_path / "tiny")
    prompts = ["", "abc", "a b c d e f g h " * 40, "hgf"]
    options = {"max-tokens": "60", "temperature": "0.9", "top-p": "0.95", "seed": "12345"}
    options |= {"repetition-penalty": "1.1", "logprobs": "2", "precision": precision}
    program = "from charloom.cli import main; main(prog_name='charloom')"
    result = subprocess.run(
        [sys.executable, "-c", program, "--models", str(tmp_path), "sample", "tiny"]
        + ["--interactive", "--json", "-n", "3", "--threads", "2", "--logit-bias", "a=1.5"]
        + [part for name, value in options.items() for part in (f"--{name}", value)],
        input="".join(f"{prompt}\n" for prompt in prompts).encode(),
        capture_output=True,
        check=True,
    )
    params = SamplingParams(
        max_tokens=60,
        temperature=0.9,
        top_p=0.95,
        seed=12345,
        repetition_penalty=1.1,
        logprobs=2,
        precision=precision,
        logit_bias={"a": 1.5},
    )
    lines = result.stdout.decode().splitlines()
    assert len(lines) == 12
    tokenizer = make_checkpoint(kind).tokenizer
    for index, line in enumerate(map(json.loads, lines)):
        prompt, choice = prompts[index // 3], index % 3
        expected = ask_alone(kind, Asked(prompt=prompt, params=params, choice=choice))
        assert expected.logprobs is not None
        assert line["text"] == expected.text
        assert line["finish_reason"] == expected.finish_reason
        assert line["precision"] == expected.precision == precision
        assert line["logprobs"] == judgements(expected.logprobs, tokenizer)


def test_ten_thousand_choices_come_in_order(tmp_path: Path) -> None:
    """`-n 10000 --json` writes every choice at its index, as `generate` gives it."""
    kind, count = "lstm of characters", 10_000
    save(make_checkpoint(kind), tmp_path / "tiny")
    options = ["--seed", "7", "--max-tokens", "3", "-n", str(count), "--json"]
    result = CliRunner().invoke(main, ["--models", str(tmp_path), "sample", "tiny", "ab", *options])
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["choice"] for line in lines] == list(range(count))
    params = SamplingParams(seed=7, max_tokens=3)
    for choice in (0, 1, 255, 256, 257, 511, 512, 513, 5000, count - 1):
        alone = ask_alone(kind, Asked(prompt="ab", params=params, choice=choice))
        assert lines[choice]["text"] == alone.text
