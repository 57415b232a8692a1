"""What a run is going to do, fixed and saved before its first step.

The options leave open what depends on the corpus and the machine: the recipe, the vocabulary, the
arithmetic, the threads, and how many steps fit into the minutes. `make_plan` settles these, by
timing real steps on throw-away copies of the networks that come into question. From then on nothing
is measured any more: a run is its plan, and a resumed run follows the plan that was saved.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import torch

from charloom.architecture import Architecture
from charloom.errors import OptionError
from training.calibration import calibrate
from training.config import DEFAULT_MINUTES, TrainingOptions
from training.corpus import EncodedCorpus
from training.device import choose_device
from training.evaluation import Protocol
from training.recipe import RECIPES, Draft, Recipe, RecipeName
from training.recurrence import Arithmetic
from training.trial import Measure, Trial, Workbench

EVALUATIONS = 16
"""Evaluations in a plan: enough to stop early, few enough to cost little."""

EVALUATION_SHARE = 0.05
"""Share of the training time that evaluations may take; they read less of the split to keep it."""

REPORT_TOKENS = 1_000_000
"""Most held-out tokens read for a figure during training."""

REPORT_SHARE = 0.04
"""Share of the minutes, or of the time for the steps, that each of the last figures may take."""

REPORT_SECONDS = 10.0
"""Where steps or epochs are given, it may take so long at least."""

FEWEST_TOKENS = 4096
"""Held-out tokens that any figure rests on, where there are as many."""

BUDGET_SHARE = 0.9
"""Share of the minutes that the plan fills; the rest is for a machine that slows down."""

_CALIBRATION_SECONDS = 3.0
_GLANCE_SECONDS = 0.3  # where steps are given, only the expected time rests on it
_CALIBRATION_SHARE = 0.02
_STATEFUL_SLOWDOWN = 3.0  # one lane against many: 1.8 to 2.8 measured, fp32, 2x256 to 2x1024
_FLOAT32_SLOWDOWN = 2.0  # against bfloat16; 1.3 to 1.8 measured
_TEMPERATURES = 2  # that an evaluation tries beside the first
_SOFTMAX_SECONDS = 1e-9  # of another one, per held-out token and token of the vocabulary, 2 cores
_FINISH_SECONDS = 4.0  # drawing the curves, model card, last save


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything that decides what a run computes, and so what it can be resumed with."""

    options: TrainingOptions
    recipe_name: RecipeName
    recipe: Recipe
    architecture: Architecture
    corpus: str
    steps: int
    epochs: float
    evaluate_every: int
    evaluation_tokens: int
    report_tokens: Mapping[Protocol, int]
    finish_seconds: float
    precision: Arithmetic
    device: str
    threads: int
    instruction_set: str
    torch: str
    expected_seconds: float

    @property
    def seconds(self) -> float | None:
        """The budget of the whole command, where minutes were given."""
        return None if self.options.minutes is None else 60.0 * self.options.minutes

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        values = dict(fields)
        values["options"] = TrainingOptions(**values["options"])
        values["recipe"] = Recipe(**values["recipe"])
        values["architecture"] = Architecture.from_json(values["architecture"])
        return cls(**values)

    @property
    def platform(self) -> dict[str, str]:
        """What exact resume depends on beside the plan's own numbers."""
        return {"torch": self.torch, "instruction set": self.instruction_set}


def current_platform() -> dict[str, str]:
    """The same for this process."""
    return {
        "torch": torch.__version__,
        "instruction set": str(torch.backends.cpu.get_cpu_capability()),
    }


def check_temperature(options: TrainingOptions, choices: Mapping[str, Any]) -> None:
    """Raise `OptionError` for a temperature of an output layer that is the embedding too."""
    if choices.get("tied") and options.output_temperature not in (None, 1.0):
        raise OptionError(
            [
                f"--output-temperature {options.output_temperature:g} has no effect with --tied, "
                "whose output layer is the embedding; leave one of them out."
            ]
        )


def make_plan(
    options: TrainingOptions,
    choices: Mapping[str, Any],
    corpus: EncodedCorpus,
    *,
    elapsed: Callable[[], float],
    measure: Measure = calibrate,
) -> Plan:
    """Settle a plan for this corpus on this machine.

    `choices` are fields of a recipe that stand whatever the recipe says. `elapsed` tells the
    seconds already used, and `measure` what `calibrate` does.

    Raises `OptionError` for choices out of range, where the budget leaves no time for a single
    step, and where the precision or device asked for is not there or its memory too small.
    """
    check_temperature(options, choices)
    if choices.get("tied") and "embedding" in choices:
        choices = {"hidden": choices["embedding"], **choices}
    if options.minutes is None and options.epochs is None and options.steps is None:
        options = replace(options, minutes=DEFAULT_MINUTES)
    device = choose_device(options.device)
    threads = torch.get_num_threads() if options.threads is None else options.threads
    torch.set_num_threads(threads)
    if options.minutes is None:
        timing = _GLANCE_SECONDS
    else:
        timing = min(_CALIBRATION_SECONDS, 60 * options.minutes * _CALIBRATION_SHARE)
    bench = Workbench(
        corpus=corpus,
        choices=choices,
        seed=options.seed,
        precision=options.precision,
        device=device,
        seconds=timing,
        measure=measure,
    )
    trial = _choose(bench, options, elapsed=elapsed)
    report, finish = _last_figures(trial, options, corpus)
    steps = _steps(trial, options, used=elapsed() + finish)
    every, evaluation, seconds = _evaluations(trial, corpus, steps)
    expected = elapsed() + steps * trial.step_seconds + seconds + finish
    if options.minutes is not None:
        expected = min(expected, 60 * options.minutes)  # a plan that would miss them is shortened
    passes = steps / trial.batches.steps_per_epoch
    return Plan(
        options=options,
        recipe_name=trial.draft.name,
        recipe=bench.settle(trial.draft, passes=passes),
        architecture=trial.architecture,
        corpus=corpus.fingerprint,
        steps=steps,
        epochs=passes,
        evaluate_every=every,
        evaluation_tokens=evaluation,
        report_tokens=report,
        finish_seconds=finish,
        precision=trial.precision,
        device=str(device),
        threads=threads,
        instruction_set=current_platform()["instruction set"],
        torch=torch.__version__,
        expected_seconds=expected,
    )


