"""A completion under way that says what it is told to; run by tests of what waits for one."""

from charloom.params import SamplingParams
from service.messages import Accepted, Delta, Ended, Submit

FINGERPRINT = "0123456789abcdef" * 4


class ScriptedCall:
    """Stands in for `service.link.Job`, with a clock of its own: only silence takes time.

    An event that is an exception is raised. After the last event there is silence.
    """

    def __init__(self, *events: list[Delta] | Ended | Exception | None) -> None:
        self.now = 0.0
        self.is_cancelled = False
        self.accepted = accept(
            Submit(id=1, model="demo", prompts=["To be"], params=SamplingParams())
        )
        self._events = list(events)

    def clock(self) -> float:
        """Seconds of silence so far."""
        return self.now

    def next(self, timeout: float) -> list[Delta] | Ended | None:
        """What comes next; silence takes all the time there is."""
        event = self._events.pop(0) if self._events else None
        if isinstance(event, Exception):
            raise event
        if event is None:
            self.now += timeout
        return event

    def cancel(self) -> None:
        """Note that nobody waits."""
        self.is_cancelled = True


def accept(order: Submit) -> Accepted:
    """An order's acceptance: every character of a prompt is a token."""
    return Accepted(
        id=order.id,
        created=1795186800,
        model=order.model,
        fingerprint=FINGERPRINT,
        precision="int8",
        seed=99 if order.params.seed is None else order.params.seed,
        prompt_tokens=sum(map(len, order.prompts)),
    )
