"""The plan: what it settles, and what it refuses."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from charloom.architecture import Architecture
from charloom.errors import OptionError
from training import trial as trials
from training.batches import Batch, Batches
from training.calibration import calibrate, choose_precision, memory_needed
from training.config import TrainingOptions
from training.corpus import CorpusOptions, EncodedCorpus, prepare_corpus
from training.device import choose_device
from training.plan import (
    EVALUATION_SHARE,
    EVALUATIONS,
    Plan,
    _evaluations,
    make_plan,
)
from training.recipe import RECIPES, Draft, Recipe, RecipeName, check_choices
from training.recurrence import Arithmetic
from training.trial import LEAST_STEPS, Trial

SMALL = {"hidden": 8, "batch_size": 4, "sequence_length": 16}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> EncodedCorpus:
    file = tmp_path_factory.mktemp("corpus") / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog\n" * 500, encoding="utf-8")
    return prepare_corpus([str(file)], CorpusOptions())


def plan(
    corpus: EncodedCorpus,
    elapsed: float = 0.0,
    measure: Callable[..., tuple[Arithmetic, float]] = calibrate,
    **changes: Any,
) -> Plan:
    """A plan of a network made small; changes are of the options or of the recipe."""
    values = {"recipe": "tiny", "threads": 1, **SMALL, **changes}
    choices = {name: values.pop(name) for name in set(values) & set(Recipe.__dataclass_fields__)}
    options = TrainingOptions(**values)
    return make_plan(options, choices, corpus, elapsed=lambda: elapsed, measure=measure)


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


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> EncodedCorpus:
    """44,000 characters to train on and as many held out."""
    file = tmp_path_factory.mktemp("corpus") / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog\n" * 2000, encoding="utf-8")
    return prepare_corpus([str(file)], CorpusOptions(validation=0.5))


def timed_plan(corpus: EncodedCorpus, precision: Arithmetic, **changes: Any) -> Plan:
    """A plan for a machine on which a step of 64 tokens takes a second."""
    return plan(corpus, elapsed=7.0, measure=lambda *_, **__: (precision, 1.0), **changes)


@pytest.mark.parametrize(
    ("precision", "steps", "windows", "stateful"),
    [
        # A token costs 0.4 / 64 s, in a lane of its own three times that.
        ("float32", 5000, 32_000, 10_667),  # 4 % are 200 s
        ("bfloat16", 5000, 16_000, 5_333),  # and measuring in float32 costs twice as much
        ("float32", 100, 4096, 4096),  # 10 s would be 1,600 tokens: a figure needs more
        ("float32", 10**6, 43_999, 43_999),  # all there is
    ],
)
def test_the_last_figures_take_a_small_share_of_the_time_for_the_steps(
    halved: EncodedCorpus, precision: Arithmetic, steps: int, windows: int, stateful: int
) -> None:
    """They read what four hundredths of it allow, each, but a few thousand tokens at least."""
    made = timed_plan(halved, precision, steps=steps)

    assert made.report_tokens["windows"] == pytest.approx(windows, rel=0.01)
    assert made.report_tokens["stateful"] == pytest.approx(stateful, rel=0.01)


def test_a_plan_expects_what_its_parts_take(halved: EncodedCorpus) -> None:
    """Start, steps, sixteen evaluations of two networks, both last figures, and finishing."""
    made = timed_plan(halved, "float32", steps=160)

    token = 0.4 / 64
    evaluations = 16 * 2 * 4096 * token
    last = 4096 * token + 4096 * 3 * token
    assert made.expected_seconds == pytest.approx(7 + 160 + evaluations + last + 4, rel=0.01)
    assert made.finish_seconds == pytest.approx(last + 4, rel=0.01)


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({"float32": 1.0}, "float32"),
        ({"bfloat16": 1.0}, "bfloat16"),
        ({"float32": 1.0, "bfloat16": 2.0}, "float32"),
        ({"float32": 1.1, "bfloat16": 1.0}, "float32"),
        ({"float32": 1.25, "bfloat16": 1.0}, "bfloat16"),
    ],
)
def test_bfloat16_is_taken_where_it_is_clearly_faster(
    seconds: dict[Arithmetic, float], chosen: Arithmetic
) -> None:
    """A gain of a tenth may be chance, and chance must not decide what a seed trains."""
    assert choose_precision(seconds) == chosen


def test_sizes_beyond_the_memory_are_refused(corpus: EncodedCorpus) -> None:
    """Lanes and lengths in range, which no machine can hold, give a sentence that names them."""
    sentence = "with --batch-size 1024 and --sequence-length 65536 do not fit the memory"
    with pytest.raises(OptionError, match=sentence):
        plan(corpus, steps=1, hidden=4096, batch_size=1024, sequence_length=65536)


class Hungry(Batches):
    """Batches for which there is no memory."""

    def since(self, step: int) -> Iterator[Batch]:
        """Fail as NumPy does."""
        raise MemoryError(f"Unable to allocate 32.0 GiB for batch {step}")


def test_memory_that_is_refused_is_a_sentence(corpus: EncodedCorpus) -> None:
    """What the estimate lets pass and the machine does not is told in the same words."""
    recipe = Draft.named("tiny").settle(SMALL, passes=1.0)
    batches = Hungry(corpus.train, batch_size=4, sequence_length=16, seed=1)

    with pytest.raises(OptionError, match="do not fit the memory"):
        calibrate(
            recipe,
            recipe.architecture(30),
            batches,
            precision="auto",
            device=torch.device("cpu"),
            seconds=0.1,
        )


def test_a_step_needs_memory_for_weights_and_for_each_position() -> None:
    """By hand: ten copies of the weights; ids, logits and the units of both layers."""
    architecture = Architecture(cell="lstm", vocabulary=30, embedding=8, hidden=8, layers=2)
    weights = 10 * 4 * architecture.parameters

    assert memory_needed(architecture, 0, precision="auto") == weights
    positions = memory_needed(architecture, 100, precision="auto") - weights
    assert positions == 100 * (40 + 480 + 4 * 16 * 12)


def test_the_largest_batch_is_known_before_it_is_made(corpus: EncodedCorpus) -> None:
    """Lanes times steps, of which there are no more than the text has."""
    most = max(
        batch.inputs.size
        for batch, _ in zip(
            Batches(corpus.train, batch_size=4, sequence_length=16, seed=1).since(0),
            range(100),
            strict=False,
        )
    )

    assert Batches(corpus.train, batch_size=4, sequence_length=16, seed=1).largest == most == 64
    endless = Batches(corpus.train, batch_size=4, sequence_length=65536, seed=1)
    assert endless.largest == 4 * (len(corpus.train.tokens) - 1)


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
        Recipe(
            **dataclasses.asdict(Draft.named("tiny").settle({}, passes=1.0))
            | {
                "layers": 0,
                "dropout": 1.0,
                "learning_rate": float("nan"),
                "cell": "transformer",
                "residual": 1,
            }
        )

    text = str(caught.value)
    for part in (
        "--layers is 0; give a whole number of at least 1 and at most 32.",
        "--dropout is 1.0; give a number of at least 0.0 and at most 0.99.",
        "--learning-rate is nan",
        "--cell is 'transformer'; choose one of lstm, gru, rnn.",
        "--residual is 1; choose one of false, true.",
    ):
        assert part in text
    assert len(caught.value.problems) == 5


@pytest.mark.parametrize("tied_embedding", [7, 9])
def test_tied_embeddings_need_the_hidden_size(tied_embedding: int) -> None:
    """Another size is refused by the option's name."""
    with pytest.raises(OptionError, match="--tied needs --embedding equal to --hidden"):
        check_choices({"tied": True, "hidden": 8, "embedding": tied_embedding})


