"""The training loop: follow the plan, keep the best weights, lose nothing.

Each turn of the loop is one batch, one step of the learner, and then what is due: an evaluation
by step, a save by clock. Saving changes nothing that is computed, and everything the next step
depends on is in what is saved, so a run that was killed at any moment and resumed ends bit for bit
where the uninterrupted one ends (same processor, same torch). The published weights are the better
of the trained and the averaged ones at the best evaluation so far; without held-out text, the
averaged. Weights are judged, and published, with their output layer divided by the temperature that
fits the held-out text best: how sure a network is of itself is then no part of how good it is.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from charloom.architecture import Architecture
from charloom.checkpoint import Checkpoint, ModelWriter, TrainerState
from charloom.errors import DivergenceError, ResumeError
from charloom.model import Model
from training.batches import Batches
from training.corpus import EncodedCorpus
from training.evaluation import PROTOCOLS, Loss, evaluate
from training.learner import Learner, rare_tokens
from training.network import Network
from training.optimiser import learning_rate
from training.plan import Plan
from training.progress import Best, Progress
from training.runlog import Console, duration, visible
from training.scalars import Scalars

SAMPLE_EVERY = 4
SAMPLE_TOKENS = 160
"""After every so many evaluations a sample of this length is shown."""

SAVE_SECONDS = 20.0
"""Clock time between saves: the most that a kill can cost."""

FITTED_FROM = 1000
"""Held-out tokens that a temperature can be fitted to; fewer say too little."""

TEMPERATURE_STEP = 1.05
"""How far the temperature may move from one evaluation to the next, up or down.

