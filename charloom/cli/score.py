"""`charloom score`: how surprising each line of a text is to a model.

A model of documents reads each line from a fresh start and is asked for its end, which is LF or
CRLF as in training; another reads the lines as one text, hidden state carried on, and the line's
end is text like any other.
Standard output carries the product: bits per character, a tab, and the line; or JSON. Where the
input pauses, as a log does that is still written, the lines so far are answered.
"""

import json
from collections.abc import Iterator
from io import BufferedIOBase, BytesIO
from itertools import tee
from pathlib import Path
from select import select
from typing import Any

import click

from charloom.checkpoint import find_model
from charloom.cli import standard_input, standard_output
from charloom.cli.arithmetic import precision_option, threads_option
from charloom.cli.context import Context
from charloom.cli.judgements import finite
from charloom.errors import CharloomError, OptionError, UnknownTextError
from charloom.model import load
from charloom.params import UNKNOWN_POLICIES, thread_problems
from charloom.scoring import Score
from charloom.tokenizer import Tokenizer

BLOCK = 1 << 16
"""Bytes that are read at a time: as many as a pipe holds."""


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

    A model of documents reads each line by itself, without its LF or CRLF, and is asked for its
    end; any other reads all lines as one text, and has no score for its first character.
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
    read, kept = tee(lines)
    scores = (
        scorer.apart(None if line is None else _content(line) for line in read)
        if loaded.documents
        else scorer.together(read)
    )
    originals = (line for line in kept if line is not None)
    stdout = standard_output()
    unknowns = 0
    try:
        # A score first, so that no line is waited for while one is there.
        for number, (result, line) in enumerate(zip(scores, originals, strict=False), start=1):
            unknowns += result.unknown
            row = _json(result, number, loaded.tokenizer) if as_json else _plain(result, line)
            stdout.write(row.encode())
            stdout.flush()
    except UnknownTextError as error:  # each line is encoded before the next is read
        raise UnknownTextError(f"In line {lines.number} of {lines.source}: {error}") from error
    if unknowns:
        click.echo(
            f"Characters outside the model's vocabulary: {unknowns:,}; each costs what an unknown "
            "character costs.",
            err=True,
        )


def _content(line: str) -> str:
    """What of a line a model of lines was trained on."""
    return line.removesuffix("\r\n").removesuffix("\n")


def _plain(result: Score, line: str) -> str:
    """One line: its bits per character, - where no character has a score, and itself."""
    bits = f"{result.bits_per_character:.4f}" if result.characters else "-"
    return f"{bits}\t{line.removesuffix(chr(10))}\n"


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
    """The lines of a file, each with its end, and None where there is no more of it for now.

    They are read as they are asked for; a byte order mark at the start is left out.
    """

    def __init__(self, file: str) -> None:
        self.number = 0
        """Of the line that was read last, counted from 1."""
        self.source = "standard input" if file == "-" else file
        self._file = file

    def __iter__(self) -> Iterator[str | None]:
        try:
            if self._file == "-":
                yield from self._decode(standard_input())
                return
            with Path(self._file).open("rb") as stream:
                yield from self._decode(stream)
        except OSError as error:
            raise CharloomError(
                f"{self.source} cannot be read: {error.strerror}; give a readable file."
            ) from error

    def _decode(self, stream: BufferedIOBase) -> Iterator[str | None]:
        for line in _read_lines(stream):
            if line is None:
                yield None
                continue
            self.number += 1
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise CharloomError(
                    f"Line {self.number} of {self.source} is not UTF-8: its byte {error.start} is "
                    f"0x{line[error.start]:02x}; convert the text to UTF-8."
                ) from error
            yield text.removeprefix("\ufeff") if self.number == 1 else text


def _read_lines(stream: BufferedIOBase) -> Iterator[bytes | None]:
    """The lines of a stream, and None where the next read would wait."""
    begun: list[bytes] = []
    while block := stream.read1(BLOCK):
        for part in BytesIO(block):
            begun.append(part)
            if part.endswith(b"\n"):
                yield b"".join(begun)
                begun.clear()
        if not _is_ready(stream):
            yield None
    if begun:
        yield b"".join(begun)


def _is_ready(stream: BufferedIOBase) -> bool:
    """Whether a read would not wait, as that of a file never does."""
    try:
        return bool(select([stream], [], [], 0)[0])
    except (OSError, ValueError):  # nothing that can be asked
        return True
