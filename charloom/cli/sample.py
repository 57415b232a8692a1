"""`charloom sample`: write text with a model.

Standard output carries the product alone: prompt and continuation, or with --json a line per text.
It is written as UTF-8 bytes whatever the terminal or locale says, so that every character a model
can write, control characters and carriage returns included, arrives as it was drawn.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BufferedIOBase
from pathlib import Path
from typing import Any, BinaryIO

import click

from charloom.checkpoint import find_model
from charloom.cli import is_watched, standard_input, standard_output
from charloom.cli.arithmetic import threads_option
from charloom.cli.context import Context
from charloom.cli.judgements import judgements
from charloom.cli.options import options_of
from charloom.errors import CharloomError, OptionError, UnknownTextError
from charloom.model import Generation, Model, draw_seed, load
from charloom.params import SamplingParams, thread_problems

BYTE_ORDER_MARK = "\ufeff"
"""Left out at the start of a file: it belongs to the encoding and not to the text."""


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
    help="Read the prompt from a file, UTF-8, every byte of it but a byte order mark at its start; "
    "- is standard input.",
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
    help="Take each line of standard input, without its LF or CRLF, as a prompt, until its end; a "
    "byte order mark at the start is left out.",
)
@options_of(SamplingParams)
@threads_option
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
    threads: int | None,
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
    if options["logprobs"] is not None and not as_json:
        problems.append("--logprobs has no place in plain text; add --json.")
    problems += [f"--{problem}" for problem in thread_problems(threads)]
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
    loaded = load(find_model(model, models=context.models), threads=threads)
    if interactive:
        _converse(loaded, params, form)
        return
    if prompt_file is not None:
        prompt = _read_prompt(prompt_file)
    _continue(loaded, "" if prompt is None else prompt, params, form)


def _continue(model: Model, prompt: str, params: SamplingParams, form: Form) -> None:
    """Write every text of one prompt, in the order of their choice."""
    stdout = standard_output()
    # Drawn here, so that choices that are streamed one by one have it in common.
    seed = draw_seed() if params.seed is None else params.seed
    drawn = replace(params, seed=seed)
    if form.streamed:
        for choice in range(params.n):
            _write(stdout, prompt)
            for piece in model.stream(prompt, replace(drawn, n=1), choice=choice):
                _write(stdout, piece)
            _write(stdout, "\n")
    else:
        for generation in _watched(model.choices(prompt, drawn), params.n):
            text = _json_line(generation, model) if form.as_json else prompt + generation.text
            _write(stdout, text + "\n")
    if params.seed is None and not form.as_json:
        click.echo(f"Seed {seed}; --seed {seed} writes the same again.", err=True)


def _watched(generations: Iterator[Generation], count: int) -> Iterator[Generation]:
    """The texts, with a bar on a terminal that they are not written to themselves."""
    is_shown = count > 1 and is_watched() and not sys.stdout.isatty()
    # Not imported where there is nothing to show: it would be a tenth of the time to start.
    if not is_shown:
        yield from generations
        return
    from tqdm import tqdm

    with tqdm(generations, total=count, unit=" texts", file=sys.stderr, dynamic_ncols=True) as bar:
        characters = 0
        for generation in bar:
            characters += len(generation.text)
            bar.set_postfix_str(f"{characters:,} characters", refresh=False)
            yield generation


def _json_line(generation: Generation, model: Model) -> str:
    """One text as JSON."""
    line: dict[str, Any] = {
        "text": generation.text,
        "seed": generation.seed,
        "choice": generation.choice,
        "finish_reason": generation.finish_reason,
        "prompt_tokens": generation.prompt_tokens,
        "generated_tokens": generation.generated_tokens,
        "precision": generation.precision,
    }
    if generation.logprobs is not None:
        line["logprobs"] = judgements(generation.logprobs, model.tokenizer)
    return json.dumps(line, ensure_ascii=False, allow_nan=False)


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
        data = standard_input().read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise CharloomError(
            f"The prompt file {source} cannot be read: {error.strerror}; give a readable file."
        ) from error
    return _decode(data, source).removeprefix(BYTE_ORDER_MARK)


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
    stdin = standard_input()
    is_terminal = stdin.isatty()
    for number, line in enumerate(_read_lines(stdin, is_terminal=is_terminal)):
        try:
            prompt = _decode(line.removesuffix(b"\r\n").removesuffix(b"\n"), "this line")
            if number == 0:
                prompt = prompt.removeprefix(BYTE_ORDER_MARK)
            _continue(model, prompt, params, form)
        except UnknownTextError as error:
            if not is_terminal:
                raise
            click.echo(str(error), err=True)
    if is_terminal:
        click.echo(err=True)  # Ctrl-D leaves the cursor behind the prompt


def _read_lines(stdin: BufferedIOBase, *, is_terminal: bool) -> Iterator[bytes]:
    """The lines of standard input, each with its end; a terminal is asked for each."""
    while True:
        if is_terminal:
            click.echo("> ", nl=False, err=True)
        try:
            line = stdin.readline()
        except OSError as error:
            raise CharloomError(
                f"Standard input cannot be read: {error.strerror}; give it a text, such as < FILE."
            ) from error
        if not line:
            return
        yield line