Between two such steps the loss is within 0.0005 nats of its least.
"""

_SMOOTHING = 0.05
_FINAL_SHARE = 0.97


class _Interrupted(Exception):
    """The wish to stop, on its way out of a measurement."""


class Outcome(Enum):
    """Why the loop ended."""

    FINISHED = "finished"
    NO_PROGRESS = "no progress"
    OUT_OF_TIME = "out of time"
    INTERRUPTED = "interrupted"


class Trainer:
    """One run of one plan; `learner` is what it trains.

    `elapsed` tells the seconds since the command began; `interrupted` whether it was asked to stop;
    `scalars` take the lines of the history too.
    """

    def __init__(
        self,
        plan: Plan,
        corpus: EncodedCorpus,
        writer: ModelWriter,
        *,
        console: Console,
        elapsed: Callable[[], float] = time.monotonic,
        interrupted: Callable[[], bool] = lambda: False,
        scalars: Scalars | None = None,
    ) -> None:
        torch.set_num_threads(plan.threads)
        self._plan = plan
        self._corpus = corpus
        self._writer = writer
        self._console = console
        self._elapsed = elapsed
        self._interrupted = interrupted
        self._scalars = scalars
        self._progress = Progress()
        self._best_weights: dict[str, NDArray[Any]] = {}
        self._reports: dict[str, Any] = {}
        self._saved_step = 0
        # Of a resumed run the seconds before count, but not the start-up of this process.
        self._seconds_before = 0.0
        self._seconds_aside = 0.0
        self.learner = Learner(
            plan.recipe,
            plan.architecture,
            steps=plan.steps,
            seed=plan.options.seed,
            precision=plan.precision,
            device=torch.device(plan.device),
            unknown=corpus.tokenizer.unknown,
            rare=torch.from_numpy(rare_tokens(corpus.token_counts, corpus.tokenizer.end)),
        )
        self._batches = Batches(
            corpus.train,
            batch_size=plan.recipe.batch_size,
            sequence_length=plan.recipe.sequence_length,
            seed=plan.options.seed,
        )

    def restore(self, checkpoint: Checkpoint, state: TrainerState) -> None:
        """Go on from a saved run of this plan; raises `ResumeError` when it is of another."""
        self._progress = Progress.from_json(state.values["progress"])
        self._seconds_before = self._progress.seconds
        self._seconds_aside = self._elapsed()
        self._saved_step = self._progress.step
        tensors = {name: torch.from_numpy(array) for name, array in state.arrays.items()}
        try:
            self.learner.load(tensors, step=self._progress.step)
        except (KeyError, RuntimeError) as error:
            raise ResumeError(
                f"{self._writer.path.name} cannot be resumed: its trainer state is not that of its "
                f"plan ({error}). Train again with --overwrite."
            ) from error
        if self._progress.best is not None:
            self._best_weights = {name: part.copy() for name, part in checkpoint.tensors.items()}
        self._reports = dict(checkpoint.summary["validation"])
        self._writer.cut_history(self._progress.step)

    def run(self) -> Outcome:
        """Follow the plan to its end, or until there is no progress, no time, or a wish to stop.

        Everything is saved in the end; `finish` then says that there is nothing left to do. A wish
        to stop is heard until the last measurement is over; a resumed run then takes that again.
        Raises `DivergenceError` when the loss explodes and `StorageError` when a save is refused;
        what was saved before remains.
        """
        if self._progress.step == 0 and not self._writer.holds_another:
            self._save()
        self._console.start(
            self._progress.step, self._steps, characters_per_token=self._characters_per_token
        )
        try:
            outcome = self._follow()
        except DivergenceError as error:
            raise DivergenceError(f"{error} {self._what_is_kept}") from error
        finally:
            self._console.stop()
        if outcome is not Outcome.INTERRUPTED:
            try:
                self._report()
            except _Interrupted:
                outcome = Outcome.INTERRUPTED
        self._save()
        return outcome

    def finish(self) -> None:
        """Save that the run is over; a run killed before this is resumed, and ends the same."""
        self._progress = replace(self._progress, finished=True)
        self._save()

    def _follow(self) -> Outcome:
        """The loop: step by step until one of the reasons to end it holds."""
        plan = self._plan
        batches = self._batches.since(self._progress.step)
        first, began, saved = self._progress.step, self._elapsed(), self._elapsed()
        while (step := self._progress.step) < self._steps:
            if self._progress.stale >= plan.options.patience:
                return Outcome.NO_PROGRESS
            if self._is_out_of_time:
                return Outcome.OUT_OF_TIME
            if self._interrupted():
                return Outcome.INTERRUPTED
            batch = next(batches)
            rate = learning_rate(
                step,
                peak=plan.recipe.learning_rate,
                planned=plan.steps,
                shortened=self._progress.shortened,
            )
            nats, norm = self.learner.learn(batch, step=step, rate=rate)
            self._advance(nats, batch.tokens, rate)
            self._console.stepped(step + 1, self._steps, nats, batch.tokens)
            is_evaluated = step + 1 == self._steps or (step + 1) % plan.evaluate_every == 0
            if is_evaluated:
                self._evaluate(rate, norm)
                self._keep_to_budget((self._elapsed() - began) / (step + 1 - first))
            if is_evaluated or self._elapsed() - saved > SAVE_SECONDS:
                self._save()
                saved = self._elapsed()
        return Outcome.FINISHED

    @property
    def _steps(self) -> int:
        """How many steps this run takes, after a shortening if there was one."""
        shortened = self._progress.shortened
        return self._plan.steps if shortened is None else shortened[1]

    @property
    def _seconds(self) -> float:
        """Seconds spent on this run in all, in this process and those before."""
        return self._seconds_before + self._elapsed() - self._seconds_aside

    @property
    def _published(self) -> dict[str, NDArray[Any]]:
        """The weights that are the model: the best evaluated, and the average until there are."""
        if self._best_weights:
            return self._best_weights
        return tempered(_arrays(self.learner.average.weights), self._temperature)

    @property
    def _temperature(self) -> float:
        """What the published output layer is divided by."""
        if self._progress.best is not None:
            return self._progress.best.temperature
        given = self._plan.options.output_temperature
        return 1.0 if given is None else given

    @property
    def _temperatures(self) -> Sequence[float]:
        """Those that an evaluation tries; a tied output layer, the embedding too, has but 1."""
        plan, now = self._plan, self._progress.temperature
        given = plan.options.output_temperature
        if given is not None:
            return (given,)
        if plan.recipe.tied or plan.evaluation_tokens < FITTED_FROM:
            return (1.0,)
        return (now / TEMPERATURE_STEP, now, now * TEMPERATURE_STEP)

    @property
    def _what_is_kept(self) -> str:
        if self._writer.holds_another:
            return f"The model that was to be replaced is still in {self._writer.path}."
        return f"The model as of step {self._saved_step:,} is kept in {self._writer.path}."

    @property
    def _is_out_of_time(self) -> bool:
        budget = self._plan.seconds
        return (
            budget is not None and self._progress.shortened is not None and (self._seconds > budget)
        )

    def _advance(self, nats: float, tokens: int, rate: float) -> None:
        """Count one step; raises `DivergenceError` when the running loss is beyond all guessing."""
        before = self._progress
        smooth = (
            nats if before.smooth is None else (before.smooth + _SMOOTHING * (nats - before.smooth))
        )
        hopeless = 2 * math.log(self._plan.architecture.vocabulary)
        if smooth > hopeless:
            raise DivergenceError(
                f"Training diverged at step {before.step + 1}: the running loss is {smooth:.2f} "
                f"nats, twice that of blind guessing, at learning rate {rate:.3g}. Train again "
                "with --overwrite and a smaller --learning-rate than "
                f"{self._plan.recipe.learning_rate:g}."
            )
        self._progress = replace(
            before,
            step=before.step + 1,
            sum_nats=before.sum_nats + nats * tokens,
            sum_tokens=before.sum_tokens + tokens,
            smooth=smooth,
        )

    def _evaluate(self, rate: float, norm: float) -> None:
        """Measure the trained and the averaged weights on held-out text; publish the better."""
        progress, learner = self._progress, self.learner
        line: dict[str, Any] = {
            "step": progress.step,
            "seconds": round(self._seconds, 1),
            "training": progress.sum_nats / progress.sum_tokens / self._characters_per_token,
            "learning_rate": rate,
            "gradient_norm": norm,
        }
        best, stale, temperature = progress.best, progress.stale, progress.temperature
        if self._has_held_out:
            stale += 1
            trained = {name: part.detach() for name, part in learner.network.named_parameters()}
            for name, weights in (("trained", trained), ("averaged", learner.average.weights)):
                loss = self._loss(weights)
                line[name] = loss.nats_per_character
                temperature = loss.temperature  # the average's, which comes last
                if best is None or loss.nats_per_token < best.nats:
                    best = Best(
                        progress.step, loss.nats_per_token, name == "averaged", loss.temperature
                    )
                    stale = 0
                    self._best_weights = tempered(_arrays(weights), loss.temperature)
                    self._reports = {"windows": loss.to_json()}
        self._progress = replace(
            progress,
            best=best,
            stale=stale,
            temperature=temperature,
            sum_nats=0.0,
            sum_tokens=0,
        )
        self._tell(line)
        self._console.evaluated(line, self._steps)
        if progress.step // self._plan.evaluate_every % SAMPLE_EVERY == 0:
            text = self.sample(SAMPLE_TOKENS)
            self._console.note("\n".join(f"    | {visible(line)}" for line in text.split("\n")))

    def _tell(self, line: Mapping[str, Any]) -> None:
        """Add a line to the history."""
        self._writer.append_history(line)
        if self._scalars is not None:
            self._scalars.add(line)

    def _loss(self, weights: Mapping[str, Tensor]) -> Loss:
        """Windows loss of these weights on the plan's share of the held-out text, tempered."""
        network = Network(self._plan.architecture)
        network.to(self._plan.device).load_state_dict(dict(weights))
        loss = evaluate(
            network,
            self._corpus.validation,
            self._corpus.tokenizer,
            protocol="windows",
            limit=self._plan.evaluation_tokens,
            temperatures=self._temperatures,
            precision=self._plan.precision,
        )
        if not math.isfinite(loss.nats):
            raise DivergenceError(
                f"Training diverged at step {self._progress.step}: the held-out loss became "
                f"{loss.nats}. Train again with --overwrite and a smaller --learning-rate "
                f"than {self._plan.recipe.learning_rate:g}."
            )
        return loss

    def _keep_to_budget(self, step_seconds: float) -> None:
        """Shorten the plan, once, when the machine has become too slow to finish it in time."""
        progress, budget = self._progress, self._plan.seconds
        if budget is None or progress.shortened is not None or self._seconds < budget / 2:
            return
        finish = self._plan.finish_seconds
        left = self._steps - progress.step
        if self._seconds + left * step_seconds + finish <= budget:
            return
        fits = int((_FINAL_SHARE * budget - finish - self._seconds) / step_seconds)
        steps = progress.step + max(fits, 1)
        if steps >= self._steps:
            return
        self._progress = replace(progress, shortened=(progress.step, steps))
        self._tell({"step": progress.step, "event": "shortened", "steps": steps})
        self._console.note(
            f"The machine has become slower: the plan ends after {steps:,} steps instead of "
            f"{self._plan.steps:,}."
        )

    def _report(self) -> None:
        """Measure the published weights by both protocols in float32: the figures of the model."""
        if not self._has_held_out:
            return
        left = duration(self._plan.finish_seconds)
        self._console.note(f"Measuring the held-out text; done in about {left}.")
        network = Network.from_arrays(self._plan.architecture, self._published)
        network.to(self._plan.device)
        for protocol in PROTOCOLS:
            self._reports[protocol] = evaluate(
                network,
                self._corpus.validation,
                self._corpus.tokenizer,
                protocol=protocol,
                limit=self._plan.report_tokens[protocol],
                between=self._heed_interruption,
            ).to_json()

    def _heed_interruption(self) -> None:
        if self._interrupted():
            raise _Interrupted

    def _save(self) -> None:
        """Commit weights, progress and the learner's state together."""
        self._progress = replace(self._progress, seconds=self._seconds)
        state = TrainerState(
            arrays=_arrays(self.learner.state()),
            values={
                "plan": self._plan.to_json(),
                "progress": asdict(self._progress),
                "corpus": {
                    "sources": [lasting(source) for source in self._corpus.description["sources"]],
                    "options": self._corpus.description["options"],
                },
            },
        )
        self._writer.commit(
            architecture=self._plan.architecture,
            tokenizer=self._corpus.tokenizer,
            tensors=self._published,
            token_counts=self._corpus.token_counts,
            documents=self._corpus.documents,
            summary=self.summary(),
            trainer=state,
        )
        self._saved_step = self._progress.step

    @property
    def architecture(self) -> Architecture:
        """The network's shape."""
        return self._plan.architecture

    def sample(self, tokens: int) -> str:
        """What the published weights write from nothing at temperature 0.8, seed of the run."""
        checkpoint = Checkpoint(
            path=self._writer.path,
            architecture=self._plan.architecture,
            tokenizer=self._corpus.tokenizer,
            tensors=self._published,
            token_counts=self._corpus.token_counts,
            documents=self._corpus.documents,
            summary={},
            fingerprint="",
        )
        seed = self._plan.options.seed
        return Model(checkpoint).generate(max_tokens=tokens, temperature=0.8, seed=seed).text

    def summary(self) -> dict[str, Any]:
        """What `config.json`, the model card and the end of the command tell of this run."""
        progress = self._progress
        return {
            "options": asdict(self._plan.options),
            "recipe": {"name": self._plan.recipe_name, **asdict(self._plan.recipe)},
            "corpus": dict(self._corpus.description),
            "step": progress.step,
            "steps": self._steps,
            "epochs": progress.step / self._batches.steps_per_epoch,
            "seconds": round(progress.seconds, 1),
            "finished": progress.finished,
            "precision": self._plan.precision,
            "threads": self._plan.threads,
            "platform": self._plan.platform,
            "temperature": self._temperature,
            "best": None if progress.best is None else asdict(progress.best),
            "validation": self._reports,
        }

    @property
    def _characters_per_token(self) -> float:
        return self._corpus.train.characters / max(len(self._corpus.train.tokens), 1)

    @property
    def _has_held_out(self) -> bool:
        return len(self._corpus.validation.tokens) > 1


def lasting(source: str) -> str:
    """A source as it can be found again from another working directory."""
    return str(Path(source).resolve()) if Path(source).exists() else source


def tempered(weights: Mapping[str, NDArray[Any]], temperature: float) -> dict[str, NDArray[Any]]:
    """The same network with its logits divided by `temperature`."""
    return {
        name: part / np.float32(temperature) if name.startswith("output.") else part
        for name, part in weights.items()
    }


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    """Copies in memory of the processor, so that training may go on."""
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in tensors.items()}
