"""The training loop: exact resume, best weights, early end, divergence, budget."""

import io
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from charloom import checkpoint as checkpoints
from charloom.checkpoint import ModelWriter, read_history
from charloom.errors import DivergenceError, OptionError
from training.config import TrainingOptions
from training.corpus import CorpusOptions, EncodedCorpus, prepare_corpus
from training.evaluation import evaluate
from training.learner import rare_tokens
from training.network import Network
from training.plan import Plan, make_plan
from training.recipe import Recipe
from training.resume import saved_run
from training.runlog import Console
from training.trainer import FITTED_FROM, Outcome, Trainer

pytestmark = pytest.mark.slow

TEXT = "".join(f"{n} green bottles hanging on the wall,\n" for n in range(300))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> EncodedCorpus:
    file = tmp_path_factory.mktemp("corpus") / "bottles.txt"
    file.write_text(TEXT, encoding="utf-8")
    return prepare_corpus([str(file)], CorpusOptions())


def plan_for(corpus: EncodedCorpus, **changes: Any) -> Plan:
    """A plan of the smallest recipe, made smaller; changes are of the options or of the recipe."""
    values = {
        "recipe": "tiny",
        "hidden": 16,
        "batch_size": 4,
        "sequence_length": 16,
        "steps": 40,
        "dropout": 0.2,
        "weight_drop": 0.1,
        "threads": 1,
        "precision": "float32",
    }
    values |= changes
    choices = {name: values.pop(name) for name in set(values) & set(Recipe.__dataclass_fields__)}
    return make_plan(TrainingOptions(**values), choices, corpus, elapsed=lambda: 0.0)


def run(
    folder: Path,
    plan: Plan,
    corpus: EncodedCorpus,
    *,
    mode: Any = "new",
    stop_after: int | None = None,
    elapsed: Callable[[], float] = lambda: 0.0,
    stderr: io.StringIO | None = None,
) -> Outcome:
    """Train to the end, or until a number of steps was taken in this process."""
    console = Console(io.StringIO() if stderr is None else stderr)
    steps = itertools.count()
    with ModelWriter(folder, mode=mode) as writer:
        trainer = Trainer(
            plan,
            corpus,
            writer,
            console=console,
            elapsed=elapsed,
            interrupted=lambda: next(steps) == stop_after,
        )
        if mode == "resume":
            saved = saved_run(folder, {}, (), report=console.note)
            trainer.restore(saved.checkpoint, saved.state)
        outcome = trainer.run()
        if outcome is not Outcome.INTERRUPTED:
            trainer.finish()
        return outcome


def contents(folder: Path) -> dict[str, Any]:
    """Everything that a run leaves, as bits, but for clock times."""
    checkpoint, state = checkpoints.load(folder), checkpoints.load_trainer(folder)
    arrays = {name: array.tobytes() for name, array in state.arrays.items()}
    weights = {name: array.tobytes() for name, array in checkpoint.tensors.items()}
    history = [
        {key: value for key, value in line.items() if key != "seconds"}
        for line in read_history(folder)
    ]
    values = {**state.values["progress"], "seconds": None}
    return {"arrays": arrays, "weights": weights, "history": history, "values": values}


def can_bfloat16() -> bool:
    """Whether this processor trains in bfloat16."""
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.nn.LSTM(8, 8)(torch.zeros(2, 1, 8))[0].sum().backward()
    except RuntimeError:
        return False
    return True


PRECISIONS = [
    "float32",
    pytest.param(
        "bfloat16",
        marks=pytest.mark.skipif(not can_bfloat16(), reason="no bfloat16 on this processor"),
    ),
]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_a_resumed_run_equals_one_never_stopped(
    tmp_path: Path, corpus: EncodedCorpus, precision: str, threads: int, cell: str
) -> None:
    """Stopped in the middle of a piece and between evaluations, it ends in the same bits."""
    plan = plan_for(corpus, precision=precision, threads=threads, cell=cell)
    run(tmp_path / "whole", plan, corpus)

    assert run(tmp_path / "parts", plan, corpus, stop_after=7) is Outcome.INTERRUPTED
    assert run(tmp_path / "parts", plan, corpus, mode="resume", stop_after=16) is (
        Outcome.INTERRUPTED
    )
    assert run(tmp_path / "parts", plan, corpus, mode="resume") is Outcome.FINISHED

    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.parametrize("measured", ["nothing", "windows"])
