"""The models in memory: loaded when first asked for, replaced with their folder, unloaded at last.

When a model's folder holds another version, that is loaded for those who ask from then on, while
texts under way go on with the old one, which is *retired* and goes with its last user. What does
not verify is never served. What cannot be loaded for want of memory, or because the system refuses
to read its files, may be sound: after some seconds it is tried again for who asks.

Models stay as long as they fit the bytes they may take together. Then those go that nobody uses,
the one used least recently first. What does not fit beside models in use is refused for the moment,
and what fits at no time is loaded where there is no other.

All calls come from one thread, which never touches the disk, as that may be slow. Loading takes
tenths of a second and happens in another, one model at a time, and so does looking at the folder;
what they come to is taken over in `poll`. A name that the last look has not seen is refused after a
fresh one; names that nobody has heard of cannot keep the disk busy, as they share a look.
"""

import logging
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from charloom import checkpoint
from charloom.checkpoint import Stamp
from charloom.decoding.decoder import choose_kernel
from charloom.errors import CharloomError, UnreadableError
from charloom.model import Model
from charloom.params import Precision
from charloom.processors import available_threads
from service.engine.background import Background
from service.engine.catalogue import Catalogue, Entry, Sight, look
from service.engine.footprint import estimate
from service.errors import RequestError, failed, unavailable, unknown_model
from service.messages import ModelCard
from service.settings import Settings

SCAN_INTERVAL = 1.0
"""Seconds between two looks at the folder."""

SEEK_PAUSE = 0.25
"""Seconds after a look in which unknown names wait, and begin no other."""

RETRY_PAUSE = 5.0
"""Seconds for which a model is not loaded after there was no memory, file or permission for it."""

_log = logging.getLogger("charloom.engine")


class Served:
    """One version of a model, in memory; whoever uses it beyond a single call pins it meanwhile."""

    def __init__(
        self, card: ModelCard, model: Model, settings: Settings, *, clock: Callable[[], float]
    ) -> None:
        self.card = card
        self.model = model
        self.users = 0
        """How many have pinned it."""
        self.used_at = clock()
        self._settings = settings
        self._clock = clock

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.card.name

    @property
    def fingerprint(self) -> str:
        """Identifies weights and tokenizer."""
        return self.model.fingerprint

    @property
    def bytes(self) -> int:
        """The memory that it takes, by estimate, with the engines that are open."""
        return estimate(
            self.model.checkpoint.architecture,
            self.model.kernels,
            rows=self._settings.rows,
            cache=self._settings.cache_memory,
        )

    def precision(self, asked: Precision) -> Precision:
        """The precision of a request: the service's own where it asks for none."""
        return self._settings.precision if asked == "auto" else asked

    def pin(self) -> None:
        """Keep it in memory until `unpin`."""
        self.users += 1
        self.used_at = self._clock()

    def unpin(self) -> None:
        """Let it go, as far as this user is concerned."""
        assert self.users > 0, "nobody unpins what is not pinned"
        self.users -= 1
        self.used_at = self._clock()


Then = Callable[[Served | RequestError], None]
"""Who is told of a model that was asked for."""

Looked = Callable[[RequestError | None], None]
"""Who is told that the folder has been looked at, or why it was not."""


@dataclass(eq=False, kw_only=True, slots=True)
class _Load:
    """A model on its way into memory."""

    name: str
    bytes: int
    """The memory that it will take."""
    waiting: list[Then]


@dataclass(eq=False, kw_only=True, slots=True)
class _Opening:
    """What a load came to, and what the folder held meanwhile."""

    result: Model | Exception
    before: Stamp
    """Of all its files, before they were read."""
    after: Sight