def _choose(bench: Workbench, options: TrainingOptions, *, elapsed: Callable[[], float]) -> Trial:
    """The recipe asked for, else the largest whose network is worth it within the minutes.

    Who chose the network's size gets what else suits that size. Without minutes it is the recipe of
    the default minutes, so that none takes hours unasked.
    """
    if options.recipe is not None:
        return bench.attempt(Draft.named(options.recipe))
    if not {"hidden", "layers"}.isdisjoint(bench.choices):
        return bench.attempt(Draft.nearest(bench.choices))
    minutes = DEFAULT_MINUTES if options.minutes is None else options.minutes

    def readable(trial: Trial) -> float:
        _, finish = _last_figures(trial, options, bench.corpus)
        steps = _affordable_steps(trial, minutes, used=elapsed() + finish)
        return min(steps, trial.most_steps) * trial.batches.tokens_per_step

    return bench.largest(map(Draft.named, RECIPES), readable=readable)


def _affordable_steps(trial: Trial, minutes: float, *, used: float) -> int:
    """The steps that minutes leave room for beside the seconds that are used."""
    left = BUDGET_SHARE * 60 * minutes - used
    return max(0, int(left / (trial.step_seconds * (1 + EVALUATION_SHARE))))


def _steps(trial: Trial, options: TrainingOptions, *, used: float) -> int:
    """The steps that the budget is, or that the minutes leave room for and the text is worth."""
    if options.steps is not None:
        return options.steps
    if options.epochs is not None:
        return max(1, math.ceil(options.epochs * trial.batches.steps_per_epoch))
    assert options.minutes is not None
    steps = _affordable_steps(trial, options.minutes, used=used)
    if steps < 1:
        raise OptionError(
            [
                f"--minutes is {options.minutes:g}, too short for one step of this network: "
                f"starting and finishing take {used:.0f} seconds and a step "
                f"{trial.step_seconds:.2g}; give more minutes or a smaller network."
            ]
        )
    return min(steps, trial.most_steps)


def _evaluations(trial: Trial, corpus: EncodedCorpus, steps: int) -> tuple[int, int, float]:
    """Steps from one evaluation to the next, tokens that it reads, and the seconds of them all.

    It judges trained and averaged weights, at several temperatures each.
    """
    every = max(1, math.ceil(steps / EVALUATIONS))
    extra = _TEMPERATURES * trial.architecture.vocabulary * _SOFTMAX_SECONDS
    seconds = 2 * (trial.token_seconds + extra)
    affordable = EVALUATION_SHARE * every * trial.step_seconds / seconds
    tokens = min(_held_out(corpus), max(int(affordable), FEWEST_TOKENS))
    return every, tokens, math.ceil(steps / every) * tokens * seconds


def _held_out(corpus: EncodedCorpus) -> int:
    """Held-out tokens that a figure may rest on."""
    return min(max(len(corpus.validation.tokens) - 1, 0), REPORT_TOKENS)


def _last_figures(
    trial: Trial, options: TrainingOptions, corpus: EncodedCorpus
) -> tuple[Mapping[Protocol, int], float]:
    """How many tokens each of the last figures reads, and the seconds from there to the end."""
    # They are taken in float32.
    windows = trial.token_seconds * (_FLOAT32_SLOWDOWN if trial.precision == "bfloat16" else 1.0)
    one_lane = corpus.documents == "none"
    costs: dict[Protocol, float] = {
        "windows": windows,
        "stateful": windows * (_STATEFUL_SLOWDOWN if one_lane else 1.0),
    }
    if options.minutes is None:
        share = max(
            REPORT_SHARE * _steps(trial, options, used=0.0) * trial.step_seconds, REPORT_SECONDS
        )
    else:
        share = REPORT_SHARE * 60 * options.minutes
    tokens = {
        protocol: min(_held_out(corpus), max(int(share / cost), FEWEST_TOKENS))
        for protocol, cost in costs.items()
    }
    return tokens, _FINISH_SECONDS + sum(tokens[protocol] * costs[protocol] for protocol in costs)
