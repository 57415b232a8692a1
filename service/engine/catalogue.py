"""What a folder of models holds: those that can be served, and why the others cannot.

What a model's files look like from outside tells whether it has been committed again, or damaged,
so a look at models that are as they were reads none of them. A model that is damaged is logged once
and looked at again when any of its files changes; damage that changes no size is found when it is
loaded.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from charloom import checkpoint
from charloom.checkpoint import ModelEntry, Stamp, check_name, inspect_model, model_names
from charloom.errors import ModelMissingError, ModelNameError
from service.messages import ModelCard
from service.settings import check_template

_log = logging.getLogger("charloom.engine")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sight:
    """What the folder of one model held at a look: a model, or why that is none, or neither."""

    stamp: Stamp
    entry: ModelEntry | None = None
    problem: str | None = None

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
        entry = inspect_model(path)
    except ModelNameError as error:
        return Sight(stamp=stamp, problem=str(error))
    except ModelMissingError:
        return Sight(stamp=stamp)
    if entry.problem is not None:
        return Sight(stamp=stamp, problem=entry.problem)
    return Sight(stamp=stamp, entry=entry)


class Catalogue:
    """The models of a folder as they were at the last look."""

    def __init__(self, models: Path) -> None:
        self._models = models
        self._entries: dict[str, ModelEntry] = {}
        self._broken: dict[str, str] = {}
        self._stamps: dict[str, Stamp] = {}
        self._obstacle: str | None = None
        self.changes = 0
        """How often something was noted from outside a scan."""

    @property
    def entries(self) -> Mapping[str, ModelEntry]:
        """The models that can be served, by name, as far as can be told without reading them."""
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

    def renew(self, name: str, sight: Sight) -> ModelEntry | None:
        """A model that can be served, by a look that came after the last scan."""
        self.changes += 1
        self._note(name, sight)
        return sight.entry

    def reject(self, name: str, reason: str, stamp: Stamp) -> None:
        """Serve a model no more until its files, which had this stamp, change."""
        self.changes += 1
        self._note_broken(name, reason, stamp)

    def _note_broken(self, name: str, reason: str, stamp: Stamp) -> None:
        if self._broken.get(name) != reason:
            _log.error("The model %r is not served: %s", name, reason)
        self._broken[name] = reason
        self._stamps[name] = stamp
        self._entries.pop(name, None)

    def _note(self, name: str, sight: Sight) -> None:
        """Take over what was seen of a folder."""
        if sight.problem is not None:
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


def describe(name: str, entry: ModelEntry, *, is_loaded: bool) -> ModelCard:
    """The card of a model that can be served."""
    architecture, created = entry.architecture, entry.created
    assert architecture is not None, "of a model without a problem all facts are known"
    assert created is not None
    assert entry.fingerprint is not None
    assert entry.tokenizer is not None
    assert entry.documents is not None
    return ModelCard(
        name=name,
        created=_seconds(created),
        fingerprint=entry.fingerprint,
        architecture=architecture.to_json(),
        parameters=architecture.parameters,
        tokenizer=entry.tokenizer,
        vocabulary=architecture.vocabulary,
        documents=entry.documents,
        bits_per_character=entry.bits_per_character,
        is_loaded=is_loaded,
        chat_template=_template(entry),
    )


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
