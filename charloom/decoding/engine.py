"""Continuous batching: requests join and leave between blocks of steps, and all rows step together.

The engine owns a batch, a queue and perhaps a cache of states. `submit` gives a handle at once;
`step` admits who waits, as far as there are rows, moves all rows on by one block and tells each
handle what came of it. Every accepted request ends in exactly one outcome, whatever happens.

It steps in a thread of its own, which lives only while there is work, or by hand
(`own_thread=False`) with a clock of the caller's. A text does not depend on who else is served:
rows have the same bits in any company, draws come from counters, and block lengths decide only when
a text is looked at.

A block ends early where a stream's first token is due, so that it leaves at once.
"""

import atexit
import math
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from charloom.cell import State
from charloom.decoding.admission import WaitingLine
from charloom.decoding.alphabet import Alphabet
from charloom.decoding.batch import Batch, Block, Row
from charloom.decoding.cache import STRIDE, StateCache, Trail
from charloom.decoding.decoder import Decoder
from charloom.decoding.draws import uniforms
from charloom.decoding.request import Ending, Handle, Request
from charloom.decoding.sampling import Rules, draw, weigh
from charloom.decoding.sequence import Sequence
from charloom.decoding.task import Task, nothing_to_draw
from charloom.errors import BusyError, ClosedError, ModelError

BLOCK = 32
"""Most steps between two looks at the texts."""

BLOCK_TIME = 0.01
"""Seconds after which the texts are looked at anyway, by the step's time in the last block."""

