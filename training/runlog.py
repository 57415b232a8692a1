"""What a run tells while it goes on.

What the console says goes to standard error; the one product on standard output, the model's
folder, is the command's own business. On a terminal there is a progress bar, elsewhere a plain line
for each evaluation, so a log file stays readable.
"""

import math
import time
from collections.abc import Mapping
from typing import Any, NoReturn, TextIO

from tqdm import tqdm

SILENCE_SECONDS = 30.0
"""Where there is no bar, a line is written at least so often."""

_SMOOTHING = 0.02


class Console:
    """Progress on a text stream: a bar on a terminal, plain lines elsewhere.

    Losses come in nats per token and tokens as counts; they are shown per character, by the
    corpus's own `characters_per_token`. A stream that is None, as standard error is where it is
    closed, is told nothing.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._is_terminal = stream is not None and stream.isatty()
        self._bar: tqdm[NoReturn] | None = None
        self._start = 0
        self._began = 0.0
        self._characters_per_token = 1.0
        self._tokens = 0
        self._loss: float | None = None
        self._spoke = time.perf_counter()

    def note(self, text: str) -> None:
        """Print whole lines, above the bar where there is one."""
        self._spoke = time.perf_counter()
        if self._stream is None:
            return
        tqdm.write(text, file=self._stream)
        self._stream.flush()

    def reading(self, done: int, total: int | None) -> None:
        """Show how many bytes of the corpus are read, on a terminal."""
        if not self._is_terminal:
            return
        if self._bar is None:
            self._bar = tqdm(
                total=total,
                file=self._stream,
                unit="B",
                unit_scale=True,
                leave=False,
                delay=1.0,
                desc="reading the corpus",
            )
        self._bar.update(done - self._bar.n)
        if done == total:
            self.stop()

    def start(self, step: int, steps: int, *, characters_per_token: float) -> None:
        """Begin to count, from `step` on."""
        self.stop()
        self._start, self._began = step, time.perf_counter()
        self._characters_per_token = characters_per_token
        if self._is_terminal:
            self._bar = tqdm(
                total=steps,
                initial=step,
                file=self._stream,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}% |{bar}|{postfix} [{elapsed} < {remaining}]",
            )

    def stepped(self, step: int, steps: int, nats: float, tokens: int) -> None:
        """Take in one step."""
        self._loss = nats if self._loss is None else self._loss + _SMOOTHING * (nats - self._loss)
        self._tokens += tokens
        if self._bar is None:
            if time.perf_counter() - self._spoke > SILENCE_SECONDS:
                loss = self._loss / self._characters_per_token
                parts = (f"step {step:>7,} of {steps:,}", f"training {loss:.4f}")
                self.note("   ".join((*parts, self._left(step, steps))))
        else:
            loss = self._loss / self._characters_per_token
            self._bar.total = steps
            self._bar.set_postfix_str(
                f"step {step:,}, loss {loss:.3f}, {loss / math.log(2):.3f} bits/char, "
                f"{self._speed:,.0f} char/s",
                refresh=False,
            )
            self._bar.update(step - self._bar.n)

    def evaluated(self, line: Mapping[str, Any], steps: int) -> None:
        """Print one line of the history."""
        parts = [f"step {line['step']:>7,} of {steps:,}", f"training {line['training']:.4f}"]
        held_out = [line[name] for name in ("trained", "averaged") if name in line]
        if held_out:
            best = min(held_out)
            parts.append(f"held out {best:.4f} nats, {best / math.log(2):.3f} bits per character")
        parts.append(self._left(line["step"], steps))
        self.note("   ".join(parts))

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _left(self, step: int, steps: int) -> str:
        spent = time.perf_counter() - self._began
        left = spent / max(step - self._start, 1) * (steps - step)
        return f"{self._speed:,.0f} char/s   {duration(left)} left"

    @property
    def _speed(self) -> float:
        spent = max(time.perf_counter() - self._began, 1e-9)
        return self._tokens * self._characters_per_token / spent


def visible(line: str) -> str:
    """A line as a terminal may show it: what could move its cursor becomes U+FFFD."""
    shown = (c if c.isprintable() or c == "\t" else "\ufffd" for c in line)
    return "".join(shown)


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