def test_a_run_stopped_in_its_last_measurement_takes_it_again(
    tmp_path: Path, corpus: EncodedCorpus, measured: str
) -> None:
    """Stopped before either protocol, it is saved, and resumed it ends as one never stopped."""
    plan = plan_for(corpus)
    run(tmp_path / "whole", plan, corpus)
    asked = 40 + (measured == "windows")  # once a step, then once a batch of a protocol

    assert run(tmp_path / "parts", plan, corpus, stop_after=asked) is Outcome.INTERRUPTED
    assert not checkpoints.load(tmp_path / "parts").summary["finished"]
    assert run(tmp_path / "parts", plan, corpus, mode="resume") is Outcome.FINISHED

    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    one, other = (checkpoints.load(tmp_path / name).summary for name in ("whole", "parts"))
    assert one["validation"] == other["validation"]


def test_the_last_measurement_is_announced(tmp_path: Path, corpus: EncodedCorpus) -> None:
    """What may take long after the last step says so, and about how long."""
    stderr = io.StringIO()
    plan = replace(plan_for(corpus), finish_seconds=200.0)

    run(tmp_path / "model", plan, corpus, stderr=stderr)

    assert stderr.getvalue().endswith("Measuring the held-out text; done in about 3 min 20 s.\n")


@pytest.mark.parametrize("documents", ["lines", "none"])
def test_resume_is_exact_with_and_without_documents(
    tmp_path: Path, corpus: EncodedCorpus, documents: Any
) -> None:
    """The order of documents needs no saved cursor either."""
    source = corpus.description["sources"][0]
    encoded = prepare_corpus([source], CorpusOptions(documents=documents))
    plan = plan_for(encoded)
    run(tmp_path / "whole", plan, encoded)

    run(tmp_path / "parts", plan, encoded, stop_after=13)
    run(tmp_path / "parts", plan, encoded, mode="resume")

    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_the_same_seed_trains_the_same_model(tmp_path: Path, corpus: EncodedCorpus) -> None:
    """Two runs of a plan end in the same bits, and another seed ends in others."""
    plan = plan_for(corpus)
    for name in ("one", "two"):
        run(tmp_path / name, plan, corpus)
    run(tmp_path / "other", plan_for(corpus, seed=2), corpus)

    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert contents(tmp_path / "one")["weights"] != contents(tmp_path / "other")["weights"]


def test_training_learns(tmp_path: Path, corpus: EncodedCorpus) -> None:
    """A text of forty verses that differ in their number is soon well predicted."""
    run(tmp_path / "model", plan_for(corpus, steps=250, hidden=32, learning_rate=0.02), corpus)

    windows = checkpoints.load(tmp_path / "model").summary["validation"]["windows"]
    assert windows["bits_per_character"] < 1.0


def test_the_published_weights_are_the_best_ever_evaluated(
    tmp_path: Path, corpus: EncodedCorpus
) -> None:
    """Their loss is the lowest of the history, trained and averaged weights alike."""
    plan = plan_for(corpus, steps=64, learning_rate=0.05)
    run(tmp_path / "model", plan, corpus)
    checkpoint = checkpoints.load(tmp_path / "model")
    network = Network.from_arrays(checkpoint.architecture, checkpoint.tensors)

    loss = evaluate(
        network,
        corpus.validation,
        corpus.tokenizer,
        protocol="windows",
        limit=plan.evaluation_tokens,
    )

    lowest = min(
        line[name] for line in read_history(tmp_path / "model") for name in ("trained", "averaged")
    )
    assert loss.nats_per_character == pytest.approx(lowest, rel=1e-5)


def test_the_temperature_follows_the_held_out_text(tmp_path: Path, corpus: EncodedCorpus) -> None:
    """A network that learns a few lines by heart becomes too sure of others, and is tempered."""
    few = replace(corpus.train, tokens=corpus.train.tokens[:600])
    overfit = replace(corpus, train=few)
    losses = {}
    for temperature in (None, 1.0):
        options = {"steps": 320, "dropout": 0.0, "weight_drop": 0.0, "learning_rate": 0.02}
        plan = plan_for(overfit, output_temperature=temperature, **options)
        run(tmp_path / str(temperature), plan, overfit)
        losses[temperature] = [
            line["averaged"] for line in read_history(tmp_path / str(temperature))
        ]
    summary = checkpoints.load(tmp_path / "None").summary

    assert losses[None][-1] < losses[1.0][-1]
    assert summary["temperature"] == summary["best"]["temperature"]


@pytest.mark.parametrize(("held_out", "is_fitted"), [(FITTED_FROM, True), (FITTED_FROM - 1, False)])
def test_a_few_held_out_tokens_fit_no_temperature(
    tmp_path: Path, corpus: EncodedCorpus, held_out: int, is_fitted: bool
) -> None:
    """Below a thousand the logits stay as they were trained."""
    text = replace(corpus.validation, tokens=corpus.validation.tokens[: held_out + 1])
    short = replace(corpus, validation=text)

    run(tmp_path / "model", plan_for(short), short)

    assert (checkpoints.load(tmp_path / "model").summary["temperature"] != 1.0) == is_fitted