class Shelf:
    """The models of `settings.models`; `wake` is called, in any thread, when `poll` has to be."""

    def __init__(
        self,
        settings: Settings,
        *,
        wake: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        open_model: Callable[[Path, Settings], Model] | None = None,
    ) -> None:
        """Look at the folder, and begin to load what is to be there from the start."""
        self._settings = settings
        self._clock = clock
        self._open_model = _open_model if open_model is None else open_model
        self._background = Background(wake, threads=1)
        self._scanning = Background(wake, threads=1)
        # Who waits for a scan that has not begun, since one under way may have passed their folder.
        self._seeking: list[Looked] = []
        self._looking: list[Looked] = []
        self._catalogue = Catalogue(settings.models)
        self._loaded: dict[str, Served] = {}
        self._retired: list[Served] = []
        self._loading: dict[str, _Load] = {}
        # Until when models are not tried again that might have been loaded at another time.
        self._rests: dict[str, float] = {}
        self._catalogue.scan()
        self._next_scan = clock() + SCAN_INTERVAL
        self._next_seek = -math.inf
        self._preload()

    @property
    def broken(self) -> Mapping[str, str]:
        """Why folders of these names are not served."""
        return self._catalogue.broken

    @property
    def pause(self) -> float:
        """Seconds for which there is nothing to do in `poll`, unless `wake` is called."""
        return max(self._next_scan - self._clock(), 0.0)

    def poll(self) -> None:
        """Hand out what has been loaded, look at the folder when it is time, tidy up."""
        self._background.deliver()
        self._scanning.deliver()
        self._scan_when_due()
        self._retired = [served for served in self._retired if served.users]

    def get(self, name: str, then: Then) -> None:
        """Call `then` with the model or with why there is none: at once where that is known, else
        in a later `poll`. Who goes on using the model pins it within that call.
        """
        served = self._loaded.get(name)
        if served is not None:
            served.used_at = self._clock()
            then(served)
            return
        self.seek(name, partial(self._get, name, then))

    def seek(self, name: str, then: Looked) -> None:
        """Call `then` when it is known whether there is such a model: at once where the last look
        tells, else after a fresh one, which may begin in `SEEK_PAUSE` seconds.
        """
        if not self._catalogue.is_new(name):
            then(None)
            return
        self._seeking.append(then)
        if not self._scanning.pending:
            self._next_scan = min(self._next_scan, self._next_seek)
            self._scan_when_due()

    @property
    def count(self) -> int:
        """How many models can be served."""
        return len(self._catalogue.entries)

    def cards(self) -> list[ModelCard]:
        """All models that can be served, by name."""
        return [self._card(entry) for _, entry in sorted(self._catalogue.entries.items())]

    def card(self, name: str) -> ModelCard | None:
        """One of them, as of the last look; None where there is none of that name."""
        entry = self._catalogue.entries.get(name)
        return None if entry is None else self._card(entry)

    def in_memory(self) -> tuple[Served, ...]:
        """All that is loaded, retired versions with users included."""
        return (*self._loaded.values(), *self._retired)

    def close(self) -> None:
        """Cancel all texts, refuse whoever waits for a model, and let all models go."""
        self._background.close()
        self._scanning.close()
        refusal = unavailable("The service is shutting down.", code="shutting_down")
        for load in self._loading.values():
            for then in load.waiting:
                then(refusal)
        for looked in (*self._looking, *self._seeking):
            looked(refusal)
        for served in self.in_memory():
            for engine in served.model.engines:
                engine.close()
        self._loading.clear()
        self._loaded.clear()
        self._retired.clear()

    def _card(self, entry: Entry) -> ModelCard:
        return _loaded_card(entry) if entry.card.name in self._loaded else entry.card

    def _preload(self) -> None:
        """Load what the settings name, and a model that is the only one."""
        names = list(self._settings.preload)
        if len(self._catalogue.entries) == 1:
            names += self._catalogue.entries

        def remark(name: str, found: Served | RequestError) -> None:
            if isinstance(found, RequestError):
                _log.warning("The model %r is not loaded at the start: %s", name, found)

        for name in dict.fromkeys(names):
            self.get(name, partial(remark, name))

    def _get(self, name: str, then: Then, refusal: RequestError | None) -> None:
        """Give out a model that the last look has seen, if it has."""
        entry = self._catalogue.entries.get(name)
        if refusal is not None:
            then(refusal)
        elif name in self._loaded:
            then(self._loaded[name])
        elif entry is not None and name in self._loading:
            self._loading[name].waiting.append(then)
        elif entry is None or self._rest(name) > 0 or not self._load(name, entry, then):
            then(self._refusal(name))

    def _scan_when_due(self) -> None:
        """Begin to look at the folder if it is time, for all who wait by now."""
        if self._clock() < self._next_scan:
            return
        self._next_scan = math.inf
        self._looking, self._seeking = self._seeking, []
        self._scanning.run(self._catalogue.scanned(), self._scanned)

    def _scanned(self, result: Catalogue | Exception) -> None:
        """Take over what the folder holds."""
        self._next_scan = self._clock() + SCAN_INTERVAL
        self._next_seek = self._clock() + SEEK_PAUSE
        told, self._looking = self._looking, []
        if isinstance(result, Exception):
            _log.error("The models' folder could not be looked at.", exc_info=result)
        elif result.changes != self._catalogue.changes:  # it does not know what was found meanwhile
            self._seeking = told + self._seeking
            told = []
            self._next_scan = self._clock()
        else:
            self._catalogue = result
            self._follow()
            self._make_room(0)  # engines that were opened meanwhile take memory too
        for then in told:
            then(None)
        if self._seeking:
            self._next_scan = min(self._next_scan, self._next_seek)

    def _follow(self) -> None:
        """Retire what the folder no longer holds, and load the version that it holds instead."""
        self._rests = {name: until for name, until in self._rests.items() if self._rest(name) > 0}
        for name, served in list(self._loaded.items()):
            entry = self._catalogue.entries.get(name)
            if entry is not None and entry.card.fingerprint == served.fingerprint:
                served.card = _loaded_card(entry)
                continue
            del self._loaded[name]
            if served.users:
                self._retired.append(served)
            _log.info("The model %r of fingerprint %s is retired.", name, served.fingerprint)
            if entry is not None:
                self._load(name, entry)  # where there is no memory, whoever asks next tries again

    def _load(self, name: str, entry: Entry, *waiting: Then) -> bool:
        """Begin to load a model; False where there is no memory for it now."""
        need = estimate(
            entry.architecture,
            [choose_kernel(self._settings.precision)],
            rows=self._settings.rows,
            cache=self._settings.cache_memory,
        )
        if not self._make_room(need):
            return False
        if need > self._settings.model_memory:
            _log.warning(
                "The model %r takes about %d bytes, which CHARLOOM_MODEL_MEMORY does not allow; "
                "it is loaded because there is no other.",
                name,
                need,
            )
        load = self._loading[name] = _Load(name=name, bytes=need, waiting=list(waiting))
        self._background.run(
            partial(_open, self._open_model, self._catalogue.path(name), self._settings),
            partial(self._finish, load),
        )
        return True

    def _finish(self, load: _Load, opening: _Opening | Exception) -> None:
        """Take over what a load came to, and tell those who wait for it."""
        name = load.name
        del self._loading[name]
        found: Served | None = None
        if isinstance(opening, Exception):  # a defect, which says nothing of the files
            self._put_off(name, opening)
        elif isinstance(opening.result, Model):
            found = self._receive(name, opening.result, opening.after)
        elif _is_passing(opening.result):
            self._put_off(name, opening.result)
        elif opening.before == opening.after.stamp and not opening.after.is_missing:
            self._reject(name, opening.result, opening.before)
        else:  # what could not be read is no longer there
            entry = self._catalogue.renew(name, opening.after)
            if entry is not None and self._load(name, entry, *load.waiting):
                return
        for then in load.waiting:
            then(self._refusal(name) if found is None else found)

    def _reject(self, name: str, error: Exception, stamp: Stamp) -> None:
        """Serve no more what could not be loaded."""
        reason = str(error)
        if not isinstance(error, CharloomError):
            _log.error("Loading the model %r has failed.", name, exc_info=error)
            reason = f"it cannot be loaded ({type(error).__name__})"
        self._catalogue.reject(name, reason, stamp)

    def _put_off(self, name: str, error: Exception) -> None:
        """Leave a model alone for a while that may be sound."""
        cause = None if isinstance(error, CharloomError) else error
        reason = str(error) if cause is None else type(error).__name__
        _log.error("The model %r cannot be loaded at the moment: %s", name, reason, exc_info=cause)
        self._rests[name] = self._clock() + RETRY_PAUSE

    def _rest(self, name: str) -> float:
        """Seconds for which a model is still left alone."""
        return self._rests.get(name, -math.inf) - self._clock()

    def _receive(self, name: str, model: Model, sight: Sight) -> Served | None:
        """Put a model on the shelf; None where its folder has been removed or damaged meanwhile."""
        entry = self._catalogue.entries.get(name)
        if entry is not None and entry.card.fingerprint != model.fingerprint:
            # Committed again since the last scan. Should it happen once more, the next one sees it.
            entry = self._catalogue.renew(name, sight)
        if entry is None:
            return None
        card = _loaded_card(entry)
        self._loaded[name] = served = Served(card, model, self._settings, clock=self._clock)
        _log.info("The model %r of fingerprint %s is loaded.", name, model.fingerprint)
        return served

    def _refusal(self, name: str) -> RequestError:
        """Why somebody gets no model."""
        is_known, rest = name in self._catalogue.entries, self._rest(name)
        if self._catalogue.may_be_sound(name) or (is_known and rest > 0):
            return unavailable(
                f"The model {name!r} cannot be loaded at the moment, and the service's log says "
                "why; ask again in some seconds.",
                code="model_unavailable",
                retry_after=rest if rest > 0 else SCAN_INTERVAL,
            )
        if is_known:
            return unavailable(
                f"There is no memory for the model {name!r} beside those in use; ask again when "
                "they are done.",
                code="model_memory",
            )
        if name in self._catalogue.broken:
            return failed(
                f"The model {name!r} is damaged and not served until it is restored; the "
                "service's log says what is wrong.",
                code="model_damaged",
            )
        return unknown_model(name)

    def _make_room(self, need: int) -> bool:
        """Unload what nobody uses until so many bytes are free; whether they are, or nothing else
        is in memory. Without a need the last model stays.
        """
        kept = sum(served.bytes for served in self.in_memory() if served.users) + self._coming
        if need and kept and kept + need > self._settings.model_memory:
            return False  # unloading all the others would not do
        while self._bytes + need > self._settings.model_memory:
            idle = [served for served in self._loaded.values() if not served.users]
            if not idle or (need == 0 and len(self.in_memory()) == 1):
                break
            oldest = min(idle, key=lambda served: served.used_at)
            del self._loaded[oldest.name]
            _log.info("The model %r is unloaded.", oldest.name)
        is_alone = not (self._loaded or self._retired or self._loading)
        return is_alone or self._bytes + need <= self._settings.model_memory

    @property
    def _bytes(self) -> int:
        """The memory that all models take, those on their way included."""
        return sum(served.bytes for served in self.in_memory()) + self._coming

    @property
    def _coming(self) -> int:
        """The memory that models on their way will take."""
        return sum(load.bytes for load in self._loading.values())


