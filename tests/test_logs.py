import json
import logging
import sys
from typing import Any

import pytest
import structlog

from service import logs
from service.settings import Settings


class Broken:
    """A standard error that takes nothing any more."""

    def write(self, text: str) -> int:
        """Refuse, as a closed pipe does."""
        raise BrokenPipeError(f"{len(text)} characters are lost")

    def flush(self) -> None:
        """Have nothing to do."""


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Give what was written since the last call, and see that none of it was the product."""
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_logging_and_structlog_look_alike(
    log_format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line says when, how bad, who and what, whichever way it was logged."""
    logs.configure(Settings(log_format=log_format))
    structlog.get_logger("service.one").warning("It rains")
    logging.getLogger("service.one").warning("It %s", "rains")
    first, second = lines(capsys)
    assert first[45:] == second[45:]  # but for the time
    if log_format == "json":
        values = json.loads(first)
        assert values["timestamp"].endswith("Z")
        assert values["level"] == "warning"
        assert values["logger"] == "service.one"
        assert values["event"] == "It rains"
    else:
        assert " warning service.one It rains pid=" in first


def test_lines_below_the_level_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    """The setting `log_level` holds for both ways of logging."""
    logs.configure(Settings(log_level="error"))
    structlog.get_logger("service").warning("one")
    logging.getLogger("service").warning("two")
    structlog.get_logger("service").error("three")
    logging.getLogger("service").error("four")
    assert [line.split()[3] for line in lines(capsys)] == ["three", "four"]


def test_setting_up_again_replaces_what_was(capsys: pytest.CaptureFixture[str]) -> None:
    """Each line is written once, in the form that was asked for last."""
    logs.configure(Settings())
    logs.configure(Settings(log_format="json"))
    logging.getLogger("service").info("once")
    (line,) = lines(capsys)
    assert json.loads(line)["event"] == "once"


HOSTILE = "a\r\nb\x1b[31mc\x00d\x7fe\x85f\u2028g\u202eh\ud800i\\n"


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_value_begins_a_line_or_steers_a_terminal(
    log_format: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control characters, whoever logs them and wherever they stand, are escaped."""
    # pytest's own handlers would keep the text for a report, which takes no half characters.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    logs.configure(Settings(log_format=log_format))
    structlog.get_logger("service").info(HOSTILE, name=HOSTILE, **{HOSTILE: 1})
    logging.getLogger("service").info("%s", HOSTILE)
    found = capsys.readouterr().err
    assert found.count("\n") == 2
    assert set(found) - {"\n"} <= set(map(chr, range(32, 127)))
    if log_format == "json":
        assert json.loads(found.splitlines()[0])["name"] == HOSTILE


def test_an_escaped_text_can_be_told_from_one_that_was_sent_so() -> None:
    """Backslashes are doubled, so that a line break and its escape stay two things."""
    assert logs.escape("a\nb") == "a\\nb"
    assert logs.escape("a\\nb") == "a\\\\nb"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("plain", "plain"),
        ("two words", '"two words"'),
        ('say "hi"', '"say \\"hi\\""'),
        ("a=b", '"a=b"'),
        ("", '""'),
        (0, "0"),
        (0.25, "0.25"),
        (["a", "b"], "\"['a', 'b']\""),
    ],
)
def test_a_value_is_quoted_where_its_end_would_be_unclear(
    value: Any, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Text lines can be taken apart again at their fields."""
    logs.configure(Settings())
    structlog.get_logger("service").info("event", field=value)
    (line,) = lines(capsys)
    assert f" event field={shown} pid=" in line


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_traceback_is_marked_and_cut(log_format: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its rows cannot be taken for lines of their own, and quote only so much of a value."""
    logs.configure(Settings(log_format=log_format))
    try:
        raise ValueError(f"forged\r2026-11-20 info service all is well {'x' * 5000}")
    except ValueError as error:
        structlog.get_logger("service").error("failed", exc_info=error)
        logging.getLogger("service").exception("failed")
    rows = lines(capsys)
    if log_format == "json":
        assert len(rows) == 2
        rows = [row for line in rows for row in json.loads(line)["exception"].splitlines()]
    else:
        heads = [row for row in rows if not row.startswith("  | ")]
        assert len(heads) == 2
        assert all("failed" in head for head in heads)
    assert any("Traceback (most recent call last):" in row for row in rows)
    assert any("ValueError: forged" in row for row in rows)
    assert max(map(len, rows)) < 400


def test_a_standard_error_that_is_gone_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever logs goes on when nothing can be written any more."""
    logs.configure(Settings())
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Broken())
        structlog.get_logger("service").error("unheard")
        logging.getLogger("service").error("unheard")
