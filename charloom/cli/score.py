"""`charloom score`: how surprising each line of a text is to a model.

A model of documents reads each line from a fresh start and is asked for its end; another reads the
lines as one text, hidden state carried on, and the line's end is a character like any other.
Standard output carries the product: bits per character, a tab, and the line; or JSON.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import click

from charloom.checkpoint import find_model
from charloom.cli.arithmetic import precision_option, threads_option
from charloom.cli.context import Context
from charloom.cli.judgements import finite
from charloom.errors import CharloomError, OptionError, UnknownTextError
from charloom.model import load
from charloom.params import UNKNOWN_POLICIES, thread_problems
from charloom.scoring import Score
from charloom.tokenizer import Tokenizer


@click.command()
@click.argument("model")
@click.argument("file", default="-")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Write each line as JSON: its bits, and log-probability, rank and entropy of each token.",
)
@click.option(
    "--top",
    default=0,
    show_default=True,
    help="With --json, give this many most likely tokens at each place too.",
)
@click.option(
    "--unknown",
    type=click.Choice(UNKNOWN_POLICIES),
    default="replace",
    show_default=True,
    help="What to do with characters that the model has no token for; replace scores them as such.",
)
@precision_option
@threads_option
@click.pass_obj
def score(
    context: Context,
    /,
    *,
    model: str,
    file: str,
    as_json: bool,
    top: int,
    unknown: Any,
    precision: Any,
    threads: int | None,
) -> None:
    """Write how many bits per character each line of FILE costs MODEL.

    FILE is UTF-8; - or nothing is standard input. A line of the result holds the bits, a tab and
    the line itself, with - for bits where no character has a score. The more bits, the stranger the
    line.

    A model of documents reads each line by itself and is asked for its end; any other reads all
    lines as one text, and has no score for its first character.
    """
    problems: list[str] = []
    if top < 0:
        problems.append(f"--top is {top}; give a whole number of at least 0.")
    elif top and not as_json:
        problems.append("--top has no place in plain text; add --json.")
    problems += [f"--{problem}" for problem in thread_problems(threads)]
    if problems:
        raise OptionError(problems)
    loaded = load(find_model(model, models=context.models), threads=threads)
    scorer = loaded.scorer(unknown=unknown, precision=precision, top=top)
    lines = Lines(file)
    scores = (
        scorer.together(lines)
        if loaded.checkpoint.documents == "none"
        else scorer.apart(line.removesuffix("\n") for line in lines)
    )
    unknowns = 0
    try:
        for number, result in enumerate(scores, start=1):
            unknowns += result.unknown
            line = _json(result, number, loaded.tokenizer) if as_json else _plain(result)
            sys.stdout.buffer.write(line.encode())
    except UnknownTextError as error:  # each line is encoded before the next is read
        raise UnknownTextError(f"In line {lines.number} of {lines.source}: {error}") from error
    if unknowns:
        click.echo(
            f"Characters outside the model's vocabulary: {unknowns:,}; each costs what an unknown "
            "character costs.",
            err=True,
        )


def _plain(result: Score) -> str:
    """One line: its bits per character, - where no character has a score, and itself."""
    bits = f"{result.bits_per_character:.4f}" if result.characters else "-"
    return f"{bits}\t{result.text.removesuffix(chr(10))}\n"


def _json(result: Score, number: int, tokenizer: Tokenizer) -> str:
    """One line as JSON."""
    line: dict[str, Any] = {
        "line": number,
        "text": result.text,
        "bits": result.bits,
        "bits_per_character": finite(result.bits_per_character),
        "bits_per_byte": finite(result.bits_per_byte),
        "characters": result.characters,
        "unknown": result.unknown,
        "tokens": result.tokens_N.tolist(),
        "pieces": result.pieces,
        "logprobs": [finite(value) for value in result.logprobs_N],
        "ranks": [int(rank) if rank else None for rank in result.ranks_N],
        "entropies": [finite(value) for value in result.entropies_N],
    }
    if result.top_NT.shape[1]:
        line["top"] = [
            [
                {"token": token, "text": tokenizer.decode([token]), "logprob": logprob}
                for token, logprob in zip(tokens, logprobs, strict=True)
                if token >= 0
            ]
            for tokens, logprobs in zip(
                result.top_NT.tolist(), result.top_logprobs_NT.tolist(), strict=True
            )
        ]
    return json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"


class Lines:
    """The lines of a file, each with its end; read as they are asked for."""

    def __init__(self, file: str) -> None:
        self.number = 0
        """Of the line that was read last, counted from 1."""
        self.source = "standard input" if file == "-" else file
        self._file = file

    def __iter__(self) -> Iterator[str]:
        if self._file == "-":
            yield from self._decode(sys.stdin.buffer)
            return
        try:
            with Path(self._file).open("rb") as stream:
                yield from self._decode(stream)
        except OSError as error:
            raise CharloomError(
                f"{self._file} cannot be read: {error.strerror}; give a readable file."
            ) from error

    def _decode(self, stream: BinaryIO) -> Iterator[str]:
        for self.number, line in enumerate(stream, start=1):
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                raise CharloomError(
                    f"Line {self.number} of {self.source} is not UTF-8: its byte {error.start} is "
                    f"0x{line[error.start]:02x}; convert the text to UTF-8."
                ) from error
