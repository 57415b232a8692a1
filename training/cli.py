"""`charloom train` and `charloom evaluate`.

The product of training is a folder: its path is all that goes to standard output. The plan, the
progress and every remark go to standard error.
"""

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, get_args

import click
import torch
from tqdm import tqdm

from charloom.checkpoint import ModelWriter, WriteMode, check_name, find_model
from charloom.cli import is_watched, standard_output
from charloom.cli.arithmetic import precision_option, threads_option
from charloom.cli.context import Context
from charloom.cli.options import options_of
from charloom.errors import ModelNameError, OptionError
from charloom.model import load
from charloom.params import Precision
from training.choices import attempt, read_choices
from training.config import TrainingOptions
from training.corpus import CorpusOptions, encode_text, prepare_corpus
from training.corpus.options import Documents
from training.evaluation import PROTOCOLS, Loss, adapt, appraise
from training.memory import keep_freed_memory
from training.network import Network
from training.plan import make_plan
from training.recipe import Recipe
from training.report import end_text, leave_companions, loss_table, plan_text
from training.resume import SavedRun, saved_run
from training.runlog import Console
from training.scalars import Scalars, check_folder
from training.trainer import Outcome, Trainer


@click.command()
@click.argument("corpus", nargs=-1)
@click.option("--name", help="Name of the model: its folder in the models folder.")
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    metavar="FILE.toml",
    help="Take options from a TOML file (names as here, with _ for -); the command line wins.",
)
@click.option("--overwrite", is_flag=True, help="Replace the model of this name.")
@click.option("--resume", is_flag=True, help="Go on with a run that was interrupted, exactly.")
@click.option(
    "--tensorboard",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write the figures of each evaluation for TensorBoard too, into DIR/NAME.",
)
@options_of(CorpusOptions)
@options_of(TrainingOptions)
@options_of(Recipe)
@click.pass_context
def train(
    ctx: click.Context,
    /,
    *,
    corpus: tuple[str, ...],
    name: str | None,
    config_file: Path | None,
    overwrite: bool,
    resume: bool,
    tensorboard: Path | None,
    **_: Any,
) -> None:
    """Train a model on CORPUS: files, folders, globs, addresses, - or a built-in corpus.

    Built in: python-docs (the language reference) and python-stdlib (Python's own source).
    """
    began = time.monotonic() - time.process_time()  # imports belong to the command's time too
    keep_freed_memory()
    console = Console(sys.stderr)
    problems = _name_problems(name)
    choices = read_choices(ctx, config_file, problems)
    if overwrite and resume:
        problems.append("--overwrite and --resume are both given; keep one of them.")
    if not corpus and not resume:
        problems.append(
            "No corpus is given; name a file, folder, address, - for standard input, python-docs "
            "or python-stdlib."
        )
    if tensorboard is not None:
        attempt(problems, check_folder, tensorboard)
    if problems or name is None or choices is None:
        raise OptionError(problems)
    context: Context = ctx.obj
    folder = context.models / name
    # What the user has to say to mean this model again.
    model = str(folder) if context.is_named else name

    def elapsed() -> float:
        return time.monotonic() - began

    stop = StopRequest()
    mode: WriteMode = "resume" if resume else "overwrite" if overwrite else "new"
    with ExitStack() as stack:
        stack.enter_context(_sigterm_exits())
        writer = stack.enter_context(ModelWriter(folder, mode=mode))
        run: SavedRun | None = None
        if resume:
            run = saved_run(
                folder, choices.said, corpus, report=console.note, progress_bar=console.reading
            )
            plan, encoded = run.plan, run.corpus
        else:
            encoded = prepare_corpus(
                corpus, choices.corpus, report=console.note, progress=console.reading
            )
            plan = make_plan(choices.training, choices.recipe, encoded, elapsed=elapsed)
            console.note(plan_text(plan, encoded))
        scalars: Scalars | None = None
        if tensorboard is not None:
            after = 0 if run is None else run.step
            scalars = stack.enter_context(
                Scalars(tensorboard / name, after=after, report=console.note)
            )
        trainer = Trainer(
            plan,
            encoded,
            writer,
            console=console,
            elapsed=elapsed,
            interrupted=stop,
            scalars=scalars,
        )
        if run is not None:
            trainer.restore(run.checkpoint, run.state)
        with stop.listening():
            outcome = trainer.run()
            is_over = outcome is not Outcome.INTERRUPTED
            leave_companions(writer, trainer, model=model, is_over=is_over)
            if is_over:
                trainer.finish()
    console.note(end_text(outcome, model, trainer.summary(), elapsed()))
    click.echo(str(folder))
    if stop.signal is not None and outcome is Outcome.INTERRUPTED:
        ctx.exit(128 + stop.signal)


