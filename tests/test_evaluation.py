"""Losses of held-out text against closed forms and a slow second implementation."""

import math

import numpy as np
import pytest
import torch

from charloom.architecture import Architecture
from charloom.tokenizer import CharacterTokenizer
from training.corpus import Split
from training.evaluation import (
    ADAPTATION_SEQUENCE,
    PROTOCOLS,
    WINDOW,
    Protocol,
    adapt,
    evaluate,
)
from training.network import Network

TOKENIZER = CharacterTokenizer("abcdefgh")


def network(seed: int = 3) -> Network:
    architecture = Architecture(
        cell="lstm",
        vocabulary=TOKENIZER.vocabulary_size,
        embedding=4,
        hidden=5,
        layers=2,
    )
    return Network(architecture, seed=seed)


def text(count: int, seed: int = 0) -> Split:
    tokens = np.random.default_rng(seed).integers(2, 10, size=count).astype(np.uint8)
    return Split(tokens=tokens, boundaries=None, characters=count, bytes=count)


def documents(lengths: list[int]) -> Split:
    rng = np.random.default_rng(1)
    parts = [np.zeros(1, np.uint8)]
    for length in lengths:
        parts += [rng.integers(2, 10, size=length).astype(np.uint8), np.zeros(1, np.uint8)]
    tokens = np.concatenate(parts)
    return Split(
        tokens=tokens,
        boundaries=np.flatnonzero(tokens == 0),
        characters=sum(lengths),
        bytes=sum(lengths),
    )


@torch.inference_mode()
def slow_nats(model: Network, tokens: np.ndarray) -> float:
    """Read one text token by token from the zero state and add up the cost of each next one."""
    state, nats = model.initial_state(1), 0.0
    for token, target in zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True):
        logits, state = model(torch.tensor([[token]]), state)
        nats -= float(torch.log_softmax(logits[0, 0], dim=0)[target])
    return nats


def test_stateful_reads_the_text_once() -> None:
    """The state is carried from the first token to the last, which a slow loop confirms."""
    model, split = network(), text(2500)

    loss = evaluate(model, split, TOKENIZER, protocol="stateful")

    assert loss.nats == pytest.approx(slow_nats(model, split.tokens), rel=1e-5)
    assert loss.tokens == loss.characters == 2499


def test_windows_start_afresh_every_256_tokens() -> None:
    """Each window reads from the zero state, and its first prediction rests on one token."""
    model, split = network(), text(3 * WINDOW + 50)
    expected = sum(
        slow_nats(model, split.tokens[start : start + WINDOW + 1])
        for start in range(0, len(split.tokens) - 1, WINDOW)
    )

    loss = evaluate(model, split, TOKENIZER, protocol="windows")

    assert loss.nats == pytest.approx(expected, rel=1e-5)
    assert loss.tokens == 3 * WINDOW + 49


@pytest.mark.parametrize("protocol", ["windows", "stateful"])
def test_documents_are_scored_one_by_one_to_their_end(protocol: Protocol) -> None:
    """Each starts from the zero state and the end token, and its own end is scored too."""
    model, split = network(), documents([5, 100, 1, 37, 37])
    assert split.boundaries is not None
    expected = sum(
        slow_nats(model, split.tokens[start : end + 1])
        for start, end in zip(split.boundaries[:-1], split.boundaries[1:], strict=True)
    )

    loss = evaluate(model, split, TOKENIZER, protocol=protocol)

    assert loss.nats == pytest.approx(expected, rel=1e-5)
    assert loss.tokens == 180 + 5
    assert loss.characters == 180


def test_a_network_that_knows_nothing_costs_the_logarithm_of_the_vocabulary() -> None:
    """With all weights zero every token costs ln V nats."""
    model = network()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)

    loss = evaluate(model, text(1000), TOKENIZER, protocol="windows")

    assert loss.nats_per_token == pytest.approx(math.log(10), rel=1e-6)
    assert loss.bits_per_character == pytest.approx(math.log2(10), rel=1e-6)


