"""The command line: a click group whose commands are imported only when they run.

Each command is named by an import string, so `charloom --help` imports none of them, sampling
imports no torch, and nothing here imports upward from `charloom` into `training`. The group also is
the one place where errors become sentences on standard error and an exit status:

    2    options, input or a model that the user can mend      1    training diverged
    130  Ctrl-C                                                141  the reader of the output left
"""

import errno
import os
import signal
import sys
from importlib import import_module
from io import BufferedIOBase
from pathlib import Path
from typing import Any, BinaryIO, cast

import click

import charloom
from charloom.cli.context import FOLDER, Context, accept_models
from charloom.cli.options import given
from charloom.errors import CharloomError

INTERRUPTED = 128 + 2
PIPE_CLOSED = 128 + 13

_STREAM_ERRORS = (errno.ENOSPC, errno.EIO, errno.EBADF)


def standard_input() -> BufferedIOBase:
    """Its bytes; raises `CharloomError` where it is closed, as by `<&-`."""
    if sys.stdin is None:
        raise CharloomError("Standard input is closed; give it a text, such as < FILE.")
    return cast(BufferedIOBase, sys.stdin.buffer)


def standard_output() -> BinaryIO:
    """Its bytes; raises `CharloomError` where it is closed, as by `>&-`."""
    if sys.stdout is None:
        raise CharloomError("Standard output is closed; send it somewhere, such as > FILE.")
    return sys.stdout.buffer


def is_watched() -> bool:
    """Whether standard error is a terminal, which it is not where it is closed, as by `2>&-`."""
    return sys.stderr is not None and sys.stderr.isatty()


class LazyCommand(click.Command):
    """Stands for a command until it runs; `extra` is what must be installed for it to import."""

    def __init__(self, name: str, home: str, short_help: str, *, extra: str | None = None) -> None:
        super().__init__(name, short_help=short_help)
        self.home = home
        self.extra = extra

    def load(self) -> click.Command:
        """Import the command.

        Ctrl-C ends the process while it imports: the native code of torch aborts, with a message of
        its own, when a KeyboardInterrupt comes up in it.
        """
        module, _, attribute = self.home.partition(":")
        before = signal.signal(signal.SIGINT, signal.SIG_DFL)
        try:
            command = getattr(import_module(module), attribute)
        finally:
            signal.signal(signal.SIGINT, before)
        assert isinstance(command, click.Command), f"{self.home} is not a command"
        accept_models(command)
        return command

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """Hand over to the command itself, which the context then belongs to."""
        return self.load().make_context(info_name, args, parent, **extra)


class CommandLine(click.Group):
    """The group; turns what goes wrong in a command into its sentences and exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run one command."""
        try:
            result = super().invoke(ctx)
            if sys.stdout is not None:  # it is None where the shell was told >&-
                sys.stdout.flush()  # here, where a closed pipe can still be answered
        except CharloomError as error:
            click.echo(str(error), err=True)
            ctx.exit(error.exit_status)
        except ModuleNotFoundError as error:
            sentence = self._explain_missing(error, ctx.invoked_subcommand)
            if sentence is None:
                raise
            click.echo(sentence, err=True)
            ctx.exit(CharloomError.exit_status)
        except KeyboardInterrupt:
            click.echo(err=True)  # so that the shell's prompt does not stand behind ^C
            ctx.exit(INTERRUPTED)
        except BrokenPipeError:
            # Python flushes standard output once more at exit and would complain there.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(PIPE_CLOSED)
        except OSError as error:
            # An error about a file has its sentence where it happens; this is a standard stream.
            if error.filename is not None or error.errno not in _STREAM_ERRORS:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            click.echo(
                f"Standard output cannot be written: {error.strerror}; send it elsewhere.", err=True
            )
            ctx.exit(CharloomError.exit_status)
        return result

    def _explain_missing(self, error: ModuleNotFoundError, name: str | None) -> str | None:
        """The sentence for an optional package that is not installed; None for a defect of ours."""
        command = self.commands.get(name) if name is not None else None
        if not isinstance(command, LazyCommand) or command.extra is None or error.name is None:
            return None
        package = error.name.partition(".")[0]
        if package in ("charloom", "training", "service"):
            return None
        return (
            f"`charloom {command.name}` needs the package {package!r}, which is not installed; "
            f"install it with: pip install 'charloom[{command.extra}]'"
        )


def _show_version(ctx: click.Context, _: click.Parameter, is_asked: bool) -> None:
    if is_asked and not ctx.resilient_parsing:
        click.echo(f"charloom {charloom.__version__}")
        ctx.exit()


@click.group(cls=CommandLine, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--models",
    type=FOLDER,
    default=Path("models"),
    envvar="CHARLOOM_MODELS",
    show_default=True,
    show_envvar=True,
    metavar="DIR",
    help="Folder in which models are looked up by name; may stand behind the command too.",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version and exit.",
)
@click.pass_context
def main(ctx: click.Context, models: Path) -> None:
    """Train character-level language models on any text, and write with them."""
    ctx.obj = Context(models=models, is_named=bool(given(ctx, ["models"])))


# Each short help is the first sentence of the command itself, which is not loaded to show it.
for _command in (
    LazyCommand(
        "train",
        "training.cli:train",
        "Train a model on CORPUS: files, folders, globs, addresses, - or a built-in corpus.",
        extra="train",
    ),
    LazyCommand(
        "sample",
        "charloom.cli.sample:sample",
        "Write text with MODEL, a name or a folder, going on from PROMPT.",
    ),
    LazyCommand(
        "score",
        "charloom.cli.score:score",
        "Write how many bits per character each line of FILE costs MODEL.",
    ),
    LazyCommand(
        "evaluate",
        "training.cli:evaluate",
        "Measure how well MODEL predicts the text of FILE..., by both protocols.",
        extra="train",
    ),
    LazyCommand("models", "charloom.cli.models:models", "List, show, verify and remove models."),
    LazyCommand(
        "serve",
        "service.cli:serve",
        "Serve the models over HTTP, to every client that speaks OpenAI's API.",
        extra="serve",
    ),
):
    main.add_command(_command)
