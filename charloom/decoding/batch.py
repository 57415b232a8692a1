"""The rows that step together: each is fed what it has to read, then what it draws.

Reading a prompt and writing a text are the same step; the only difference is where the next token
comes from. A row therefore has a *script*, the tokens it is to be fed before it draws, and rows
that read, write and only score share every step.

Steps are made in blocks, since looking at a text costs several microseconds and a step of a small
network little more. A text that ends within a block is stepped on to the block's end and cut
afterwards: a wasted row costs next to nothing, an early look costs every row. States that are to be
kept are copied at their step, within the block.

Who draws is a matter of speed alone: the sampler for all rows at once, or a lone row by itself.

All that belongs to a row stands at its index in arrays of fixed size, of which the first B rows are
in use; a row that leaves is replaced by the last one.

    B rows   K steps   V vocabulary   W the same, filled up   N rows that are judged
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from charloom.cell import State
from charloom.decoding.alphabet import REACH, Alphabet
from charloom.decoding.decoder import Decoder
from charloom.decoding.draws import uniforms
from charloom.decoding.lone import LoneRow
from charloom.decoding.sampling import NONE, RECORD, Rules, Urn, draw, record, weigh
from charloom.params import SamplingParams

NEVER = np.iinfo(np.int64).max

DRAWS_AHEAD = 256
"""Most uniform numbers made in one go for a row."""

DRAWS_AT_ONCE = 4096
"""About as many are made for all rows together, so that none has to wait long for them."""

JUDGED_LIMIT = 2**22
"""Logits that a block keeps for rows that are judged (16 MiB)."""


@dataclass(eq=False, kw_only=True, slots=True)
class Row:
    """What one row is to be fed and how it draws."""

    script: NDArray[np.int32]
    """The tokens to be fed before the first draw, at least one."""
    lead: int
    """How many of these stand before the text: positions and penalties count from there."""
    params: SamplingParams
    seed: int
    choice: int
    bias_V: NDArray[np.float32] | None = None
    is_judged: bool = False
    """Whether the logits of each step are reported."""
    marks: list[int] = field(default_factory=list)
    """Lengths, in tokens fed, at which the state is reported."""
    fed: int = 0
    """How many tokens the state stands for when the row joins."""


@dataclass(kw_only=True, slots=True)
class Block:
    """What the rows did in K steps, by the rows' index."""

    rows: list[Row]
    read: list[int]
    """After how many of the steps the script went on; after the others the row drew."""
    unread: list[int]
    """How many tokens of the script are still to follow."""
    tokens: list[list[int]]
    """The token after each step; `NONE` where the network left none to draw."""
    states: dict[int, list[tuple[int, State]]]
    """The marked lengths that were reached, and the state at each."""
    judged: dict[int, tuple[NDArray[np.float32], NDArray[np.float32]]]
    """Logits and what the rules made of them, each (K, V), of the rows that are judged."""


