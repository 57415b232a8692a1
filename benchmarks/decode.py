"""How fast text is written: the whole engine beside what everybody does and what cannot be beaten.

    python benchmarks/decode.py                            # the table of models and batch sizes
    python benchmarks/decode.py --only 2x512 --rounds 9
    python benchmarks/decode.py --million                  # the cost of a character far into a text
    python benchmarks/decode.py --streams 256              # the memory of many texts at once
    python benchmarks/decode.py --model models/demo --text FILE   # what int8 costs in bits

Every line of the table is one model and batch, measured in rounds that take turns: the naive loop
(eager `nn.LSTM`, softmax, multinomial) with one thread and with all, the step graph alone (by
`session.run` with arrays in and out, and with its arrays bound once), and the engine, which samples
with temperature 0.8 and top-p 0.95 and makes text of it. Figures are medians over the rounds. "read
once" is the time that it takes to read the int8 weights from memory.

Weights are random, as PyTorch draws them; the output layer is scaled until the mean entropy is that
of a trained model (2 bits with 65 characters, 5 bits with 5,000), since the cost of top-p depends
on it.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from machine import describe
from torch import nn

import charloom
from charloom.architecture import Architecture
from charloom.checkpoint import Checkpoint
from charloom.decoding.alphabet import Alphabet
from charloom.decoding.cache import StateCache
from charloom.decoding.decoder import GraphDecoder, Kernel, choose_kernel, open_session
from charloom.decoding.engine import Engine
from charloom.decoding.graph import build, state_names
from charloom.decoding.request import Handle, Prompt, Request
from charloom.model import CACHE
from charloom.params import Precision, SamplingParams
from charloom.tokenizer import CharacterTokenizer

MODELS = {
    "2x128": (2, 128, 65),
    "2x512": (2, 512, 65),
    "3x512": (3, 512, 65),
    "2x1024": (2, 1024, 65),
    "2x512 of 5,000": (2, 512, 5000),
}
ENTROPIES = {65: 2.0, 5000: 5.0}
SAMPLING = SamplingParams(temperature=0.8, top_p=0.95)
SEGMENT = 0.25
"""Seconds that one measurement lasts, about."""


def make_checkpoint(layers: int, hidden: int, vocabulary: int) -> Checkpoint:
    """A random LSTM whose predictions are as sure as a trained one's."""
    tokenizer = CharacterTokenizer(map(chr, range(0x4E00, 0x4E00 + vocabulary - 2)))
    architecture = Architecture(
        cell="lstm",
        vocabulary=vocabulary,
        embedding=min(hidden, 128),
        hidden=hidden,
        layers=layers,
    )
    rng = np.random.default_rng(0)
    bound = hidden**-0.5
    tensors = {
        name: rng.uniform(-bound, bound, shape).astype(np.float32)
        for name, shape in architecture.tensor_shapes().items()
    }
    tensors["embedding.weight"] = rng.normal(size=tensors["embedding.weight"].shape).astype(
        np.float32
    )
    checkpoint = Checkpoint(
        path=Path("memory"),
        architecture=architecture,
        tokenizer=tokenizer,
        tensors=tensors,
        token_counts=np.ones(vocabulary, np.int64),
        documents="none",
        summary={},
        fingerprint="0" * 64,
    )
    scale = find_scale(checkpoint, ENTROPIES[vocabulary])
    tensors["output.weight"] *= scale
    tensors["output.bias"] *= scale
    return checkpoint


def find_scale(checkpoint: Checkpoint, bits: float) -> np.float32:
    """By how much the logits are to be scaled for this mean entropy, by bisection."""
    decoder = GraphDecoder(checkpoint, "float32", capacity=64, threads=1)
    rng = np.random.default_rng(1)
    for _ in range(50):
        logits = decoder.step(rng.integers(2, decoder.vocabulary_size, 64).astype(np.int32))
    low, high = 0.0, 1000.0
    for _ in range(40):
        scale = (low + high) / 2
        shares = np.exp(scale * (logits - logits.max(axis=1, keepdims=True)).astype(np.float64))
        shares /= shares.sum(axis=1, keepdims=True)
        entropy = -(shares * np.log2(shares.clip(1e-300))).sum(axis=1).mean()
        low, high = (scale, high) if entropy > bits else (low, scale)
    return np.float32(low)