def test_a_temperature_can_be_given_where_nothing_is_held_out(tmp_path: Path) -> None:
    """The published average takes it; without one nothing is fitted to the training text."""
    file = tmp_path / "bottles.txt"
    file.write_text(TEXT, encoding="utf-8")
    encoded = prepare_corpus([str(file)], CorpusOptions(validation=0.0))
    for name, temperature in (("plain", None), ("asked", 2.0)):
        run(tmp_path / name, plan_for(encoded, output_temperature=temperature), encoded)
    plain, asked = (checkpoints.load(tmp_path / name) for name in ("plain", "asked"))

    for name, part in plain.tensors.items():
        divisor = 2 if name.startswith("output.") else 1
        assert np.array_equal(asked.tensors[name] * divisor, part)


def test_a_tied_output_layer_has_no_temperature(tmp_path: Path, corpus: EncodedCorpus) -> None:
    """It is the embedding too: nothing is fitted, and asking for one is refused."""
    run(tmp_path / "tied", plan_for(corpus, tied=True), corpus)

    assert checkpoints.load(tmp_path / "tied").summary["temperature"] == 1.0
    with pytest.raises(OptionError, match="--output-temperature 2 has no effect with --tied"):
        plan_for(corpus, tied=True, output_temperature=2.0)


def test_both_protocols_are_reported(tmp_path: Path, corpus: EncodedCorpus) -> None:
    """A finished model tells nats, bits per character and bits per byte by both protocols."""
    run(tmp_path / "model", plan_for(corpus), corpus)

    summary = checkpoints.load(tmp_path / "model").summary
    assert summary["finished"]
    assert set(summary["validation"]) == {"windows", "stateful"}
    for figures in summary["validation"].values():
        assert figures["nats_per_character"] > 0
        assert figures["tokens"] == len(corpus.validation.tokens) - 1


def test_before_the_first_evaluation_the_average_is_the_model(
    tmp_path: Path, corpus: EncodedCorpus
) -> None:
    """A run stopped early has learnt something, and that is what samples come from."""
    run(tmp_path / "model", plan_for(corpus, steps=4000), corpus, stop_after=9)

    checkpoint = checkpoints.load(tmp_path / "model")
    state = checkpoints.load_trainer(tmp_path / "model")
    fresh = Network(checkpoint.architecture, seed=1).state_dict()
    for name, array in checkpoint.tensors.items():
        assert np.array_equal(array, state.arrays[f"average.{name}"])
        assert not np.array_equal(array, fresh[name].numpy())


def test_a_diverging_run_keeps_what_it_had_learnt(tmp_path: Path, corpus: EncodedCorpus) -> None:
    """The best weights evaluated before the explosion are the model, and the error says so."""
    plan = plan_for(corpus, steps=160)
    console = Console(io.StringIO())
    with ModelWriter(tmp_path / "model", mode="new") as writer:
        trainer = Trainer(
            plan, corpus, writer, console=console, interrupted=explode_after(40, lambda: trainer)
        )
        with pytest.raises(DivergenceError, match="The model as of step 40 is kept in"):
            trainer.run()

    checkpoint = checkpoints.load(tmp_path / "model")
    assert checkpoint.summary["best"]["step"] == 40
    assert checkpoint.summary["validation"]["windows"]["nats_per_character"] > 0


def explode_after(steps: int, trainer: Callable[[], Trainer]) -> Callable[[], bool]:
    """An answer to "interrupted?" that ruins the weights once so many steps were taken."""
    calls = itertools.count()

    def look() -> bool:
        if next(calls) == steps:
            with torch.no_grad():
                trainer().learner.network.output.bias.fill_(torch.nan)
        return False

    return look


def test_a_model_to_be_overwritten_stays_until_there_is_a_better_one(
    tmp_path: Path, corpus: EncodedCorpus
) -> None:
    """A run that explodes before its first evaluation leaves the model it was to replace."""
    run(tmp_path / "model", plan_for(corpus), corpus)
    before = checkpoints.load(tmp_path / "model").fingerprint
    plan = plan_for(corpus, steps=4000)
    with ModelWriter(tmp_path / "model", mode="overwrite") as writer:
        trainer = Trainer(
            plan,
            corpus,
            writer,
            console=Console(io.StringIO()),
            elapsed=lambda: 0.0,
            interrupted=explode_after(5, lambda: trainer),
        )
        with pytest.raises(DivergenceError, match="to be replaced is still in"):
            trainer.run()

    assert checkpoints.load(tmp_path / "model").fingerprint == before