def _loaded_card(entry: Entry) -> ModelCard:
    """The card of a model that is in memory."""
    return msgspec.structs.replace(entry.card, is_loaded=True)


def _is_passing(error: Exception) -> bool:
    """Whether what a load failed with says nothing about what is in the files."""
    return isinstance(error, MemoryError | OSError | UnreadableError)


def _open(
    open_model: Callable[[Path, Settings], Model], path: Path, settings: Settings
) -> _Opening:
    """Load a model, and look at its folder before and afterwards."""
    before = checkpoint.stamp(path)
    result: Model | Exception
    try:
        result = open_model(path, settings)
    except Exception as error:  # whatever is wrong with a model is told to who waits for it
        result = error
    return _Opening(result=result, before=before, after=look(path))


def _open_model(path: Path, settings: Settings) -> Model:
    """Load and verify a model, to be stepped by hand, and open the engine of the service's
    precision.

    Its queue has no limit of its own, as requests are counted before they come to it. Raises as
    `charloom.checkpoint.load` and `Model.engine` do.
    """
    spare = max(available_threads() - 1, 1)
    model = Model(
        checkpoint.load(path),
        threads=spare if settings.threads is None else settings.threads,
        own_thread=False,
        spinning=False,
        capacity=settings.rows,
        waiting=sys.maxsize,
        cache=settings.cache_memory,
    )
    model.engine(settings.precision)
    return model
