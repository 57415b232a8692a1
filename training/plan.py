"""What a run is going to do, fixed and saved before its first step.

The options leave open what depends on the corpus and the machine: vocabulary, arithmetic, threads,
and how many steps fit into the minutes. `make_plan` settles these, the last by timing real steps on
a throw-away copy of the network. From then on nothing is measured any more: a run is its plan, and
a resumed run follows the plan that was saved.
"""

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import torch

from charloom.architecture import Architecture
from charloom.errors import OptionError
from training.batches import Batches
from training.config import DEFAULT_MINUTES, DEVICE_REMEDY, TrainingOptions
from training.corpus import EncodedCorpus
from training.evaluation import Protocol
from training.learner import Learner
from training.recurrence import Arithmetic

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
_ID_BYTES = 40  # of inputs and targets, and of finding them in the text
_COPIES = 8  # weights, gradient, two moments, average, best, and two on their way to the disk
_WARMUP_STEPS = 2  # the first steps build kernels
_FORWARD_SHARE = 0.4  # a forward pass costs a third of a step, a little more without large batches
_STATEFUL_SLOWDOWN = 3.0  # one lane against many: 1.8 to 2.8 measured, fp32, 2x256 to 2x1024
_FLOAT32_SLOWDOWN = 2.0  # against bfloat16; 1.3 to 1.8 measured
_CLEARLY_FASTER = 1.2  # what bfloat16 must gain; less may be chance, and the next run's other way
_FINISH_SECONDS = 4.0  # drawing the curves, model card, last save


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything that decides what a run computes, and so what it can be resumed with."""

    options: TrainingOptions
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


def choose_device(name: str) -> torch.device:
    """The device of this name; `auto` takes CUDA where it is present, else the processor.

    Raises `OptionError` for a device that torch does not know or this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError([f"--device is {name!r}; {DEVICE_REMEDY}."]) from error
    match device.type:
        case "cpu":
            is_present = True
        case "cuda":
            # Read when CUDA starts; without it cuBLAS may sum in another order at the next run.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            index = 0 if device.index is None else device.index
            is_present = index < torch.cuda.device_count()
        case "mps":
            is_present = torch.backends.mps.is_available()
        case _:
            is_present = False
    if not is_present:
        raise OptionError([f"--device is {name!r}, which this machine does not have; try auto."])
    return device


def too_large(options: TrainingOptions, architecture: Architecture) -> OptionError:
    """The error about a network whose steps do not fit the memory."""
    return OptionError(
        [
            f"--hidden {options.hidden} with --layers {options.layers} makes "
            f"{architecture.parameters:,} parameters, which with --batch-size "
            f"{options.batch_size} and --sequence-length {options.sequence_length} do not fit the "
            "memory; make one of them smaller."
        ]
    )


def memory_needed(options: TrainingOptions, architecture: Architecture, positions: int) -> int:
    """Bytes that a step on so many positions (lanes x steps) takes at least.

    Within a position: token ids and masks, four times the logits, and of each unit its gates, its
    state and its output, forward and back. Measured: this, or up to twice as much.
    """
    width = 2 if options.precision == "bfloat16" else 4  # auto tries float32 too
    units = architecture.layers * architecture.hidden * (2 * architecture.gates + 4)
    return (
        _COPIES * 4 * architecture.parameters
        + (_ID_BYTES + 4 * 4 * architecture.vocabulary + width * units) * positions
    )


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def calibrate(
    options: TrainingOptions,
    architecture: Architecture,
    batches: Batches,
    *,
    device: torch.device,
    seconds: float,
) -> tuple[Arithmetic, float]:
    """The arithmetic to use and the seconds a step takes with it, from steps on throw-away copies.

    `auto` times both; some processors refuse bfloat16, some emulate it. Raises `OptionError` where
    bfloat16 was asked for and refused, and where a step does not fit the memory.
    """
    candidates: list[Arithmetic] = (
        ["float32", "bfloat16"] if options.precision == "auto" else [options.precision]
    )
    times: dict[Arithmetic, float] = {}
    refusal: RuntimeError | None = None
    for precision in candidates:
        try:
            learner = Learner(options, architecture, steps=1, precision=precision, device=device)
            times[precision] = _step_seconds(learner, batches, seconds / len(candidates))
        except MemoryError as error:  # NumPy's; torch has none of its own
            raise too_large(options, architecture) from error
        except RuntimeError as error:
            if "memory" in str(error):
                raise too_large(options, architecture) from error
            if precision == "float32":
                raise
            refusal = error
    if not times:
        message = "--precision is 'bfloat16', which this machine refuses; use auto or float32."
        raise OptionError([message]) from refusal
    best = choose_precision(times)
    return best, times[best]


def choose_precision(seconds: Mapping[Arithmetic, float]) -> Arithmetic:
    """Which arithmetic to use, by the seconds of a step with each that is possible here.

    bfloat16 only where it is clearly faster, so that chance does not decide between two runs.
    """
    if "float32" not in seconds:
        return "bfloat16"
    if "bfloat16" not in seconds or seconds["float32"] < _CLEARLY_FASTER * seconds["bfloat16"]:
        return "float32"
    return "bfloat16"