def test_without_progress_training_stops_early(tmp_path: Path, corpus: EncodedCorpus) -> None:
    """At a rate too small to change a weight the second evaluation is no better."""
    options = {"learning_rate": 1e-30, "patience": 1, "output_temperature": 1.0}
    plan = plan_for(corpus, steps=64, **options)

    outcome = run(tmp_path / "model", plan, corpus)

    assert outcome is Outcome.NO_PROGRESS
    assert checkpoints.load(tmp_path / "model").summary["step"] == 2 * plan.evaluate_every


def test_without_held_out_text_the_averaged_weights_are_published(tmp_path: Path) -> None:
    """There is nothing to choose by, so the average is taken and no figure is claimed."""
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    encoded = prepare_corpus([str(file)], CorpusOptions(validation=0.0))
    run(tmp_path / "model", plan_for(encoded), encoded)

    checkpoint = checkpoints.load(tmp_path / "model")
    state = checkpoints.load_trainer(tmp_path / "model")
    assert checkpoint.summary["validation"] == {}
    for name, array in checkpoint.tensors.items():
        assert np.array_equal(array, state.arrays[f"average.{name}"])


def test_a_weight_that_is_no_number_stops_training(tmp_path: Path, corpus: EncodedCorpus) -> None:
    """The sentence names the step and the remedy, and the checkpoint before still loads."""
    plan = plan_for(corpus)
    run(tmp_path / "model", plan, corpus, stop_after=5)
    console = Console(io.StringIO())
    with ModelWriter(tmp_path / "model", mode="resume") as writer:
        trainer = Trainer(plan, corpus, writer, console=console, elapsed=lambda: 0.0)
        saved = saved_run(tmp_path / "model", {}, (), report=console.note)
        saved.state.arrays["weights.output.bias"][:] = np.nan
        trainer.restore(saved.checkpoint, saved.state)
        with pytest.raises(DivergenceError, match=r"step 6: the loss became nan.*--learning-rate"):
            trainer.run()

    assert checkpoints.load(tmp_path / "model").summary["step"] == 5
    assert checkpoints.verify(tmp_path / "model") == []


def test_an_exploding_loss_stops_training(tmp_path: Path, corpus: EncodedCorpus) -> None:
    """A loss twice that of blind guessing is given up, with a smaller rate as the remedy."""
    plan = plan_for(corpus, learning_rate=10.0, clip_norm=1e6, steps=400)

    with pytest.raises(DivergenceError, match=r"twice that of blind guessing.*--learning-rate"):
        run(tmp_path / "model", plan, corpus)

    assert checkpoints.verify(tmp_path / "model") == []


def clock(seconds_per_look: float) -> Callable[[], float]:
    """A clock that moves on by so much whenever it is looked at."""
    ticks: Iterator[int] = itertools.count()
    return lambda: next(ticks) * seconds_per_look


def test_a_machine_that_slows_down_shortens_the_plan_once(
    tmp_path: Path, corpus: EncodedCorpus
) -> None:
    """The journal tells when and to how many steps, and the run ends there."""
    plan = plan_for(corpus, steps=None, minutes=100.0)
    plan = replace(plan, steps=400, evaluate_every=25, finish_seconds=10.0)

    outcome = run(tmp_path / "model", plan, corpus, elapsed=clock(12.0))

    events = [line for line in read_history(tmp_path / "model") if "event" in line]
    assert len(events) == 1
    assert events[0]["event"] == "shortened"
    summary = checkpoints.load(tmp_path / "model").summary
    assert outcome in (Outcome.FINISHED, Outcome.OUT_OF_TIME)
    assert summary["step"] <= events[0]["steps"] < 400


def test_a_plan_survives_json(corpus: EncodedCorpus) -> None:
    """What was saved before the first step is read back as the same plan."""
    plan = plan_for(corpus)

    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_a_plan_is_saved_before_the_first_step(tmp_path: Path, corpus: EncodedCorpus) -> None:
    """A run that took no step has left its plan, and a state to go on from."""
    plan = plan_for(corpus)
    run(tmp_path / "model", plan, corpus, stop_after=0)

    state = checkpoints.load_trainer(tmp_path / "model")
    assert Plan.from_json(state.values["plan"]) == plan
    assert state.values["progress"]["step"] == 0


def test_rare_tokens_are_the_least_frequent() -> None:
    """Those that together make up a thousandth of the text, at least one, never the end token."""
    counts = np.array([500, 0, 1, 3, 8, 5000, 4500])

    assert rare_tokens(counts, end=0).tolist() == [2, 3]
    assert rare_tokens(np.array([9, 0, 50, 60]), end=0).tolist() == [2]