class _Judging:
    """Collects what the judged rows' tokens follow from, step by step."""

    def __init__(self, rows: list[Row], steps: int, vocabulary: int) -> None:
        self._rows_N = np.flatnonzero([row.is_judged for row in rows])
        self._logits_KNV = np.zeros((steps, len(self._rows_N), vocabulary), np.float32)
        # Unlike zeros_like, this costs nothing until it is used.
        self._weights_KNV = np.zeros(self._logits_KNV.shape, np.float32)

    def note_logits(self, step: int, logits_BV: NDArray[np.float32]) -> None:
        """Keep what the network gave."""
        self._logits_KNV[step] = logits_BV[self._rows_N]

    def note_weights(self, step: int, urn: Urn) -> None:
        """Keep what the rules made of it."""
        self._weights_KNV[step] = urn.weights(self._rows_N, self._logits_KNV.shape[2])

    def by_row(self) -> dict[int, tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Logits and weights, each (K, V), by the row's index."""
        return {
            index: (self._logits_KNV[:, place], self._weights_KNV[:, place])
            for place, index in enumerate(self._rows_N.tolist())
        }


class Batch:
    """Up to `capacity` rows of a decoder."""

    def __init__(self, decoder: Decoder, alphabet: Alphabet) -> None:
        self.rows: list[Row] = []
        self.capacity = decoder.capacity
        self.fingerprint = decoder.fingerprint
        self._decoder = decoder
        self._alphabet = alphabet
        self._rules: Rules | None = None
        self._lone: LoneRow | None = None
        self._tokens = np.zeros(self.capacity, np.int32)
        self._characters = np.zeros(self.capacity, np.int8)
        self._records = np.zeros(self.capacity, RECORD)
        # Made when a row first needs them, since they are as wide as the vocabulary.
        self._counts: NDArray[np.int32] | None = None
        self._biases: NDArray[np.float32] | None = None
        self._draws = np.zeros((DRAWS_AHEAD, self.capacity))
        # How many of the draws are made, and how many of those used.
        self._ahead = 0
        self._draw = 0
        self._undrawn: set[Row] = set()
        self._fed = np.zeros(self.capacity, np.int64)
        # How many tokens of the script will follow the one that is fed next, and the next mark.
        self._unread = np.zeros(self.capacity, np.int64)
        self._mark = np.zeros(self.capacity, np.int64)
        # How many tokens a row must have been fed before it may draw the end of a document.
        self._endless = np.zeros(self.capacity, np.int64)

    def join(self, row: Row, state: State | None) -> None:
        """Take a row in, at the state that the first `row.fed` tokens of its script have left."""
        index = len(self.rows)
        assert index < self.capacity, "no more rows than the decoder has"
        assert row.fed < len(row.script), "a row has something to be fed"
        if state is None:
            self._decoder.clear(index)
        else:
            self._decoder.write(index, state)
        self._tokens[index] = row.script[row.fed]
        self._characters[index] = self._alphabet.walk(
            row.script[max(row.fed + 1 - REACH, 0) : row.fed + 1].tolist()
        )
        self._records[index] = records = record(row.params)
        shape = (self.capacity, self._decoder.vocabulary_size)
        if Rules(records[None]).need_counts:
            if self._counts is None:
                self._counts = np.zeros(shape, np.int32)
            self._counts[index] = np.bincount(row.script[row.lead :], minlength=shape[1])
        if row.bias_V is not None and self._biases is None:
            self._biases = np.zeros(shape, np.float32)
        if self._biases is not None:
            self._biases[index] = 0.0 if row.bias_V is None else row.bias_V
        self._fed[index] = row.fed
        self._unread[index] = len(row.script) - 1 - row.fed
        self._mark[index] = min(row.marks, default=NEVER)
        self._endless[index] = 0
        if self._alphabet.documents and row.params.ignore_eos:
            self._endless[index] = NEVER
        elif self._alphabet.documents and row.params.min_tokens > 0:
            self._endless[index] = len(row.script) + row.params.min_tokens
        # Last, so that a row is in or not, whatever went wrong.
        self._undrawn.add(row)
        self.rows.append(row)
        self._rules = None

    def mark(self, row: Row, length: int) -> None:
        """Report the row's state at this length too."""
        if length not in row.marks:
            row.marks.append(length)
        self._mark[self.rows.index(row)] = min(row.marks)

    @property
    def longest_block(self) -> int:
        """How many steps a block may have, for the room that judged rows take."""
        judged = sum(row.is_judged for row in self.rows)
        return JUDGED_LIMIT // max(judged * self._decoder.vocabulary_size, 1) or 1

    @property
    def unread(self) -> list[int]:
        """How many tokens of each row's script will follow the one that is fed next."""
        unread: list[int] = self._unread[: len(self.rows)].tolist()
        return unread

    def leave(self, row: Row) -> None:
        """Let a row go; the last one takes its place."""
        index, last = self.rows.index(row), len(self.rows) - 1
        if index != last:
            self._decoder.move(last, index)
            self.rows[index] = self.rows[last]
            for array in (
                self._tokens,
                self._characters,
                self._records,
                self._counts,
                self._biases,
                self._draws.T,
                self._fed,
                self._unread,
                self._mark,
                self._endless,
            ):
                if array is not None:
                    array[index] = array[last]
        self.rows.pop()
        self._undrawn.discard(row)
        self._rules = None

    def clear(self) -> None:
        """Let all rows go."""
        self.rows.clear()
        self._undrawn.clear()
        self._rules = None

    def advance(self, steps: int) -> Block:
        """Feed each row `steps` tokens."""
        rows = len(self.rows)
        if self._rules is None:
            self._rules = Rules(self._records[:rows])
            self._lone = self._find_lone()
        rules, lone = self._rules, self._lone
        uniform_KB = self._draw_ahead(steps)
        script_KB = self._open_scripts(steps)
        marks = self._find_marks(steps)
        states: dict[int, list[tuple[int, State]]] = {}
        judging = None
        if any(row.is_judged for row in self.rows):
            judging = _Judging(self.rows, steps, self._decoder.vocabulary_size)
        tokens_KB = np.empty((steps, rows), np.int64)
        peak_KB1 = np.zeros((steps, rows, 1), np.float32)
        tokens_B = self._tokens[:rows]
        counts_BV = self._counts[:rows] if rules.need_counts and self._counts is not None else None
        bias_BV = None if self._biases is None else self._biases[:rows]
        characters_B = self._characters[:rows] if self._alphabet.has_states else None
        barrier_BV = self._alphabet.barrier_SV[:1]
        is_endless_KB = self._find_endless(steps)
        together = int(self._unread[:rows].min())
        uniform_K = [] if lone is None else uniform_KB[:, 0].tolist()
        drawn_B: NDArray[np.int64] | int
        with np.errstate(over="ignore", invalid="ignore"):
            for step in range(steps):
                logits_BV = self._decoder.step(tokens_B)
                if judging is not None:
                    judging.note_logits(step, logits_BV)
                if step < together:  # all rows read
                    drawn_B = script_KB[step]
                elif lone is not None:
                    drawn_B, peak_KB1[step] = lone.draw(logits_BV[0], uniform_K[step])
                else:
                    if characters_B is not None:
                        barrier_BV = self._alphabet.barrier_SV[characters_B]
                    barred_BV = barrier_BV
                    if step < len(is_endless_KB):
                        barred_BV = self._bar_end(barrier_BV, is_endless_KB[step])
                    urn = weigh(
                        logits_BV,
                        rules,
                        barrier_BV=barred_BV,
                        bias_BV=bias_BV,
                        counts_BV=counts_BV,
                    )
                    peak_KB1[step] = urn.peak_B1
                    drawn_B = draw(urn, uniform_KB[step])
                    if judging is not None:
                        judging.note_weights(step, urn)
                    is_drawn_B: NDArray[np.bool_] | int = 1
                    if step < len(script_KB):
                        is_drawn_B = script_KB[step] == NONE
                        drawn_B = np.where(is_drawn_B, drawn_B, script_KB[step])
                    if counts_BV is not None:
                        counts_BV[np.arange(rows), drawn_B] += is_drawn_B
                tokens_KB[step] = tokens_B[:] = drawn_B
                if characters_B is not None:
                    characters_B[:] = self._alphabet.moves_SV[characters_B, tokens_B]
                for index, length in marks.get(step, ()):
                    states.setdefault(index, []).append((length, self._decoder.read(index)))
        read_B = np.minimum(self._unread[:rows], steps)
        # A row without a finite logit drew something too; that it did is seen only here, as looking
        # at each step costs time.
        is_finite_KB = np.isfinite(peak_KB1[:, :, 0])
        if not is_finite_KB.all():
            has_drawn_KB = np.arange(steps)[:, None] >= read_B
            tokens_KB[has_drawn_KB & ~is_finite_KB] = NONE
        self._unread[:rows] -= read_B
        self._fed[:rows] += steps
        return Block(
            rows=self.rows.copy(),
            read=read_B.tolist(),
            unread=self.unread,
            tokens=tokens_KB.T.tolist(),
            states=states,
            judged={} if judging is None else judging.by_row(),
        )

    def _find_lone(self) -> LoneRow | None:
        """The only row as one that draws by itself, where nothing but a few rules bear on it."""
        if len(self.rows) != 1 or self._alphabet.has_states:
            return None
        (row,), barrier_V = self.rows, self._alphabet.barrier_SV[0]
        if row.is_judged or row.bias_V is not None or self._endless[0] > 0:
            return None
        if not LoneRow.can_draw(self._records[0], len(barrier_V)):
            return None
        return LoneRow(self._records[0], barrier_V)

    def _draw_ahead(self, steps: int) -> NDArray[np.float64]:
        """The uniform numbers of the coming steps, (K, B); made ahead for rows that have none."""
        if self._draw + steps > self._ahead:
            self._ahead = max(min(DRAWS_AT_ONCE // len(self.rows), DRAWS_AHEAD), steps)
            self._draw = 0
            self._undrawn.update(self.rows)
        if self._undrawn:
            fresh = [index for index, row in enumerate(self.rows) if row in self._undrawn]
            rows = [self.rows[index] for index in fresh]
            # The first draw follows the token that is fed next; before the text nothing is drawn.
            first = self._fed[fresh] + 1 - np.array([row.lead for row in rows], np.int64)
            position = first + np.arange(self._ahead - self._draw)[:, None]
            self._draws[self._draw : self._ahead, fresh] = uniforms(
                np.array([row.seed for row in rows]),
                np.array([row.choice for row in rows]),
                position,
            )
            self._undrawn.clear()
        self._draw += steps
        return self._draws[self._draw - steps : self._draw, : len(self.rows)]

    def _open_scripts(self, steps: int) -> NDArray[np.int64]:
        """What the scripts say for as many of the steps as any row reads on; `NONE` at a draw."""
        unread_B = self._unread[: len(self.rows)]
        longest = min(int(unread_B.max()), steps)
        if longest == 0:  # as in most blocks
            return np.empty((0, len(self.rows)), np.int64)
        script_KB = np.full((longest, len(self.rows)), NONE, np.int64)
        for index in np.flatnonzero(unread_B).tolist():
            fed = int(self._fed[index])
            coming = self.rows[index].script[fed + 1 : fed + 1 + longest]
            script_KB[: len(coming), index] = coming
        return script_KB

    def _find_marks(self, steps: int) -> dict[int, list[tuple[int, int]]]:
        """The rows and lengths whose states are due, by step; due marks are taken off the rows."""
        rows = len(self.rows)
        due: dict[int, list[tuple[int, int]]] = {}
        for index in np.flatnonzero(self._mark[:rows] <= self._fed[:rows] + steps).tolist():
            row, fed = self.rows[index], int(self._fed[index])
            for length in (mark for mark in row.marks if mark <= fed + steps):
                due.setdefault(length - fed - 1, []).append((index, length))
            row.marks = [mark for mark in row.marks if mark > fed + steps]
            self._mark[index] = min(row.marks, default=NEVER)
        return due

    def _find_endless(self, steps: int) -> NDArray[np.bool_]:
        """Which rows may not draw the end of a document, by step; no steps where all may."""
        rows = len(self.rows)
        barred_B = self._endless[:rows] - self._fed[:rows] - 1
        longest = min(max(int(barred_B.max()), 0), steps)
        return np.arange(longest)[:, None] < barred_B

    def _bar_end(
        self, barrier_BV: NDArray[np.float32], is_endless_B: NDArray[np.bool_]
    ) -> NDArray[np.float32]:
        """The barrier, which may have one row for all, with some rows' end of a document behind."""
        barred_BV = np.repeat(barrier_BV, len(is_endless_B) // len(barrier_BV), axis=0)
        barred_BV[is_endless_B, self._alphabet.tokenizer.end] = -np.inf
        return barred_BV
