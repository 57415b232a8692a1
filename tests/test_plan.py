"""The plan: what it settles, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest

from charloom.errors import OptionError
from training.config import TrainingOptions
from training.corpus import CorpusOptions, EncodedCorpus, prepare_corpus
from training.plan import EVALUATIONS, Plan, choose_device, make_plan


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> EncodedCorpus:
    file = tmp_path_factory.mktemp("corpus") / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog\n" * 500, encoding="utf-8")
    return prepare_corpus([str(file)], CorpusOptions())


def plan(corpus: EncodedCorpus, elapsed: float = 0.0, **changes: Any) -> Plan:
    fields = {"hidden": 8, "batch_size": 4, "sequence_length": 16, "threads": 1}
    return make_plan(TrainingOptions(**fields | changes), corpus, elapsed=lambda: elapsed)


def test_steps_are_taken_as_given(corpus: EncodedCorpus) -> None:
    """--steps is the number of updates."""
    assert plan(corpus, steps=77).steps == 77


def test_an_epoch_is_one_pass_over_the_training_text(corpus: EncodedCorpus) -> None:
    """Two epochs are twice the training tokens over the tokens of a step, rounded up."""
    made = plan(corpus, epochs=2.0)

    assert made.steps == pytest.approx(2 * len(corpus.train.tokens) / (4 * 16), rel=0.05)
    assert made.epochs == pytest.approx(2.0, rel=0.01)


def test_minutes_become_steps_that_fit_into_them(corpus: EncodedCorpus) -> None:
    """The plan fills nine tenths of the budget at most, what was used before it included."""
    made = plan(corpus, minutes=2.0, elapsed=20.0)

    assert 20.0 < made.expected_seconds <= 0.9 * 120 + 1
    assert made.seconds == 120


def test_a_budget_too_short_for_a_step_is_refused(corpus: EncodedCorpus) -> None:
    """The sentence names the minutes given and what would help."""
    with pytest.raises(OptionError, match=r"--minutes is 0\.02, too short.*give more minutes"):
        plan(corpus, minutes=0.02)


def test_five_minutes_are_the_default(corpus: EncodedCorpus) -> None:
    """Without a budget the plan takes the documented default, and says so in its options."""
    assert plan(corpus).options.minutes == 5.0


def test_a_plan_evaluates_evenly(corpus: EncodedCorpus) -> None:
    """There are at most sixteen evaluations, and one at least."""
    for steps in (1, 5, 16, 100, 1001):
        every = plan(corpus, steps=steps).evaluate_every
        assert 1 <= steps / every <= EVALUATIONS


def test_the_plan_settles_what_the_options_leave_open(corpus: EncodedCorpus) -> None:
    """Precision, device, threads, embedding and vocabulary are facts in a plan."""
    made = plan(corpus, steps=5)

    assert made.precision in ("float32", "bfloat16")
    assert made.device in ("cpu", "cuda")
    assert made.threads == 1
    assert made.architecture.embedding == 8
    assert made.architecture.vocabulary == corpus.tokenizer.vocabulary_size


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "xla"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    """The sentence names the device and the remedy."""
    with pytest.raises(OptionError, match=f"--device is '{name}'"):
        choose_device(name)


def test_all_problems_are_reported_at_once() -> None:
    """Each option out of range has a sentence of its own with value and limit."""
    with pytest.raises(OptionError) as caught:
        TrainingOptions(
            layers=0,
            dropout=1.0,
            learning_rate=float("nan"),
            cell="transformer",
            minutes=1.0,
            steps=5,
            residual=1,
        )

    text = str(caught.value)
    for part in (
        "--layers is 0; give a whole number of at least 1 and at most 32.",
        "--dropout is 1.0; give a number of at least 0.0 and at most 0.99.",
        "--learning-rate is nan",
        "--cell is 'transformer'; choose one of lstm, gru, rnn.",
        "--minutes and --steps are both given; give one budget.",
        "--residual is 1; choose one of false, true.",
    ):
        assert part in text
    assert len(caught.value.problems) == 6


@pytest.mark.parametrize("tied_embedding", [7, 9])
def test_tied_embeddings_need_the_hidden_size(tied_embedding: int) -> None:
    """Another size is refused by the option's name."""
    with pytest.raises(OptionError, match="--tied needs --embedding equal to --hidden"):
        TrainingOptions(tied=True, hidden=8, embedding=tied_embedding)


def test_tied_embeddings_take_the_hidden_size_unasked(tmp_path: Path) -> None:
    """--tied alone is enough."""
    file = tmp_path / "text.txt"
    file.write_text("some text to read again and again\n" * 100, encoding="utf-8")
    encoded = prepare_corpus([str(file)], CorpusOptions())

    assert plan(encoded, tied=True, hidden=160, steps=1).architecture.embedding == 160