@contextmanager
def _sigterm_exits() -> Iterator[None]:
    """Let SIGTERM run what cleans up: a name without anything saved under it is given free."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class StopRequest:
    """Whether a signal asked the run to stop, and which one."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self) -> bool:
        """True once asked."""
        return self.signal is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the first Ctrl-C or SIGTERM as a request; a second one acts as ever."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def take(number: int, frame: FrameType | None) -> None:
            del frame
            self.signal = number
            restore()

        for number in before:
            signal.signal(number, take)
        try:
            yield
        finally:
            restore()


def _name_problems(name: str | None) -> list[str]:
    if name is None:
        return ["No name is given; name the model with --name NAME."]
    try:
        check_name(name)
    except ModelNameError as error:
        return [str(error)]
    return []


@click.command()
@click.argument("model")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--json", "as_json", is_flag=True, help="Write the figures as one line of JSON.")
@click.option(
    "--documents",
    type=click.Choice(get_args(Documents)),
    help="Where documents end [default: as the model was trained].",
)
@click.option("--field", help="Field of JSONL or column of CSV that holds the text.")
@click.option(
    "--encoding", default="utf-8", show_default=True, help="Encoding of the text, or auto."
)
@click.option(
    "--dynamic",
    type=float,
    metavar="RATE",
    help="Let a copy of the model go on learning from the text it has read, in steps of this size "
    "(0.001 is a good one), and report that loss too: dynamic evaluation.",
)
@precision_option
@threads_option
@click.pass_obj
def evaluate(
    context: Context,
    /,
    *,
    model: str,
    files: tuple[str, ...],
    as_json: bool,
    documents: str | None,
    field: str | None,
    encoding: str,
    dynamic: float | None,
    precision: Precision,
    threads: int | None,
) -> None:
    """Measure how well MODEL predicts the text of FILE..., by both protocols.

    stateful: read once from the start, hidden state carried. windows: 256 tokens at a time from a
    fresh start. The arithmetic is that of sampling, with the same --precision; a model that goes on
    learning (--dynamic) computes in float32.
    """
    problems: list[str] = []
    attempt(problems, TrainingOptions, threads=threads)
    reading: dict[str, Any] = {"field": field, "encoding": encoding, "validation": 0.0}
    if documents is not None:
        reading["documents"] = documents
    attempt(problems, CorpusOptions, **reading)
    if dynamic is not None and not 0.0 <= dynamic <= 1.0:
        problems.append(f"--dynamic is {dynamic!r}; give a number of at least 0 and at most 1.")
    if problems:
        raise OptionError(problems)
    standard_output()  # a measurement that nobody can be told is not begun
    loaded = load(find_model(model, models=context.models), threads=threads)
    options = CorpusOptions(**{"documents": loaded.checkpoint.documents, **reading})
    keep_freed_memory()
    console = Console(sys.stderr)
    split = encode_text(
        files,
        loaded.tokenizer,
        documents=options.documents,
        field=options.field,
        encoding=options.encoding,
        report=console.note,
        progress=console.reading,
    )
    scorer = loaded.scorer(precision=precision)
    with tqdm(unit=" tokens", leave=False, disable=not is_watched()) as bar:
        losses: dict[str, Loss] = {
            protocol: appraise(
                scorer, split, loaded.tokenizer, protocol=protocol, progress=bar.update
            )
            for protocol in PROTOCOLS
        }
        if dynamic is not None:
            if threads is not None:
                torch.set_num_threads(threads)
            checkpoint = loaded.checkpoint
            network = Network.from_arrays(checkpoint.architecture, checkpoint.tensors)
            losses["dynamic"] = adapt(
                network, split, loaded.tokenizer, rate=dynamic, progress=bar.update
            )
    unknown = losses["stateful"].unknown
    if unknown:
        click.echo(
            f"{unknown:,} characters are not in the model's vocabulary; each costs what an unknown "
            "character costs.",
            err=True,
        )
    if as_json:
        click.echo(json.dumps({name: loss.to_json() for name, loss in losses.items()}))
    else:
        click.echo(loss_table(losses))