def test_an_unknown_character_costs_the_choice_among_all_others() -> None:
    """Besides p(unknown) it costs ln(1,114,112 - 8) where eight characters are known."""
    model, split = network(), text(300)
    plain = evaluate(model, split, TOKENIZER, protocol="stateful")
    tokens = split.tokens.copy()
    tokens[-1] = TOKENIZER.unknown
    other = Split(tokens=tokens, boundaries=None, characters=300, bytes=300)

    loss = evaluate(model, other, TOKENIZER, protocol="stateful")

    assert (plain.unknown, loss.unknown) == (0, 1)
    assert loss.nats == pytest.approx(slow_nats(model, tokens) + math.log(0x110000 - 8), rel=1e-5)


def encoded(words: str) -> Split:
    """What a corpus makes of a text: characters that are not known become the unknown token."""
    return Split(
        tokens=TOKENIZER.encode(words, unknown="replace").astype(np.uint8),
        boundaries=None,
        characters=len(words),
        bytes=len(words.encode()),
    )


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("words", "size"),
    [("abcxyz" * 200, 1199), ("abcdéñ" * 200, 1599), ("abcd語é" * 200, 1799)],
)
def test_unknown_characters_count_the_bytes_they_have(
    protocol: Protocol, words: str, size: int
) -> None:
    """All bytes but the first character's are counted, whatever the unknown ones take."""
    loss = evaluate(network(), encoded(words), TOKENIZER, protocol=protocol)

    assert loss.unknown > 0
    assert loss.bytes == size
    assert loss.bits_per_byte == pytest.approx(loss.bits_per_character * 1199 / size)


def test_unknown_characters_of_a_part_count_the_mean_of_the_whole() -> None:
    """Of a text half read, each of 341 unknown characters counts the two bytes they have."""
    split = encoded("abé" * 4096)

    loss = evaluate(network(), split, TOKENIZER, protocol="stateful", limit=1024)

    assert (loss.tokens, loss.unknown, loss.bytes) == (1024, 341, 683 + 2 * 341)


def test_a_measurement_can_be_ended_before_each_batch() -> None:
    """A text of three batches asks three times, and what is raised then comes out."""
    asked: list[None] = []

    def grow_impatient() -> None:
        asked.append(None)
        if len(asked) == 3:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        evaluate(network(), text(2500), TOKENIZER, protocol="stateful", between=grow_impatient)
    assert len(asked) == 3


def test_bits_per_byte_counts_utf8_bytes() -> None:
    """Two bytes a character halve the bits per byte."""
    tokenizer = CharacterTokenizer("абвгдежз")
    loss = evaluate(network(), text(500), tokenizer, protocol="windows")

    assert loss.bytes == 2 * loss.characters
    assert loss.bits_per_byte == pytest.approx(loss.bits_per_character / 2)


@pytest.mark.parametrize("protocol", ["windows", "stateful"])
def test_a_limit_reads_less(protocol: Protocol) -> None:
    """About as many tokens are read as the limit says, and a large one changes nothing."""
    model, split = network(), text(20_000)
    whole = evaluate(model, split, TOKENIZER, protocol=protocol)

    part = evaluate(model, split, TOKENIZER, protocol=protocol, limit=4000)

    assert 4000 <= part.tokens <= 4000 + WINDOW
    assert evaluate(model, split, TOKENIZER, protocol=protocol, limit=10**9) == whole
    assert part.nats_per_token == pytest.approx(whole.nats_per_token, rel=0.05)


