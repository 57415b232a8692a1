"""`charloom models`: list, show, verify and remove what training has saved.

Standard output carries the product, tables or JSON; prompts and remarks go to standard error. Exit
status: 0 all is well, 1 `verify` found a problem, 2 a model cannot be found, used or removed.
"""

import json
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from charloom import checkpoint
from charloom.checkpoint import ModelEntry, find_model, inspect_model, list_models
from charloom.cli.context import Context
from charloom.errors import CheckpointError, OptionError

PROBLEMS_FOUND = 1

HEADINGS = (
    "NAME",
    "NETWORK",
    "PARAMETERS",
    "VOCABULARY",
    "BITS/CHARACTER",
    "SIZE",
    "UPDATED (UTC)",
    "REMARK",
)
NUMBERS = frozenset({"PARAMETERS", "VOCABULARY", "BITS/CHARACTER", "SIZE"})  # aligned to the right


@click.group()
def models() -> None:
    """List, show, verify and remove models.

    A MODEL is a name in the models folder, or a path.
    """


@models.command("list")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON array.")
@click.pass_obj
def list_command(context: Context, as_json: bool) -> None:
    """List all models, broken ones with what is wrong.

    Reads no weights; `verify` does.
    """
    entries = list_models(context.models)
    if as_json:
        click.echo(_json([_facts(entry) for entry in entries]))
    elif entries:
        for line in _table(HEADINGS, [_row(entry) for entry in entries]):
            click.echo(line)
    else:
        _remark_on_none(context.models)


@models.command()
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object.")
@click.pass_obj
def show(context: Context, model: str, as_json: bool) -> None:
    """Show all facts about one model, its training options among them."""
    entry = inspect_model(find_model(model, models=context.models))
    if as_json:
        click.echo(_json({**_facts(entry), "summary": dict(entry.summary)}))
    else:
        for line in _describe(entry):
            click.echo(line)
    if entry.problem is not None:
        raise CheckpointError(entry.problem)


