"""What the group's options say to every command, and to whom they may be said too.

`--models` belongs to the group, but is looked for where the model is named: behind the command. So
each command takes it as well, by `accept_models`, and the one said last counts.
"""

from dataclasses import dataclass
from pathlib import Path

import click


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """The object that click hands to a command through `pass_obj`."""

    models: Path
    """The folder in which a bare model name is looked up."""
    is_named: bool
    """Whether this command line names it, so that what the user is told to type must do so too."""


FOLDER = click.Path(path_type=Path, file_okay=False)


def accept_models(command: click.Command) -> None:
    """Let a command, and each command below it, take `--models`; done twice it is done once."""
    if all("--models" not in parameter.opts for parameter in command.params):
        option = click.Option(
            ["--models"],
            type=FOLDER,
            metavar="DIR",
            expose_value=False,
            callback=_look_in,
            help="Folder in which models are looked up by name; may stand before the command too.",
        )
        command.params.append(option)
    if isinstance(command, click.Group):
        for part in command.commands.values():
            accept_models(part)


def _look_in(ctx: click.Context, _: click.Parameter, folder: Path | None) -> None:
    if folder is not None:
        ctx.obj = Context(models=folder, is_named=True)