def _step_seconds(learner: Learner, batches: Batches, seconds: float) -> float:
    """Median time of a step, over as many as fit into `seconds`, at least three."""
    times: list[float] = []
    began = time.perf_counter()
    for step, batch in enumerate(batches.since(0)):
        start = time.perf_counter()
        learner.learn(batch, step=step, rate=0.0)
        now = time.perf_counter()
        times.append(now - start)
        if len(times) > _WARMUP_STEPS + 2 and now - began > seconds:
            break
    return statistics.median(times[_WARMUP_STEPS:])


def make_plan(
    options: TrainingOptions,
    corpus: EncodedCorpus,
    *,
    elapsed: Callable[[], float],
    measure: Callable[..., tuple[Arithmetic, float]] = calibrate,
) -> Plan:
    """Settle a plan for this corpus on this machine.

    `elapsed` tells the seconds already used, and `measure` what `calibrate` does.

    Raises `OptionError` where the budget leaves no time for a single step, or the precision or
    device asked for is not there.
    """
    if options.minutes is None and options.epochs is None and options.steps is None:
        options = replace(options, minutes=DEFAULT_MINUTES)
    device = choose_device(options.device)
    threads = torch.get_num_threads() if options.threads is None else options.threads
    torch.set_num_threads(threads)
    embedding = options.embedding
    if embedding is None:
        embedding = options.hidden if options.tied else min(options.hidden, 128)
    architecture = Architecture(
        cell=options.cell,
        vocabulary=corpus.tokenizer.vocabulary_size,
        embedding=embedding,
        hidden=options.hidden,
        layers=options.layers,
        residual=options.residual,
        tied=options.tied,
    )
    batches = Batches(
        corpus.train,
        batch_size=options.batch_size,
        sequence_length=options.sequence_length,
        seed=options.seed,
    )
    needed = memory_needed(options, architecture, batches.largest)
    if device.type == "cpu" and needed > _physical_memory():
        raise too_large(options, architecture)
    if options.minutes is None:
        budget = _GLANCE_SECONDS
    else:
        budget = min(_CALIBRATION_SECONDS, 60 * options.minutes * _CALIBRATION_SHARE)
    precision, step_seconds = measure(options, architecture, batches, device=device, seconds=budget)
    held_out = min(max(len(corpus.validation.tokens) - 1, 0), REPORT_TOKENS)
    token_seconds = step_seconds * _FORWARD_SHARE / batches.tokens_per_step
    # The last report is in float32.
    windows_seconds = token_seconds * (_FLOAT32_SLOWDOWN if precision == "bfloat16" else 1.0)
    one_lane = corpus.documents == "none"
    costs: dict[Protocol, float] = {
        "windows": windows_seconds,
        "stateful": windows_seconds * (_STATEFUL_SLOWDOWN if one_lane else 1.0),
    }
    if options.minutes is None:
        steps = _asked_steps(options, batches)
        share = max(REPORT_SHARE * steps * step_seconds, REPORT_SECONDS)
    else:
        share = REPORT_SHARE * 60 * options.minutes
    report = {
        protocol: min(held_out, max(int(share / cost), FEWEST_TOKENS))
        for protocol, cost in costs.items()
    }
    finish = _FINISH_SECONDS + sum(report[protocol] * cost for protocol, cost in costs.items())
    if options.minutes is not None:
        steps = _fitting_steps(options.minutes, used=elapsed() + finish, step_seconds=step_seconds)
    every = max(1, math.ceil(steps / EVALUATIONS))
    affordable = EVALUATION_SHARE * every * step_seconds / (2 * token_seconds)
    evaluation = min(held_out, max(int(affordable), FEWEST_TOKENS))
    evaluations = 2 * math.ceil(steps / every)
    expected = elapsed() + steps * step_seconds + evaluations * evaluation * token_seconds + finish
    if options.minutes is not None:
        expected = min(expected, 60 * options.minutes)  # a plan that would miss them is shortened
    return Plan(
        options=options,
        architecture=architecture,
        corpus=corpus.fingerprint,
        steps=steps,
        epochs=steps / batches.steps_per_epoch,
        evaluate_every=every,
        evaluation_tokens=evaluation,
        report_tokens=report,
        finish_seconds=finish,
        precision=precision,
        device=str(device),
        threads=threads,
        instruction_set=current_platform()["instruction set"],
        torch=torch.__version__,
        expected_seconds=expected,
    )


def _asked_steps(options: TrainingOptions, batches: Batches) -> int:
    """The steps that --steps or --epochs stand for."""
    if options.epochs is not None:
        return max(1, math.ceil(options.epochs * batches.steps_per_epoch))
    assert options.steps is not None
    return options.steps


def _fitting_steps(minutes: float, *, used: float, step_seconds: float) -> int:
    """The steps, with their evaluations, for which the minutes leave time beside what is used."""
    left = BUDGET_SHARE * 60 * minutes - used
    steps = int(left / (step_seconds * (1 + EVALUATION_SHARE)))
    if steps < 1:
        raise OptionError(
            [
                f"--minutes is {minutes:g}, too short for one step of this network: "
                f"starting and finishing take {used:.0f} seconds and a step "
                f"{step_seconds:.2g}; give more minutes or a smaller network."
            ]
        )
    return steps
