"""How far a completion has come at its worker, so that it may be written once more from its start.

An engine that crashed takes its texts along, and the same request gives the same text again: what
the worker has is passed over, and its client sees no seam. The second writing is cut into other
deltas, and text, tokens and judgements are not in step with each other (text waits where it may be
a stop string's beginning), so each of the three is counted for itself, for every choice.
"""

from dataclasses import dataclass, replace

import msgspec

from service.messages import Delta, Judged


@dataclass(slots=True)
class _Count:
    """What was given of one choice, or what of it is still to be passed over."""

    characters: int = 0
    tokens: int = 0
    judged: int = 0
    is_finished: bool = False


class Progress:
    """Counts what is given of one completion, and passes over what is written twice."""

    def __init__(self) -> None:
        self._given: dict[int, _Count] = {}
        self._surplus: dict[int, _Count] = {}

    @property
    def tokens(self) -> int:
        """How many tokens were drawn for what was given."""
        return sum(count.tokens for count in self._given.values())

    def rewind(self) -> None:
        """From here on the deltas are those of another writing, which begins at the start."""
        self._surplus = {index: replace(count) for index, count in self._given.items()}

    def advance(self, delta: Delta) -> Delta | None:
        """What is new in the delta, None where nothing is; it counts as given."""
        if self._surplus:
            rest = self._pass_over(delta)
            if rest is None:
                return None
            delta = rest
        count = self._given.get(delta.index)
        if count is None:
            count = self._given[delta.index] = _Count()
        count.characters += len(delta.text)
        count.tokens += delta.tokens
        if delta.judged is not None:
            count.judged += len(delta.judged.ids)
        if delta.finish is not None:
            count.is_finished = True
        return delta

    def _pass_over(self, delta: Delta) -> Delta | None:
        """The delta without what was given before."""
        surplus = self._surplus.get(delta.index)
        if surplus is None:
            return delta
        if surplus.is_finished:
            return None
        characters = min(surplus.characters, len(delta.text))
        tokens = min(surplus.tokens, delta.tokens)
        judged = 0 if delta.judged is None else min(surplus.judged, len(delta.judged.ids))
        surplus.characters -= characters
        surplus.tokens -= tokens
        surplus.judged -= judged
        if not (surplus.characters or surplus.tokens or surplus.judged):
            del self._surplus[delta.index]
        rest = msgspec.structs.replace(
            delta,
            text=delta.text[characters:],
            tokens=delta.tokens - tokens,
            judged=_from(delta.judged, judged),
        )
        is_new = rest.text or rest.tokens or rest.judged is not None or rest.finish is not None
        return rest if is_new else None


def _from(judged: Judged | None, start: int) -> Judged | None:
    """The judgements from this one on; None where none is left."""
    if judged is None or start == len(judged.ids):
        return None
    return Judged(
        tokens=judged.tokens[start:],
        ids=judged.ids[start:],
        logprobs=judged.logprobs[start:],
        top=judged.top[start:],
    )