def test_two_budgets_are_refused() -> None:
    """Minutes and steps cannot both be followed."""
    with pytest.raises(OptionError, match="--minutes and --steps are both given; give one budget"):
        TrainingOptions(minutes=1.0, steps=5)


def test_tied_embeddings_take_the_hidden_size_unasked(tmp_path: Path) -> None:
    """--tied alone is enough."""
    file = tmp_path / "text.txt"
    file.write_text("some text to read again and again\n" * 100, encoding="utf-8")
    encoded = prepare_corpus([str(file)], CorpusOptions())

    assert plan(encoded, tied=True, hidden=160, steps=1).architecture.embedding == 160


def repeated(corpus: EncodedCorpus, tokens: int) -> EncodedCorpus:
    """The corpus with a training text of so many tokens."""
    longer = np.resize(corpus.train.tokens, tokens)
    return dataclasses.replace(corpus, train=dataclasses.replace(corpus.train, tokens=longer))


def made_by_speed(
    corpus: EncodedCorpus,
    tokens_per_second: float,
    choices: dict[str, Any] | None = None,
    tried: list[int] | None = None,
    **changes: Any,
) -> Plan:
    """The plan of a machine on which networks of every size read so many tokens a second."""

    def measure(
        recipe: Recipe, _architecture: Architecture, batches: Batches, **_: Any
    ) -> tuple[Arithmetic, float]:
        if tried is not None:
            tried.append(recipe.hidden)
        return "float32", batches.tokens_per_step / tokens_per_second

    options = TrainingOptions(threads=1, **changes)
    return make_plan(options, choices or {}, corpus, elapsed=lambda: 0.0, measure=measure)


LONG = 4_000_000


@pytest.mark.parametrize("name", RECIPES)
def test_the_largest_network_that_is_worth_it_is_taken(
    corpus: EncodedCorpus, name: RecipeName
) -> None:
    """What can be read within the minutes decides which recipe it is, for a text long enough."""
    tokens = 1.5 * max(Draft.named(name).worth_from, 200_000)

    made = made_by_speed(repeated(corpus, LONG), tokens / 600, minutes=10.0)

    assert made.recipe_name == name