class Naive(nn.Module):
    """What everybody writes: a module stepped one character at a time."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        shape = checkpoint.architecture
        self.embedding = nn.Embedding(shape.vocabulary, shape.embedding)
        self.lstm = nn.LSTM(shape.embedding, shape.hidden, shape.layers, batch_first=True)
        self.output = nn.Linear(shape.hidden, shape.vocabulary)
        tensors = {name: torch.from_numpy(value) for name, value in checkpoint.tensors.items()}
        with torch.no_grad():
            self.embedding.weight.copy_(tensors["embedding.weight"])
            self.output.weight.copy_(tensors["output.weight"])
            self.output.bias.copy_(tensors["output.bias"])
            for layer in range(shape.layers):
                for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                    target = getattr(self.lstm, f"{part}_l{layer}")
                    target.copy_(tensors[f"layers.{layer}.{part}"])

    def write(self, batch: int, length: int, *, threads: int) -> list[str]:
        """Sample `length` characters in each of `batch` texts."""
        torch.set_num_threads(threads)
        return ["".join(map(chr, tokens)) for tokens in self.draw(batch, length)]

    @torch.inference_mode()
    def draw(self, batch: int, length: int) -> list[list[int]]:
        """Sample `length` tokens in each of `batch` texts."""
        tokens = torch.full((batch, 1), 2)
        state = None
        steps = []
        for _ in range(length):
            y, state = self.lstm(self.embedding(tokens), state)
            shares = torch.softmax(self.output(y[:, -1]) / SAMPLING.temperature, dim=-1)
            tokens = torch.multinomial(shares, 1)
            steps.append(tokens[:, 0].tolist())
        return [list(text) for text in zip(*steps, strict=True)]


def make_engine(checkpoint: Checkpoint, decoder: GraphDecoder) -> Engine:
    """The engine, stepped by hand."""
    return Engine(
        decoder,
        Alphabet(checkpoint.tokenizer, documents=False),
        np.zeros(decoder.vocabulary_size, np.float32),
        cache=StateCache(CACHE),
        own_thread=False,
    )


def submit(engine: Engine, batch: int, length: int) -> list[Handle]:
    """Ask for `batch` texts that begin differently."""
    params = replace(SAMPLING, max_tokens=length)
    return [
        engine.submit(
            Request(prompt=Prompt(np.array([2 + row % 60], np.int32)), params=params, seed=row)
        )
        for row in range(batch)
    ]


def write(engine: Engine, batch: int, length: int) -> None:
    """Write `batch` texts of `length` characters."""
    handles = submit(engine, batch, length)
    while engine.step():
        pass
    for handle in handles:
        assert len(handle.result().text) == length, "every character is one token"


def step(decoder: GraphDecoder, batch: int, length: int) -> None:
    """The step graph alone, its arrays bound once, as the engine runs it."""
    tokens = np.full(batch, 2, np.int32)
    for _ in range(length):
        decoder.step(tokens)


def run_session(
    session: onnxruntime.InferenceSession, checkpoint: Checkpoint, batch: int, length: int
) -> None:
    """The step graph alone, as the runtime is usually called: arrays in, arrays out."""
    shape = batch, checkpoint.architecture.hidden
    names = state_names(checkpoint.architecture, "state")
    outputs = ["logits", *state_names(checkpoint.architecture, "next")]
    tokens = np.full(batch, 2, np.int32)
    states = [np.zeros(shape, np.float32) for _ in names]
    for _ in range(length):
        feed = {"tokens": tokens, **dict(zip(names, states, strict=True))}
        _, *states = session.run(outputs, feed)


def seconds_per_step(run: Callable[[int], object], guess: float) -> float:
    """Time one measurement of about `SEGMENT` seconds."""
    length = max(int(SEGMENT / guess), 4)
    start = time.perf_counter()
    run(length)
    return (time.perf_counter() - start) / length


def bandwidth() -> float:
    """Bytes a second at which memory is read by all threads, the best of several."""
    block = torch.ones(1 << 26, dtype=torch.int64)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        block.sum()
        best = max(best, block.nbytes / (time.perf_counter() - start))
    return best


def weight_bytes(architecture: Architecture) -> int:
    """Bytes of int8 weights that one step reads; the first layer's input is a table's row."""
    hidden = architecture.hidden
    products = 2 * architecture.layers - 1
    return products * architecture.gates * hidden * hidden + architecture.vocabulary * hidden


def compare(name: str, kernel: Kernel, batches: list[int], rounds: int, speed: float) -> None:
    """Print the lines of one model."""
    layers, hidden, vocabulary = MODELS[name]
    checkpoint = make_checkpoint(layers, hidden, vocabulary)
    threads = torch.get_num_threads()
    start = time.perf_counter()
    decoder = GraphDecoder(checkpoint, kernel, capacity=max(batches), threads=threads)
    load = time.perf_counter() - start
    engine = make_engine(checkpoint, decoder)
    session = open_session(
        build(
            checkpoint.architecture,
            checkpoint.tensors,
            decoder.arithmetic,
            signed_weights=kernel != "int8-unsigned",
        ),
        threads=threads,
        spinning=True,
    )
    naive = Naive(checkpoint)
    once = weight_bytes(checkpoint.architecture) / speed
    for batch in batches:
        runs: dict[str, Callable[[int], object]] = {
            "naive, 1 thread": partial(naive.write, batch, threads=1),
            "naive, all threads": partial(naive.write, batch, threads=threads),
            "graph, session.run": partial(run_session, session, checkpoint, batch),
            "graph, bound": partial(step, decoder, batch),
            "engine": partial(write, engine, batch),
        }
        guesses = {}
        for what, run in runs.items():  # warm up, and find out how long a step takes
            run(4)
            guesses[what] = seconds_per_step(run, 0.01)
        times: dict[str, list[float]] = {what: [] for what in runs}
        for _ in range(rounds):
            for what, run in runs.items():
                times[what].append(seconds_per_step(run, guesses[what]))
        middle = {what: float(np.median(taken)) for what, taken in times.items()}
        best = min(middle["naive, 1 thread"], middle["naive, all threads"])
        cells = [
            name,
            f"{batch}",
            *(f"{middle[what] * 1e6:,.0f}" for what in runs),
            f"{once * 1e6:,.0f}",
            f"{batch / middle['engine']:,.0f}",
            f"{best / middle['engine']:.1f}",
            f"{middle['naive, 1 thread'] / middle['engine']:.1f}",
            f"{middle['graph, session.run'] / middle['engine']:.0%}",
            f"{middle['graph, bound'] / middle['engine']:.0%}",
            f"{load:.2f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
    torch.set_num_threads(threads)


def far_into_a_text(kernel: Kernel, rounds: int) -> None:
    """Print what a character costs at position 1,000,000 and at 1,000."""
    checkpoint = make_checkpoint(*MODELS["2x128"])
    threads = torch.get_num_threads()
    far, near = (
        make_engine(checkpoint, GraphDecoder(checkpoint, kernel, capacity=1, threads=threads))
        for _ in range(2)
    )
    submit(far, 1, 1_000_000_000)
    while far.load.tokens_drawn < 1_000_000:
        far.step()

    def cost(engine: Engine) -> float:
        drawn, start = engine.load.tokens_drawn, time.perf_counter()
        while engine.load.tokens_drawn < drawn + 5000:
            engine.step()
        return (time.perf_counter() - start) / (engine.load.tokens_drawn - drawn)

    times = []
    for _ in range(rounds):
        handle = submit(near, 1, 1_000_000_000)[0]
        drawn = near.load.tokens_drawn
        while near.load.tokens_drawn < drawn + 1000:
            near.step()
        times.append((cost(near), cost(far)))
        handle.cancel()
        near.step()
    early, late = np.median(np.array(times), axis=0) * 1e6
    print(
        f"2x128, one text: {early:.1f} microseconds a character at position 1,000, {late:.1f} at "
        f"1,000,000: {late / early - 1:+.1%}"
    )


def anonymous_memory() -> int:
    """Bytes that this process holds of its own."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