def test_evaluation_leaves_training_alone() -> None:
    """Weights and gradients are what they were."""
    model = network()
    before = {name: part.clone() for name, part in model.state_dict().items()}

    evaluate(model, text(600), TOKENIZER, protocol="windows")

    assert all(torch.equal(part, before[name]) for name, part in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def louder(model: Network, factor: float) -> Network:
    """The same network with its logits multiplied."""
    return Network.from_arrays(
        model.architecture,
        {
            name: part.detach().numpy() * (factor if name.startswith("output.") else 1.0)
            for name, part in model.named_parameters()
        },
    )


def test_the_best_of_several_temperatures_is_taken() -> None:
    """One reading finds the least of what networks with their logits divided would give each."""
    model, split = network(), text(2000)
    split.tokens[np.random.default_rng(5).random(2000) < 0.7] = 2  # often, though not as often
    with torch.no_grad():
        model.output.bias[2] = 9.0  # as the network believes
    temperatures = (0.5, 1.0, 3.0, 20.0, 200.0)

    best = evaluate(model, split, TOKENIZER, protocol="windows", temperatures=temperatures)

    losses = {
        temperature: evaluate(
            louder(model, 1 / temperature), split, TOKENIZER, protocol="windows"
        ).nats
        for temperature in temperatures
    }
    assert best.temperature == min(losses, key=lambda temperature: losses[temperature])
    assert best.nats == pytest.approx(losses[best.temperature], rel=1e-5)
    assert best.temperature not in (0.5, 200.0)


def slow_dynamic(model: Network, tokens: np.ndarray, rate: float) -> float:
    """Score a stretch, then step down its mean gradient by Adam's rule, written out."""
    weights = list(model.parameters())
    squares = [torch.zeros_like(weight) for weight in weights]
    state, nats = model.initial_state(1), 0.0
    for steps, start in enumerate(range(0, len(tokens) - 1, ADAPTATION_SEQUENCE), start=1):
        stretch = torch.from_numpy(tokens[start : start + ADAPTATION_SEQUENCE + 1].astype(np.int64))
        logits, after = model(stretch[:-1, None], state)
        surprise = -torch.log_softmax(logits[:, 0], dim=1).gather(1, stretch[1:, None])
        nats += float(surprise.detach().sum())
        gradients = torch.autograd.grad(surprise.mean(), weights)
        with torch.no_grad():
            for weight, square, gradient in zip(weights, squares, gradients, strict=True):
                square.mul_(0.99).add_(0.01 * gradient**2)
                mean = square / (1 - 0.99**steps)  # not biased towards the zero it began with
                weight.sub_(rate * gradient / (mean.sqrt() + 1e-8))
        state = [tuple(part.detach() for part in layer) for layer in after]
    return nats


def test_dynamic_evaluation_scores_before_it_learns() -> None:
    """Each stretch is scored by weights that saw only what stands before it, says a slow loop."""
    split = text(1000)

    loss = adapt(network(), split, TOKENIZER, rate=0.01)

    assert loss.nats == pytest.approx(slow_dynamic(network(), split.tokens, 0.01), rel=1e-4)
    assert loss.tokens == 999


def test_dynamic_evaluation_without_a_step_is_stateful() -> None:
    """At rate 0 nothing is learned, with documents or without."""
    for split in (text(1000), documents([3, 700, 90, 1])):
        plain = evaluate(network(), split, TOKENIZER, protocol="stateful")
        still = adapt(network(), split, TOKENIZER, rate=0.0)

        assert still.nats == pytest.approx(plain.nats, rel=1e-5)
        assert still.tokens == plain.tokens


def test_dynamic_evaluation_begins_with_small_steps() -> None:
    """A text of one stretch and a token moves each weight by the rate, not by ten times that."""
    model = network()
    before = {name: part.detach().clone() for name, part in model.named_parameters()}

    adapt(model, text(ADAPTATION_SEQUENCE + 1), TOKENIZER, rate=0.001)

    moves = [
        float((part.detach() - before[name]).abs().max()) for name, part in model.named_parameters()
    ]
    assert max(moves) == pytest.approx(0.001, rel=1e-3)


def test_dynamic_evaluation_learns_what_is_there_to_be_learned() -> None:
    """A text that repeats becomes cheap; one that is all chance never beats it."""
    repeated = np.tile(np.arange(2, 10), 1000).astype(np.uint8)
    order = Split(tokens=repeated, boundaries=None, characters=8000, bytes=8000)

    assert adapt(network(), order, TOKENIZER, rate=0.01).nats_per_token < 1.5
    assert adapt(network(), text(8000), TOKENIZER, rate=0.01).nats_per_token > math.log(8)