def test_a_small_text_is_not_worth_a_large_network(corpus: EncodedCorpus) -> None:
    """However fast the machine: what is read is what the text is worth reading."""
    tried: list[int] = []

    made = made_by_speed(repeated(corpus, 5000), 1e8, minutes=10.0, tried=tried)

    assert made.recipe_name == "tiny"
    assert tried == [128]


def test_without_minutes_it_is_the_recipe_of_five(corpus: EncodedCorpus) -> None:
    """A great number of steps asks for time, not for a network that would take days."""
    for budget in ({"steps": 10**6}, {"epochs": 1000.0}, {"steps": 1}):
        made = made_by_speed(repeated(corpus, LONG), 20_000, **budget)
        assert made.recipe_name == made_by_speed(repeated(corpus, LONG), 20_000).recipe_name


def test_a_plan_can_be_made_again(corpus: EncodedCorpus) -> None:
    """Recipe, precision and steps of a plan by minutes give the same plan on any machine."""
    first = made_by_speed(repeated(corpus, LONG), 20_000)
    again = made_by_speed(repeated(corpus, LONG), 777, recipe=first.recipe_name, steps=first.steps)

    assert (again.recipe, again.steps) == (first.recipe, first.steps)
    assert again.evaluate_every == first.evaluate_every


def test_what_does_not_fit_the_memory_leaves_the_smaller(
    corpus: EncodedCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that this machine cannot hold is no reason to refuse the run."""
    weights = Draft.named("base").settle({}, passes=1.0).architecture(30).parameters
    monkeypatch.setattr(trials, "physical_memory", lambda: 40 * weights)  # those, and not a step

    made = made_by_speed(repeated(corpus, LONG), 1e8)

    assert made.recipe_name in ("tiny", "small")


def test_a_chosen_size_is_timed_once(corpus: EncodedCorpus) -> None:
    """Who says how large the network is gets the rest from the recipe nearest to it."""
    tried: list[int] = []

    made = made_by_speed(corpus, 1e8, {"hidden": 300}, tried)

    assert (made.recipe_name, tried) == ("small", [300])


def test_a_tied_embedding_sets_the_hidden_size(corpus: EncodedCorpus) -> None:
    """--tied --embedding 40 is a network of 40 units."""
    made = made_by_speed(corpus, 1e5, {"tied": True, "embedding": 40})

    assert made.architecture.hidden == 40


def test_a_recipe_asked_for_is_taken(corpus: EncodedCorpus) -> None:
    """Even where there is no time for it to become good."""
    assert made_by_speed(corpus, 1000.0, minutes=10.0, recipe="base").recipe_name == "base"


def test_a_text_is_not_read_for_ever(corpus: EncodedCorpus) -> None:
    """Minutes buy no more passes than the recipe says are of use; epochs are taken as given."""
    most = Draft.named("tiny").most_passes
    text = repeated(corpus, 100_000)

    made = made_by_speed(text, 1e5, minutes=1e4, recipe="tiny")
    assert made.epochs == pytest.approx(most, rel=0.01)
    assert made_by_speed(text, 1e5, epochs=999.0, recipe="tiny").epochs >= 999.0


def test_a_very_small_text_is_read_until_it_is_learnt(corpus: EncodedCorpus) -> None:
    """A thousand updates are none too many, however often they read the text."""
    assert made_by_speed(repeated(corpus, 300), 1e5, minutes=10.0).steps == LEAST_STEPS


def test_evaluations_take_a_small_share_with_any_vocabulary(corpus: EncodedCorpus) -> None:
    """Each temperature's softmax over many tokens is counted, so less is read."""
    small, large = (
        _evaluations(
            Trial(
                Draft.named("tiny"),
                Architecture(cell="lstm", vocabulary=size, embedding=8, hidden=8, layers=1),
                Batches(corpus.train, batch_size=4, sequence_length=16, seed=1),
                "float32",
                0.001,
            ),
            dataclasses.replace(
                corpus,
                validation=dataclasses.replace(
                    corpus.validation, tokens=np.zeros(1_000_000, np.uint16)
                ),
            ),
            160_000,
        )
        for size in (60, 6000)
    )

    assert small[1] > 2 * large[1]
    for _, _, seconds in (small, large):
        assert seconds == pytest.approx(EVALUATION_SHARE * 160.0, rel=0.01)


def test_more_passes_ask_for_more_dropout(corpus: EncodedCorpus) -> None:
    """The plan's own number of passes settles what the recipe leaves open."""
    few, many = (made_by_speed(corpus, 1e5, epochs=n, recipe="small").recipe for n in (1.0, 50.0))

    assert few.dropout < many.dropout
