"""Command-line options made from a dataclass, so that each is told once.

A field's metadata holds its sentence under "help", and under "flag" its name on the command line
where that differs from the field's.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import click

from charloom.errors import OptionError


def options_of(kind: type[Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that gives a command one option per field of the dataclass `kind`.

    Only types are read here; limits are checked, all together, when the dataclass is made. A field
    without a default has none on the command line either: it is None where it is not given.
    """
    types = get_type_hints(kind)

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for item in reversed(fields(kind)):
            switches = (
                f"{flag(item)}/--no-{flag(item)[2:]}" if types[item.name] is bool else flag(item)
            )
            command = click.option(
                switches,
                item.name,
                default=None if item.default is MISSING else item.default,
                show_default=item.default not in (None, (), MISSING),
                help=item.metadata["help"],
                **_click_type(types[item.name]),
            )(command)
        return command

    return decorate


def flag(item: "Field[Any]") -> str:
    """The option that sets this field: `-n`, `--top-k`."""
    name: str = item.metadata.get("flag", item.name)
    return ("-" if len(name) == 1 else "--") + name.replace("_", "-")


def given(ctx: click.Context, names: Iterable[str]) -> Mapping[str, Any]:
    """Those of the parameters that were given on the command line."""
    line = click.core.ParameterSource.COMMANDLINE
    return {name: ctx.params[name] for name in names if ctx.get_parameter_source(name) is line}


def _click_type(annotation: Any) -> dict[str, Any]:
    """The arguments of `click.option` that read a field of this type."""
    if get_origin(annotation) in (UnionType, Union):  # the latter where a Literal has a name
        (annotation,) = (part for part in get_args(annotation) if part is not NoneType)
    if annotation is bool:
        return {}
    if get_origin(annotation) is Literal:
        return {"type": click.Choice(get_args(annotation))}
    if get_origin(annotation) is tuple:
        return {"type": get_args(annotation)[0], "multiple": True, "metavar": "TEXT"}
    if get_origin(annotation) is Mapping:
        return {"multiple": True, "metavar": "TEXT=BIAS", "callback": _read_pairs}
    return {"type": annotation}


def _read_pairs(
    _ctx: click.Context, parameter: click.Parameter, pairs: tuple[str, ...]
) -> Mapping[str, float] | None:
    """The mapping that `TEXT=BIAS`, given several times, stands for; None when never given."""
    read: dict[str, float] = {}
    for pair in pairs:
        # From the right, so that the text may hold an equals sign.
        text, equals, number = pair.rpartition("=")
        if text in read:
            raise OptionError(
                [f"{parameter.opts[0]} names {text!r} twice; give each token one number."]
            )
        try:
            read[text] = float(number)
        except ValueError:
            equals = ""
        if not equals:
            raise OptionError(
                [f"{parameter.opts[0]} is {pair!r}; write a text, = and a number, such as 'e=-5'."]
            )
    return read if pairs else None