def memory_of(streams: int, kernel: Kernel) -> None:
    """Print what so many texts at once need beyond the model."""
    checkpoint = make_checkpoint(*MODELS["2x512"])
    threads = torch.get_num_threads()
    decoder = GraphDecoder(checkpoint, kernel, capacity=streams, threads=threads)
    engine = make_engine(checkpoint, decoder)
    loaded = anonymous_memory()
    handles = submit(engine, streams, 300)
    peak = loaded
    while engine.step():
        peak = max(peak, anonymous_memory())
    assert all(len(handle.result().text) == 300 for handle in handles)
    print(f"2x512, {streams} texts of 300 characters at once: {(peak - loaded) / 1e6:.1f} MB more")


def price_of_int8(model: Path, text: Path, characters: int) -> None:
    """Print bits per character of the same text by both precisions."""
    loaded = charloom.load(model)
    sample = text.read_text("utf-8")
    held_out = sample[-len(sample) // 10 :][:characters]
    bits = {}
    precisions: tuple[Precision, ...] = ("float32", "int8")
    for precision in precisions:
        start = time.perf_counter()
        (score,) = loaded.scorer(precision=precision).together([held_out])
        bits[precision] = score.bits_per_character
        print(
            f"{model.name}, {score.characters:,} characters of {text.name}, {precision}: "
            f"{score.bits_per_character:.4f} bits per character in "
            f"{time.perf_counter() - start:.1f} s"
        )
    print(f"int8 costs {bits['int8'] - bits['float32']:+.5f} bits per character")


def main() -> None:
    """Read the command line and print what it asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", choices=MODELS, action="append", help="this model alone")
    parser.add_argument("--batch", type=int, action="append", help="this batch size alone")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", choices=("auto", "int8", "float32"), default="auto")
    parser.add_argument("--million", action="store_true")
    parser.add_argument("--streams", type=int)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--characters", type=int, default=100_000)
    chosen = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    kernel = choose_kernel(chosen.precision)
    versions = {
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
    }
    print(f"{describe(**versions)}\n")
    if chosen.million:
        far_into_a_text(kernel, chosen.rounds)
    elif chosen.streams:
        memory_of(chosen.streams, kernel)
    elif chosen.model and chosen.text:
        price_of_int8(chosen.model, chosen.text, chosen.characters)
    else:
        speed = bandwidth()
        print(f"{kernel}; memory is read at {speed / 1e9:.0f} GB/s; microseconds a step:\n")
        print(
            "| model | batch | naive, 1 thread | naive, all threads | graph, session.run | "
            "graph, bound | engine | read once | characters/s | against the better naive | "
            "against 1 thread | session.run / engine | bound graph / engine | load, s |"
        )
        print("|---|" + "---:|" * 13)
        for name in chosen.only or MODELS:
            compare(name, kernel, chosen.batch or [1, 8, 64], chosen.rounds, speed)


if __name__ == "__main__":
    main()
