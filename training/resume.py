"""A run that was saved, found again: its plan, its corpus and its state, or the reason why not."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from charloom import checkpoint as checkpoints
from charloom.checkpoint import Checkpoint, TrainerState
from charloom.errors import OptionError, ResumeError
from training.corpus import CorpusOptions, EncodedCorpus, open_corpus, prepare_corpus
from training.device import choose_device
from training.plan import Plan, current_platform
from training.progress import Progress


@dataclass(frozen=True, slots=True)
class SavedRun:
    """All that a `Trainer` needs to go on as if nothing had happened."""

    plan: Plan
    corpus: EncodedCorpus
    checkpoint: Checkpoint
    state: TrainerState
    step: int


def saved_run(
    folder: Path,
    choices: Mapping[str, Any],
    sources: Sequence[str],
    *,
    report: Callable[[str], None],
    progress_bar: Callable[[int, int | None], None] | None = None,
) -> SavedRun:
    """The run saved in `folder`; `choices` and `sources` are what was given again, if anything.

    Raises `ResumeError` when there is nothing to go on with, or an option, the architecture or the
    text differs from the run's own, and `CheckpointError` when the folder does not verify.
    """
    checkpoint = checkpoints.load(folder)
    state = checkpoints.load_trainer(folder)
    try:
        plan = Plan.from_json(state.values["plan"])
        progress = Progress.from_json(state.values["progress"])
        corpus_options = CorpusOptions(**state.values["corpus"]["options"])
        own_sources = [str(source) for source in state.values["corpus"]["sources"]]
        choose_device(plan.device)
        if plan.architecture != checkpoint.architecture or plan.evaluate_every < 1:
            raise ValueError("plan and weights do not belong together")
    except (KeyError, TypeError, ValueError, OptionError) as error:
        raise ResumeError(
            f"{folder.name} cannot be resumed here: what its trainer folder tells is of another "
            f"version or another machine ({error}). Train again with --overwrite."
        ) from error
    if progress.finished:
        raise ResumeError(
            f"{folder.name} has finished after {progress.step:,} steps, so there is nothing to "
            "resume; train under another name, or again with --overwrite."
        )
    recorded = {
        **asdict(plan.options),
        **asdict(plan.recipe),
        **asdict(corpus_options),
        "recipe": plan.recipe_name,
    }
    differing = [
        f"--{name.replace('_', '-')} {value} (the run has {recorded[name]})"
        for name, value in choices.items()
        if value != recorded[name]
    ]
    if differing:
        raise ResumeError(
            f"{folder.name} goes on by its own plan, which differs from {', '.join(differing)}; "
            "leave these options out, or train under another name."
        )
    corpus = _find_corpus(
        folder.name, plan.corpus, corpus_options, sources, own_sources, report, progress_bar
    )
    if plan.platform != current_platform():
        report(
            "This processor or torch differs from the one the run began on: it goes on, but not "
            "bit for bit as it would have there."
        )
    report(f"Resuming {folder.name} after step {progress.step:,} of {plan.steps:,}.")
    return SavedRun(plan, corpus, checkpoint, state, progress.step)


def _find_corpus(
    name: str,
    fingerprint: str,
    options: CorpusOptions,
    sources: Sequence[str],
    own_sources: Sequence[str],
    report: Callable[[str], None],
    progress_bar: Callable[[int, int | None], None] | None,
) -> EncodedCorpus:
    """The corpus of the run: from the sources given, else the cache, else the files it names."""
    if not sources:
        cached = open_corpus(fingerprint)
        if cached is not None:
            return cached
        # What came from a pipe or an address, perhaps with a password, is not fetched unasked.
        if any(source == "-" or "://" in source for source in own_sources):
            raise ResumeError(
                f"The encoded corpus of {name} is no longer in the cache, and it came from "
                f"{', '.join(own_sources)}; give the corpus again: charloom train CORPUS --resume "
                f"--name {name}"
            )
        sources = own_sources
        report("The encoded corpus is no longer in the cache; its sources are read again.")
    corpus = prepare_corpus(sources, options, report=report, progress=progress_bar)
    if corpus.fingerprint != fingerprint:
        raise ResumeError(
            f"{', '.join(sources)} is not the text that {name} was trained on; give that text, or "
            "train under another name."
        )
    return corpus
