"""What a run shows: a bar on a terminal, lines elsewhere, curves, and a model card."""

import io
import shlex
from typing import Any

import pytest

from charloom.architecture import Architecture
from training.report import describe, end_text, model_card
from training.runlog import Console, duration
from training.trainer import Outcome

LINE = {"step": 10, "training": 1.5, "trained": 1.25, "averaged": 1.0}


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """Yes."""
        return True


def show(stream: io.StringIO) -> list[str]:
    """Twenty steps with one evaluation, in tokens of two characters."""
    console = Console(stream)
    console.start(0, 20, characters_per_token=2.0)
    for step in range(1, 21):
        console.stepped(step, 20, 3.0, 100)
        if step == 10:
            console.evaluated(LINE, 20)
    console.stop()
    return stream.getvalue().replace("\r", "\n").split("\n")


def test_a_log_file_gets_plain_lines() -> None:
    """Each evaluation is one line with the better of its losses, and nothing else is written."""
    line, end = show(io.StringIO())

    assert end == ""
    assert line.startswith(
        "step      10 of 20   training 1.5000   held out 1.0000 nats, 1.443 bits"
    )


def test_a_terminal_gets_a_bar_that_is_taken_away_in_the_end() -> None:
    """The bar counts in characters, stands below the lines, and leaves the cursor on a new line."""
    lines = show(Terminal())

    bars = [line for line in lines if "%|" in line.replace(" ", "") and "step" in line]
    assert bars
    assert "loss 1.500, 2.164 bits/char" in bars[-1]
    assert any(line.startswith("step      10 of 20") for line in lines)
    assert lines[-1] == ""


def test_reading_a_corpus_is_silent_where_there_is_no_terminal() -> None:
    """A log file is not filled with a bar of bytes."""
    stream = io.StringIO()
    console = Console(stream)

    console.reading(5, 10)
    console.reading(10, 10)

    assert stream.getvalue() == ""


def test_a_closed_stream_is_told_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Standard error is None where the shell was told `2>&-`; the product gets no line instead."""
    console = Console(None)

    console.reading(5, 10)
    console.start(0, 20, characters_per_token=2.0)
    console.stepped(1, 20, 3.0, 100)
    console.evaluated(LINE, 20)
    console.stop()

    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_durations_are_told_as_people_say_them(seconds: float, words: str) -> None:
    """Seconds, minutes and hours, whichever fits."""
    assert duration(seconds) == words


def summary(**changes: Any) -> dict[str, Any]:
    loss = {
        "nats_per_character": 1.5,
        "bits_per_character": 2.164,
        "bits_per_byte": 2.0,
        "characters": 1000,
    }
    facts = {
        "options": {"seed": 7},
        "corpus": {
            "sources": ["verse.txt"],
            "characters": 9000,
            "options": {"tokenizer": "characters"},
            "validation": {"tokens": 900},
        },
        "step": 40,
        "steps": 50,
        "epochs": 1.5,
        "seconds": 61.0,
        "finished": True,
        "precision": "float32",
        "temperature": 1.08,
        "validation": {"windows": loss, "stateful": loss},
    }
    return facts | changes


def card(model: str = "models/verse", **changes: Any) -> str:
    architecture = Architecture(cell="gru", vocabulary=9, embedding=4, hidden=4, layers=1)
    return model_card(model, architecture, summary(**changes), sample="a ``` b")


def test_a_model_card_tells_what_and_how_good() -> None:
    """Network, corpus, seed, both protocols, a sample and a command stand in it."""
    text = card()

    for part in (
        "# verse\n",
        "GRU 1 x 4",
        "verse.txt (9,000 characters)",
        "seed 7",
        "1.5000",
        "````\na ``` b\n````",
        "charloom sample models/verse",
    ):
        assert part in text
    assert "unfinished" not in text


def test_a_model_card_tells_what_is_not_known() -> None:
    """No evaluation yet, no held-out text and an unfinished run each have their words."""
    assert "Not measured yet" in card(validation={})
    held_nothing_out = {**summary()["corpus"], "validation": {"tokens": 0}}
    assert "No text was held out" in card(validation={}, corpus=held_nothing_out)
    assert "`charloom --models models train --resume --name verse` goes on" in card(finished=False)


def test_commands_can_be_pasted_whatever_the_folder_is_called() -> None:
    """A blank and a quote in a path are quoted for the shell, at the end and in the model card."""
    model = "my models/it's"
    done = end_text(Outcome.FINISHED, model, summary(), 5.0)
    stopped = end_text(Outcome.INTERRUPTED, model, summary(finished=False), 5.0)
    text = card(model=model, finished=False)

    resume = ["charloom", "--models", "my models", "train", "--resume", "--name", "it's"]
    assert shlex.split(done.partition("Try: ")[2]) == ["charloom", "sample", model]
    assert shlex.split(stopped.partition("Go on with: ")[2]) == resume
    assert shlex.split(text.partition("unfinished: `")[2].partition("` goes on")[0]) == resume
    use = text.partition("```sh\n")[2].partition("\n")[0]
    assert shlex.split(use) == ["charloom", "sample", model, "Once", "--temperature", "0.8"]


def test_a_network_is_described_in_one_line() -> None:
    """Cell, layers, sizes, links and parameters."""
    architecture = Architecture(
        cell="lstm", vocabulary=9, embedding=4, hidden=4, layers=2, residual=True, tied=True
    )

    assert describe(architecture) == (
        f"LSTM 2 x 4, embedding 4, residual, tied, {architecture.parameters:,} parameters"
    )
