"""`charloom sample`: write text with a model.

Standard output carries the product alone: prompt and continuation, or with --json a line per text.
It is written as UTF-8 bytes whatever the terminal or locale says, so that every character a model
can write, control characters and carriage returns included, arrives as it was drawn.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import click

from charloom.checkpoint import find_model
from charloom.cli.context import Context
from charloom.cli.options import options_of
from charloom.errors import CharloomError, OptionError, UnknownTextError
from charloom.model import Model, Stream, load
from charloom.params import SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """How texts are written out."""

    as_json: bool
    streamed: bool


@click.command()
@click.argument("model")
@click.argument("prompt", required=False)
@click.option(
    "--prompt-file",
    metavar="FILE",
    help="Read the prompt from a file, UTF-8, every byte of it; - is standard input.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Write a JSON line per text, without the prompt."
)
@click.option(
    "--stream", "streamed", is_flag=True, help="Write each piece as soon as it is certain."
)
@click.option(
    "--interactive",
    is_flag=True,
    help="Take each line of standard input as a prompt, until its end.",
)
@options_of(SamplingParams)
@click.pass_obj
def sample(
    context: Context,
    /,
    *,
    model: str,
    prompt: str | None,
    prompt_file: str | None,
    as_json: bool,
    streamed: bool,
    interactive: bool,
    **options: Any,
) -> None:
    """Write text with MODEL, a name or a folder, going on from PROMPT.

    Without a prompt the text starts from nothing.
    """
    given = {
        "PROMPT": prompt is not None,
        "--prompt-file": prompt_file is not None,
        "--interactive": interactive,
    }
    sources = [name for name, is_given in given.items() if is_given]
    problems = []
    if len(sources) > 1:
        problems.append(f"{' and '.join(sources)} each give the prompt; keep one of them.")
    if as_json and streamed:
        problems.append(
            "--json writes a text when it is whole and --stream does not; keep one of them."
        )
    try:
        params = SamplingParams(**options)
    except OptionError as error:
        problems += error.problems
    if prompt is not None:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            problems.append("PROMPT is not UTF-8; convert it, or give it by --prompt-file.")
    if problems:
        raise OptionError(problems)

    form = Form(as_json=as_json, streamed=streamed)
    loaded = load(find_model(model, models=context.models))
    if interactive:
        _converse(loaded, params, form)
        return
    if prompt_file is not None:
        prompt = _read_prompt(prompt_file)
    _continue(loaded, "" if prompt is None else prompt, params, form)


def _continue(model: Model, prompt: str, params: SamplingParams, form: Form) -> None:
    """Write every text of one prompt, in the order of their choice."""
    stdout = sys.stdout.buffer
    seed = None
    for stream in model.choices(prompt, params):
        seed = stream.seed
        if form.as_json:
            _write(stdout, _json_line(stream))
        else:
            for piece in _plain(prompt, stream, whole=not form.streamed):
                _write(stdout, piece)
    if params.seed is None and not form.as_json:
        click.echo(f"Seed {seed}; --seed {seed} writes the same again.", err=True)


def _plain(prompt: str, stream: Stream, *, whole: bool) -> Iterator[str]:
    """Prompt, continuation and a line's end, in one piece or in those of the stream."""
    if whole:
        yield prompt + stream.result().text + "\n"
        return
    yield prompt
    yield from stream
    yield "\n"


def _json_line(stream: Stream) -> str:
    """One text as a line of JSON."""
    generation = stream.result()
    line = {
        "text": generation.text,
        "seed": generation.seed,
        "choice": generation.choice,
        "finish_reason": generation.finish_reason,
        "prompt_tokens": generation.prompt_tokens,
        "generated_tokens": generation.generated_tokens,
        "precision": generation.precision,
    }
    return json.dumps(line, ensure_ascii=False) + "\n"


def _write(stdout: BinaryIO, text: str) -> None:
    """Write and flush; a full disk is a sentence, a reader that left is the group's to answer."""
    try:
        stdout.write(text.encode())
        stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CharloomError(
            f"Standard output cannot be written: {error.strerror}; send it elsewhere."
        ) from error


def _read_prompt(path: str) -> str:
    """The text of --prompt-file."""
    source = "standard input" if path == "-" else path
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise CharloomError(
            f"The prompt file {source} cannot be read: {error.strerror}; give a readable file."
        ) from error
    return _decode(data, source)


def _decode(data: bytes, source: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise CharloomError(
            f"The prompt in {source} is not UTF-8: byte {error.start} is "
            f"0x{data[error.start]:02x}; convert it to UTF-8."
        ) from error


def _converse(model: Model, params: SamplingParams, form: Form) -> None:
    """Answer each line of standard input; a terminal may go on after one that cannot be encoded."""
    stdin = sys.stdin.buffer
    is_terminal = sys.stdin.isatty()
    while True:
        if is_terminal:
            click.echo("> ", nl=False, err=True)
        line = stdin.readline()
        if not line:
            break
        try:
            prompt = _decode(line.removesuffix(b"\n"), "this line")
            _continue(model, prompt, params, form)
        except UnknownTextError as error:
            if not is_terminal:
                raise
            click.echo(str(error), err=True)
    if is_terminal:
        click.echo(err=True)  # Ctrl-D leaves the cursor behind the prompt
