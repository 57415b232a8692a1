"""What a folder of models holds: those that can be served, and why the others cannot.

What a model's files look like from outside tells whether it has been committed again, or damaged,
so a look at models that are as they were reads none of them. A model that is damaged is logged once
and looked at again when any of its files changes; damage that changes no size is found when it is
loaded. What the system refused to read may be sound, and is looked at again each time.

All that is told of a model is made and encoded for trial where its folder is looked at, so that an
odd `config.json` keeps no other model from being served.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from charloom import checkpoint
from charloom.architecture import Architecture
from charloom.checkpoint import ModelEntry, Stamp, check_name, inspect_model, model_names
from charloom.errors import ModelMissingError, ModelNameError
from service.frames import FrameError, encode
from service.messages import Answer, ModelCard, Models
from service.settings import check_template

CARD_LIMIT = 1 << 16
"""Bytes of the longest card, of a thousand of which one message can still tell."""

_log = logging.getLogger("charloom.engine")


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A model that can be served, as far as can be told without reading it."""

    architecture: Architecture
    card: ModelCard
    """As if it was not loaded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sight:
    """What the folder of one model held at a look: a model, or why that is none, or neither."""

    stamp: Stamp
    entry: Entry | None = None
    problem: str | None = None
    is_passing: bool = False
    """Whether the problem may be gone the next time, though no file has changed."""

    @property
    def is_missing(self) -> bool:
        """Whether there is nothing that could be a model."""
        return self.entry is None and self.problem is None


def look(path: Path) -> Sight:
    """Look at a model's folder, in any thread, since its disk may be slow."""
    # Taken first: what changes while the folder is read is seen the next time.
    stamp = checkpoint.stamp(path)
    try:
        check_name(path.name)
        found = inspect_model(path)
        if found.problem is not None:
            return Sight(stamp=stamp, problem=found.problem, is_passing=found.is_unreadable)
        return Sight(stamp=stamp, entry=_describe(path.name, found))
    except ModelNameError as error:
        return Sight(stamp=stamp, problem=str(error))
    except ModelMissingError:
        return Sight(stamp=stamp)
    except FrameError as error:
        problem = f"What its config.json says cannot be told to clients: {error}"
        return Sight(stamp=stamp, problem=problem)
    except Exception as error:  # one odd folder is no reason to look at no other
        is_passing = isinstance(error, MemoryError | OSError)
        if not is_passing:  # else it would be told at each look
            _log.error("Looking at the model %r has failed.", path.name, exc_info=error)
        problem = f"it cannot be looked at ({type(error).__name__}: {error})"
        return Sight(stamp=stamp, problem=problem, is_passing=is_passing)