@models.command()
@click.argument("names", metavar="[MODEL]...", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object: problems by model.")
@click.pass_context
def verify(ctx: click.Context, names: tuple[str, ...], as_json: bool) -> None:
    """Check every byte of the given models, or of all, trainer state included.

    Ends with exit status 1 when any has a problem.
    """
    folder: Path = ctx.obj.models
    found = {name: find_model(name, models=folder) for name in names}
    if not names:
        found = {entry.name: entry.path for entry in list_models(folder)}
    problems = {name: checkpoint.verify(path) for name, path in found.items()}
    if as_json:
        click.echo(_json(problems))
    else:
        for name, sentences in problems.items():
            for sentence in sentences if sentences else ["sound"]:
                click.echo(f"{_printable(name)}: {_printable(sentence)}")
        if not problems:
            _remark_on_none(folder)
    if any(problems.values()):
        ctx.exit(PROBLEMS_FOUND)


@models.command()
@click.argument("names", metavar="MODEL...", nargs=-1, required=True)
@click.option("--yes", is_flag=True, help="Remove without asking.")
@click.pass_obj
def remove(context: Context, names: tuple[str, ...], yes: bool) -> None:
    """Remove models; files in their folders that are not Charloom's stay."""
    # All are looked up before any is removed, so that a slip in one name removes nothing.
    paths = list(dict.fromkeys(find_model(name, models=context.models) for name in names))
    if not yes:
        listed = ", ".join(_printable(str(path)) for path in paths)
        # Either is None where the shell was told <&- or 2>&-.
        if sys.stdin is None or sys.stderr is None or not sys.stdin.isatty():
            raise OptionError(
                [f"Removing {listed} needs --yes where there is no terminal to ask on."]
            )
        if not click.confirm(f"Remove {listed}?", err=True):
            click.echo("Nothing was removed.", err=True)
            return
    for path in paths:
        checkpoint.remove(path)
        shown = _printable(str(path))
        kept = " The folder stays, with what is not Charloom's." if path.exists() else ""
        click.echo(f"Removed {shown}.{kept}", err=True)


def _remark_on_none(folder: Path) -> None:
    click.echo(
        f"There are no models in {_printable(str(folder))}; train one with: "
        "charloom train CORPUS --name NAME",
        err=True,
    )


def _facts(entry: ModelEntry) -> dict[str, Any]:
    """An entry as JSON; what is not known is null."""
    architecture = entry.architecture
    return {
        "name": entry.name,
        "path": str(entry.path),
        "problem": entry.problem,
        "training": entry.training,
        "resumable": entry.resumable,
        "architecture": None if architecture is None else architecture.to_json(),
        "parameters": None if architecture is None else architecture.parameters,
        "tokenizer": entry.tokenizer,
        "documents": entry.documents,
        "bits_per_character": entry.bits_per_character,
        "bytes": entry.bytes,
        "files": dict(entry.files),
        "created": entry.created,
        "updated": entry.updated,
        "fingerprint": entry.fingerprint,
    }


def _row(entry: ModelEntry) -> tuple[str, ...]:
    remark = "training now" if entry.training else ""
    if not remark and entry.summary is not None and entry.summary.get("finished") is False:
        remark = f"unfinished, step {entry.summary.get('step')} of {entry.summary.get('steps')}"
    if entry.problem is not None:
        remark = f"{remark}; {entry.problem}" if remark else entry.problem
    architecture = entry.architecture
    if architecture is None or entry.updated is None:
        return (entry.name, "-", "-", "-", "-", "-", "-", remark)
    bits = entry.bits_per_character
    return (
        entry.name,
        f"{architecture.cell} {architecture.layers} x {architecture.hidden}",
        f"{architecture.parameters:,}",
        f"{architecture.vocabulary:,}",
        "-" if bits is None else f"{bits:.3f}",
        _size(entry.bytes),
        _time(entry.updated),
        remark,
    )


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns as wide as a terminal shows their widest cell; the last one is left ragged."""
    shown = [tuple(_printable(cell) for cell in row) for row in (headings, *rows)]
    widths = [max(map(_columns, column)) for column in zip(*shown, strict=True)]
    for row in shown:
        cells = []
        for heading, cell, width in zip(headings, row, widths, strict=True):
            space = " " * (width - _columns(cell))
            cells.append(space + cell if heading in NUMBERS else cell + space)
        yield "  ".join(cells).rstrip()


def _describe(entry: ModelEntry) -> Iterator[str]:
    facts = {"name": entry.name, "path": str(entry.path)}
    architecture = entry.architecture
    if architecture is not None and entry.created is not None and entry.updated is not None:
        extras = [name for name in ("residual", "tied") if getattr(architecture, name)]
        layers = "1 layer" if architecture.layers == 1 else f"{architecture.layers} layers"
        facts |= {
            "network": ", ".join(
                [
                    f"{architecture.cell} of {layers} x {architecture.hidden}",
                    f"embedding {architecture.embedding}",
                    *extras,
                ]
            ),
            "parameters": f"{architecture.parameters:,}",
            "vocabulary": f"{architecture.vocabulary:,} ({entry.tokenizer})",
            "documents": f"{entry.documents}",
            "size": _size(entry.bytes),
            "created": f"{_time(entry.created)} UTC",
            "updated": f"{_time(entry.updated)} UTC",
            "fingerprint": f"{entry.fingerprint}",
            "trainer state": "saved, training can be resumed" if entry.resumable else "none",
        }
    facts["training now"] = "yes" if entry.training else "no"
    if entry.bits_per_character is not None:
        facts["validation"] = f"{entry.bits_per_character:.4f} bits per character (windows)"
    width = max(map(len, facts))
    for name, fact in facts.items():
        yield f"{name:{width}}  {_printable(fact)}"
    if entry.files:
        yield "files"
        width = max(map(len, entry.files))
        for name, size in entry.files.items():
            yield f"  {name:{width}}  {_size(size)}"
    if entry.summary:
        yield "training"
        yield from _outline(entry.summary, "  ")


def _outline(fields: Mapping[str, Any], indent: str) -> Iterator[str]:
    """A free-form summary, one line a value, objects inside it indented."""
    for name, value in fields.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{_printable(name)}"
            yield from _outline(value, indent + "  ")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield f"{indent}{_printable(name)}: {_printable(text)}"


def _json(value: object) -> str:
    # ASCII, since the names of files need not be valid Unicode.
    return json.dumps(value, indent=2, allow_nan=False)


def _printable(text: str) -> str:
    """Text that cannot steer the terminal: a folder may have any name, a summary any content."""
    return "".join(
        character if character.isprintable() else repr(character)[1:-1] for character in text
    )


def _columns(text: str) -> int:
    """How many columns a terminal gives a text: two for a wide character, none for a mark."""
    return sum(
        0 if unicodedata.combining(character)
        else 2 if unicodedata.east_asian_width(character) in "WF"
        else 1
        for character in text
    )  # fmt: skip


def _size(size: int) -> str:
    value = float(size)
    for unit in ("B", "KB", "MB", "GB"):
        if value < 999.5 or unit == "GB":
            return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"
        value /= 1000
    raise AssertionError("the last unit takes any size")


def _time(stamp: str) -> str:
    """A time of config.json, to the minute and in UTC."""
    return datetime.fromisoformat(stamp).astimezone(UTC).strftime("%Y-%m-%d %H:%M")