_alive: "weakref.WeakSet[Engine]" = weakref.WeakSet()


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What an engine has to do, and has done since its start."""

    active: int
    waiting: int
    tokens_read: int
    tokens_drawn: int


class Engine:
    """Serves requests with one decoder."""

    def __init__(
        self,
        decoder: Decoder,
        alphabet: Alphabet,
        opening_V: NDArray[np.float32],
        *,
        name: bytes = b"",
        waiting: int = 1024,
        cache: StateCache | None = None,
        clock: Callable[[], float] = time.monotonic,
        own_thread: bool = True,
    ) -> None:
        """`opening_V` are the logits of a text that begins with nothing; `name` is the decoder's
        in a cache that others use too.
        """
        self._alphabet = alphabet
        self._opening_V = opening_V
        self._batch = Batch(decoder, alphabet)
        self._tasks: dict[Row, Task] = {}
        self._line: WaitingLine[Task] = WaitingLine()
        self._waiting = waiting
        # Those who wait for their prompt to be read by another choice of it.
        self._parked: set[Task] = set()
        self._is_alarmed = False
        self._next_deadline = math.inf
        self._name = name
        self._cache = cache
        self._clock = clock
        self._own_thread = own_thread
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._is_idle = threading.Condition(self._lock)
        self._is_closed = False
        self._step_time = 0.0
        self._tokens_read = 0
        self._tokens_drawn = 0

    @property
    def capacity(self) -> int:
        """How many texts are written at the same time; others wait."""
        return self._batch.capacity

    @property
    def fingerprint(self) -> str:
        """The decoder's."""
        return self._batch.fingerprint

    @property
    def ahead(self) -> int:
        """How many texts keep all rows busy without waiting in vain: a second lot where it may."""
        return self.capacity + min(self.capacity, self._waiting)

    @property
    def load(self) -> Load:
        """What there is to do, and what has been done."""
        with self._lock:
            return Load(
                active=len(self._tasks),
                waiting=len(self._line) + len(self._parked),
                tokens_read=self._tokens_read,
                tokens_drawn=self._tokens_drawn,
            )

    def submit(self, request: Request) -> Handle:
        """Take a request; raises `BusyError` when too many wait, `ClosedError` after `drain`."""
        lead, script = 0, request.prompt.tokens
        if self._alphabet.documents and request.is_beginning and request.state is None:
            lead, script = 1, request.prompt.after(self._alphabet.tokenizer.end)
        task = Task(
            request=request,
            handle=Handle(on_cancel=self._alarm),
            sequence=Sequence(request.params, self._alphabet, script=script),
            lead=lead,
            script=script,
        )
        with self._lock:
            if self._is_closed:
                raise ClosedError("The engine is shutting down; send the request to another.")
            # Those for whom there are rows wait for the next block only.
            free = self._batch.capacity - len(self._batch.rows)
            if len(self._line) + len(self._parked) - free >= self._waiting:
                raise BusyError(
                    f"{self._waiting} requests are waiting, which is all that may; try again later."
                )
            if self._own_thread and self._thread is None:
                _watch(self)
                thread = threading.Thread(target=self._run, name="charloom", daemon=True)
                thread.start()
                self._thread = thread
            self._line.push(request.owner, task)
            if request.deadline is not None:
                self._next_deadline = min(self._next_deadline, request.deadline)
        return task.handle

    def step(self) -> bool:
        """Admit who waits and move every row on by one block; False when there is nothing to do."""
        try:
            with self._lock:
                self._dismiss()
                self._admit()
                steps = self._choose_steps()
            if not steps:
                return False
            started = self._clock()
            block = self._batch.advance(steps)
            self._step_time = (self._clock() - started) / steps
            with self._lock:
                for index, row in enumerate(block.rows):
                    self._deliver(self._tasks[row], block, index)
        except BaseException as error:
            with self._lock:
                self._fail(error)
            if not isinstance(error, Exception) and not self._own_thread:
                raise
        return True

    def drain(self) -> None:
        """Take no more requests and finish those there are."""
        with self._lock:
            self._is_closed = True
            while self._own_thread and self._thread is not None:
                self._is_idle.wait()
        while not self._own_thread and self.step():
            pass

    def close(self) -> None:
        """Take no more requests and cancel those there are."""
        with self._lock:
            self._is_closed = True
            for task in (*self._tasks.values(), *self._line, *self._parked):
                task.handle.cancel()
        self.drain()

    def _run(self) -> None:
        """The life of the engine's own thread: from the first request until none is left."""
        while True:
            self.step()
            with self._lock:
                if not self._tasks and not self._line:
                    self._thread = None
                    self._is_idle.notify_all()
                    return

    def _alarm(self) -> None:
        self._is_alarmed = True

    def _dismiss(self) -> None:
        """End what has been cancelled or has had its time."""
        now = self._clock()
        if not self._is_alarmed and now < self._next_deadline:
            return
        self._is_alarmed = False
        # Rows last: with a reader those who wait for it come back into the line.
        over = self._line.take(lambda task: task.is_over(now))
        over += [task for task in (*self._parked, *self._tasks.values()) if task.is_over(now)]
        for task in over:
            self._end(task, "cancelled" if task.handle.is_cancelled else "deadline")
        left = (*self._tasks.values(), *self._line, *self._parked)
        deadlines = [task.request.deadline for task in left if task.request.deadline is not None]
        self._next_deadline = min(deadlines, default=math.inf)

    def _admit(self) -> None:
        """Give the free rows to those whose turn it is."""
        while self._line and len(self._batch.rows) < self._batch.capacity:
            task = self._line.pop()
            try:
                self._start(task)
            except BaseException as error:
                self._end(task, "failed", error)
                if not isinstance(error, Exception):
                    raise

    def _start(self, task: Task) -> None:
        """Find out from which state a request goes on, and let it join the batch there."""
        request, prompt = task.request, task.prompt
        script, state, fed, marks = task.script, None, 0, []
        if task.sequence.finish_reason is not None and not (request.is_scored and task.branch > 0):
            self._end(task, "length")
            return
        if len(script) == 0:
            script = self._open(task)
            if task.sequence.finish_reason is not None:
                self._end(task, task.sequence.finish_reason)
                return
        elif request.is_scored or request.state is not None:
            state, marks = request.state, [task.branch]
        elif task.branch == 0:
            pass
        elif prompt.state is not None:
            state, fed = prompt.state, task.branch
        elif prompt.reader is not None:
            prompt.waiting[task] = None
            self._parked.add(task)
            return
        else:
            fed, state = self._recall(task)
            if fed == task.branch:
                prompt.state = state
            else:
                prompt.reader = task
                marks = [task.branch]
        if self._cache is not None and not request.is_scored and request.state is None:
            task.trail = Trail(self._name + request.salt)
            marks.append(fed - fed % STRIDE + STRIDE)
        row = Row(
            script=script,
            lead=task.lead,
            params=request.params,
            seed=request.seed,
            choice=request.choice,
            bias_V=request.bias_V,
            is_judged=request.is_scored or request.params.logprobs is not None,
            marks=sorted(set(marks)),
            fed=fed,
        )
        self._batch.join(row, state)
        task.row = row
        self._tasks[row] = task

    def _recall(self, task: Task) -> tuple[int, State | None]:
        """The longest beginning of the script whose state the cache holds, and that state."""
        if self._cache is None:
            return 0, None
        found = self._cache.find(self._name + task.request.salt, task.script)
        if found is None:
            return 0, None
        task.cached_tokens = max(found[0] - task.lead, 0)
        return found

    def _open(self, task: Task) -> NDArray[np.int32]:
        """Draw the first token of a text that begins with nothing, as there is nothing to feed."""
        params = task.request.params
        with np.errstate(over="ignore", invalid="ignore"):
            urn = weigh(
                self._opening_V[None],
                Rules.stack([params]),
                barrier_BV=self._alphabet.barrier_SV[:1],
                bias_BV=None if task.request.bias_V is None else task.request.bias_V[None],
                counts_BV=np.zeros((1, len(self._opening_V)), np.int32),
            )
        if not np.isfinite(urn.peak_B1[0, 0]):
            raise nothing_to_draw()
        seed, choice = task.request.seed, task.request.choice
        token_1 = draw(urn, uniforms(seed, choice, np.zeros(1, np.int64)))
        weights_1V = urn.weights(np.zeros(1, np.int64), len(self._opening_V))
        judged = (self._opening_V[None], weights_1V)
        self._tokens_drawn += task.write(token_1.tolist(), judged)
        return token_1.astype(np.int32)

    def _choose_steps(self) -> int:
        """The length of the next block; 0 without rows."""
        steps = 0
        first = BLOCK if self._step_time <= 0 else int(BLOCK_TIME / self._step_time)
        for row, unread in zip(self._batch.rows, self._batch.unread, strict=True):
            task = self._tasks[row]
            steps = max(steps, unread + task.sequence.remaining)
            # A text that begins with nothing has its first token before the first block.
            opened = len(task.script) == 0
            if task.request.is_streamed and len(task.sequence.tokens) <= opened:
                first = min(first, unread + 1 - opened)
        return min(steps, max(first, 1), BLOCK, self._batch.longest_block)

    def _deliver(self, task: Task, block: Block, index: int) -> None:
        """Take over what a row did in a block, and end the request where its text ends."""
        read, tokens, judged = block.read[index], block.tokens[index], block.judged.get(index)
        self._tokens_read += read
        try:
            if read and judged is not None and task.request.is_scored:
                task.judge(tokens[:read], judged[0][:read])
            if read < len(tokens):
                later = None if judged is None else (judged[0][read:], judged[1][read:])
                self._tokens_drawn += task.write(tokens[read:] if read else tokens, later)
        except ModelError as error:
            self._end(task, "failed", error)
            return
        for length, state in block.states.get(index, ()):
            if length <= task.length:
                self._keep(task, length, state)
        if task.sequence.finish_reason is not None and not block.unread[index]:
            self._end(task, task.sequence.finish_reason)

    def _keep(self, task: Task, length: int, state: State) -> None:
        """Keep a state for the prompt's other choices and for later prompts that begin alike."""
        if length == task.branch:
            task.prompt.state = state
            self._let_go(task)
        if task.trail is not None and self._cache is not None:
            self._cache.put(task.key(length), state)
            if length % STRIDE == 0 and task.row is not None:
                self._batch.mark(task.row, length + STRIDE)

    def _let_go(self, task: Task) -> None:
        """Put those who waited for this reader of their prompt back to where their turn is next."""
        if task.prompt.reader is not task:
            return
        task.prompt.reader = None
        while task.prompt.waiting:
            waiting, _ = task.prompt.waiting.popitem()
            self._parked.discard(waiting)
            self._line.push_back(waiting.request.owner, waiting)

    def _end(self, task: Task, ending: Ending, error: BaseException | None = None) -> None:
        """Tell the outcome, and leave nothing of the request behind."""
        if task.row is not None:
            self._batch.leave(task.row)
            del self._tasks[task.row]
        if task in self._parked:
            self._parked.discard(task)
            del task.prompt.waiting[task]
        self._let_go(task)
        task.end(ending, error)

    def _fail(self, error: BaseException) -> None:
        """End every text in flight; those that wait are not touched."""
        tasks = list(self._tasks.values())
        # At once, as a decoder that failed may not even move a row.
        self._tasks.clear()
        self._batch.clear()
        for task in tasks:
            task.row = None
            self._end(task, "failed", error)


def _watch(engine: Engine) -> None:
    """Let the engine's thread not run into the end of the interpreter."""
    _close_at_exit()
    _alive.add(engine)


@cache
def _close_at_exit() -> None:
    """Ask once, and not on import, to be called at the interpreter's end."""
    atexit.register(_close_all)


def _close_all() -> None:
    for engine in list(_alive):
        engine.close()