class Catalogue:
    """The models of a folder as they were at the last look."""

    def __init__(self, models: Path) -> None:
        self._models = models
        self._entries: dict[str, Entry] = {}
        self._broken: dict[str, str] = {}
        self._stamps: dict[str, Stamp] = {}
        self._obstacle: str | None = None
        self.changes = 0
        """How often something was noted from outside a scan."""

    @property
    def entries(self) -> Mapping[str, Entry]:
        """The models that can be served, by name."""
        return self._entries

    @property
    def broken(self) -> Mapping[str, str]:
        """Why folders of these names are not served."""
        return self._broken

    def path(self, name: str) -> Path:
        """Where a model lies."""
        return self._models / name

    def scanned(self) -> Callable[[], "Catalogue"]:
        """What looks at the folder, in any thread, and gives another catalogue of what is there
        then; this one stays as it is meanwhile.
        """
        other = Catalogue(self._models)
        other._entries, other._broken = self._entries.copy(), self._broken.copy()
        other._stamps, other._obstacle = self._stamps.copy(), self._obstacle
        other.changes = self.changes

        def scan() -> Catalogue:
            other.scan()
            return other

        return scan

    def scan(self) -> None:
        """Look at every folder, and forget those that are gone.

        Where the folder of them all cannot be read, as when its disk is away, all stays as it was.
        """
        try:
            names = model_names(self._models)
        except ModelMissingError as error:
            if str(error) != self._obstacle:
                _log.error("%s", error)
            self._obstacle = str(error)
            return
        self._obstacle = None
        for name in {*self._entries, *self._broken}.difference(names):
            self._forget(name)
        for name in names:
            if self._stamps.get(name) != checkpoint.stamp(self.path(name)):
                self._note(name, look(self.path(name)))

    def is_new(self, name: str) -> bool:
        """Whether only a fresh scan could tell of a model of this name."""
        try:
            check_name(name)
        except ModelNameError:
            return False
        return name not in self._entries and name not in self._broken

    def may_be_sound(self, name: str) -> bool:
        """Whether a model is broken only as far as could be told so far."""
        return name in self._broken and name not in self._stamps

    def renew(self, name: str, sight: Sight) -> Entry | None:
        """A model that can be served, by a look that came after the last scan."""
        self.changes += 1
        self._note(name, sight)
        return self._entries.get(name)

    def reject(self, name: str, reason: str, stamp: Stamp) -> None:
        """Serve a model no more until its files, which had this stamp, change."""
        self.changes += 1
        self._note_broken(name, reason, stamp)

    def _note_broken(self, name: str, reason: str, stamp: Stamp | None) -> None:
        """Take a model out; without a stamp it is looked at again each time."""
        if self._broken.get(name) != reason:
            _log.error("The model %r is not served: %s", name, reason)
        self._broken[name] = reason
        self._entries.pop(name, None)
        self._stamps.pop(name, None)
        if stamp is not None:
            self._stamps[name] = stamp

    def _note(self, name: str, sight: Sight) -> None:
        """Take over what was seen of a folder."""
        if sight.problem is not None and sight.is_passing:
            if name not in self._entries:  # what was sound is taken for sound until it is read
                self._note_broken(name, sight.problem, None)
        elif sight.problem is not None:
            self._note_broken(name, sight.problem, sight.stamp)
        elif sight.entry is None:
            self._forget(name)
        else:
            if self._broken.pop(name, None) is not None:
                _log.info("The model %r is sound again.", name)
            self._entries[name] = sight.entry
            self._stamps[name] = sight.stamp

    def _forget(self, name: str) -> None:
        for known in (self._entries, self._broken, self._stamps):
            known.pop(name, None)


def _describe(name: str, entry: ModelEntry) -> Entry:
    """What is told of a model without a problem; raises `FrameError` where it has no encoding or
    would crowd out what is told of others.
    """
    architecture, created = entry.architecture, entry.created
    assert architecture is not None, "of a model without a problem all facts are known"
    assert created is not None
    assert entry.fingerprint is not None
    assert entry.tokenizer is not None
    assert entry.documents is not None
    card = ModelCard(
        name=name,
        created=_seconds(created),
        fingerprint=entry.fingerprint,
        architecture=architecture.to_json(),
        parameters=architecture.parameters,
        tokenizer=entry.tokenizer,
        vocabulary=architecture.vocabulary,
        documents=entry.documents,
        bits_per_character=entry.bits_per_character,
        is_loaded=False,
        chat_template=_template(entry),
    )
    size = len(encode(Answer(id=0, body=Models(cards=[card]))))
    if size > CARD_LIMIT:
        raise FrameError(f"It takes {size:,} bytes, and may take {CARD_LIMIT:,}.")
    return Entry(architecture=architecture, card=card)


def _seconds(created: str) -> int:
    """A time of config.json as seconds since 1970."""
    moment = datetime.fromisoformat(created)
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


def _template(entry: ModelEntry) -> str | None:
    """The model's own chat template, where it has one that settings might have too."""
    template = entry.summary.get("chat_template")
    try:
        return check_template(template) if isinstance(template, str) else None
    except ValueError:
        return None
