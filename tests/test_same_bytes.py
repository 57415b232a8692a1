"""One promise on the real decoder, in both arithmetics: the same request gives the same bytes."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
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

from charloom.architecture import Architecture, Cell
from charloom.checkpoint import Checkpoint, ModelWriter
from charloom.cli import main
from charloom.cli.judgements import judgements
from charloom.decoding.decoder import GraphDecoder, Kernel
from charloom.model import Generation, Model
from charloom.params import SEED_LIMIT, SamplingParams
from charloom.tokenizer import ByteTokenizer, CharacterTokenizer, Tokenizer

pytestmark = pytest.mark.slow

LETTERS = "abcdefgh \n"

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


def make_crowd(
    model: Model, precision: Precise, rng: np.random.Generator
) -> Iterator[Callable[[], None]]:
    """Texts of all sorts under way in a model; each that is given can be got rid of."""
    while True:
        stream = model.stream(
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
        yield stream.close if rng.random() < 0.3 else lambda stream=stream: stream.result() and None


@everywhere
@of_all_kinds
@given(data=st.data())
@settings(max_examples=8)
def test_alone_and_in_a_crowd(kind: str, precision: Precise, data: st.DataObject) -> None:
    """Among 63 others, which come and go at random, a request gets the text it gets alone."""
    asked = data.draw(st.lists(requests(precision), min_size=1, max_size=6), "asked")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "crowd"))
    expected = [ask_alone(kind, one) for one in asked]
    model = make_model(kind, 1)
    crowd = make_crowd(model, precision, rng)
    others = [next(crowd) for _ in range(30)]
    streams = []
    for one in asked:
        streams.append(model.stream(one.prompt, one.params, choice=one.choice))
        others += [next(crowd) for _ in range(rng.integers(0, 6))]
        rng.shuffle(others)
        others.pop()()
    others += [next(crowd) for _ in range(63 - len(others))]
    assert [ask(model, one) for one in asked] == expected
    assert ["".join(stream) for stream in streams] == [result.text for result in expected]
    assert [stream.result() for stream in streams] == expected
    for finish in others:
        finish()


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
    for finish in others:
        finish()


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


def save(kind: str, folder: Path) -> None:
    """Write a model's folder under a name of its own."""
    checkpoint = make_checkpoint(kind)
    with ModelWriter(folder / "tiny", mode="new") as writer:
        writer.commit(
            architecture=checkpoint.architecture,
            tokenizer=checkpoint.tokenizer,
            tensors=checkpoint.tensors,
            token_counts=checkpoint.token_counts,
            documents=checkpoint.documents,
            summary={},
            trainer=None,
        )


@everywhere
@of_all_kinds
def test_asked_on_the_command_line(kind: str, precision: Precise, tmp_path: Path) -> None:
    """A process of its own, with another number of threads, writes what Python gives."""
    save(kind, tmp_path)
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
    save(kind, tmp_path)
    options = ["--seed", "7", "--max-tokens", "3", "-n", str(count), "--json"]
    result = CliRunner().invoke(main, ["--models", str(tmp_path), "sample", "tiny", "ab", *options])
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["choice"] for line in lines] == list(range(count))
    params = SamplingParams(seed=7, max_tokens=3)
    for choice in (0, 1, 255, 256, 257, 511, 512, 513, 5000, count - 1):
        alone = ask_alone(kind, Asked(prompt="ab", params=params, choice=choice))
        assert lines[choice]["text"] == alone.text
