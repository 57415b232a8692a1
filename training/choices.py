"""What a user asked of `charloom train`: on the command line and in a file, checked together.

The command line wins over the file, and whatever is wrong is told at once.
"""

import difflib
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import click

from charloom.cli.options import flag, given
from charloom.errors import OptionError
from training.config import TrainingOptions
from training.corpus import CorpusOptions
from training.device import choose_device
from training.plan import check_temperature
from training.recipe import Recipe, check_choices

Made = TypeVar("Made")

_FIELDS = (*fields(TrainingOptions), *fields(Recipe), *fields(CorpusOptions))
_TRAINING = tuple(item.name for item in fields(TrainingOptions))
_RECIPE = tuple(item.name for item in fields(Recipe))
_CORPUS = tuple(item.name for item in fields(CorpusOptions))


@dataclass(frozen=True, slots=True)
class Choices:
    """What was asked for: about the run, of its recipe, and about its corpus.

    `recipe` has those fields of a recipe that were given; `said` all that was given, by name.
    """

    training: TrainingOptions
    recipe: Mapping[str, Any]
    corpus: CorpusOptions
    said: Mapping[str, Any]


def read_choices(
    ctx: click.Context, config_file: Path | None, problems: list[str]
) -> Choices | None:
    """The choices of this command line and file; None, with the problems added, if some are bad."""
    found: list[str] = []
    chosen = _given(ctx, config_file, found)
    if isinstance(device := chosen.get("device", "auto"), str):
        attempt(found, choose_device, device)
    training = attempt(found, TrainingOptions, **_only(_TRAINING, chosen))
    recipe = _only(_RECIPE, chosen)
    attempt(found, check_choices, recipe)
    if training is not None:
        attempt(found, check_temperature, training, recipe)
    corpus = attempt(found, CorpusOptions, **_only(_CORPUS, chosen))
    problems += found
    if found or training is None or corpus is None:
        return None
    # As the options have it, which may know one thing by two names.
    made = asdict(training) | recipe | asdict(corpus)
    return Choices(training, recipe, corpus, said=_only(chosen, made))


def attempt(
    problems: list[str], make: Callable[..., Made], /, *values: Any, **options: Any
) -> Made | None:
    """What `make` makes of the options, or None and its problems added to the list."""
    try:
        return make(*values, **options)
    except OptionError as error:
        problems += error.problems
        return None


def _given(ctx: click.Context, config_file: Path | None, problems: list[str]) -> dict[str, Any]:
    """Options given in the file and on the command line, the latter winning."""
    chosen: dict[str, Any] = {}
    if config_file is not None:
        chosen = attempt(problems, _read_options, config_file) or {}
    on_line = given(ctx, (*_TRAINING, *_RECIPE, *_CORPUS))
    budgets = {"minutes", "epochs", "steps"}
    if budgets & set(on_line):
        chosen = {key: value for key, value in chosen.items() if key not in budgets}
    return chosen | dict(on_line)


def _read_options(file: Path) -> dict[str, Any]:
    """The options that a TOML file sets; raises `OptionError` for what is not TOML or no option."""
    try:
        chosen = tomllib.loads(file.read_text("utf-8-sig"))
    except OSError as error:
        message = f"--config {file} cannot be read: {error.strerror}; name a TOML file."
        raise OptionError([message]) from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise OptionError([f"--config {file} is not TOML: {error}; correct it."]) from error
    names = {flag(item)[2:].replace("-", "_"): item.name for item in _FIELDS}
    problems = []
    for key in sorted(set(chosen) - set(names)):
        close = difflib.get_close_matches(key.replace("-", "_"), names, n=1)
        remedy = f"write {close[0]}" if close else "see charloom train --help for those there are"
        problems.append(f"--config {file} sets {key!r}, which is no option of a file; {remedy}.")
    if problems:
        raise OptionError(problems)
    return {names[key]: value for key, value in chosen.items()}


def _only(names: Iterable[str], choices: Mapping[str, Any]) -> dict[str, Any]:
    return {name: choices[name] for name in names if name in choices}
