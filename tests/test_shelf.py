import gc
import json
import logging
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import charloom
from charloom import checkpoint
from charloom.architecture import Architecture
from charloom.checkpoint import ModelWriter, WriteMode, inspect_model, model_names
from charloom.checkpoint.manifest import model_fingerprint
from charloom.decoding.request import Prompt, Request
from charloom.errors import CheckpointError, UnreadableError
from charloom.model import Model
from charloom.params import SamplingParams
from charloom.tokenizer import CharacterTokenizer
from service.engine import catalogue
from service.engine.shelf import RETRY_PAUSE, SCAN_INTERVAL, SEEK_PAUSE, Served, Shelf
from service.errors import RequestError
from service.frames import encode
from service.messages import Answer, Models
from service.settings import Settings

LETTERS = CharacterTokenizer("abcdefgh ")


def save(
    path: Path,
    *,
    seed: int = 0,
    hidden: int = 12,
    mode: WriteMode = "new",
    summary: dict[str, Any] | None = None,
) -> str:
    """Commit a tiny random model; its fingerprint."""
    architecture = Architecture(
        cell="lstm", vocabulary=LETTERS.vocabulary_size, embedding=8, hidden=hidden, layers=1
    )
    rng = np.random.default_rng(seed)
    with ModelWriter(path, mode=mode) as writer:
        writer.commit(
            architecture=architecture,
            tokenizer=LETTERS,
            tensors={
                name: rng.uniform(-1, 1, shape).astype(np.float32)
                for name, shape in architecture.tensor_shapes().items()
            },
            token_counts=np.ones(LETTERS.vocabulary_size, np.int64),
            documents="none",
            summary={} if summary is None else summary,
            trainer=None,
        )
    fingerprint = inspect_model(path).fingerprint
    assert fingerprint is not None
    return fingerprint


def damage(path: Path) -> Callable[[], None]:
    """Change a weight, which only reading the file shows; gives what mends it."""
    (weights,) = path.glob("weights-*")
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    return lambda: weights.write_bytes(content) and None


def cut(path: Path) -> Callable[[], None]:
    """Take a byte off the weights, which their size shows; gives what mends it."""
    (weights,) = path.glob("weights-*")
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    return lambda: weights.write_bytes(content) and None


def lose(path: Path) -> Callable[[], None]:
    """Move the tokenizer away; gives what mends it."""
    (tokenizer,) = path.glob("tokenizer-*")
    elsewhere = path.parent.parent / tokenizer.name
    tokenizer.rename(elsewhere)
    return lambda: elsewhere.rename(tokenizer) and None


def scribble(path: Path) -> Callable[[], None]:
    """Write nonsense over config.json; gives what mends it."""
    content = (path / "config.json").read_bytes()
    (path / "config.json").write_bytes(b"{")
    return lambda: (path / "config.json").write_bytes(content) and None


def rewrite(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change a config.json by hand, and sign it as its writer would."""
    config = json.loads((path / "config.json").read_bytes())
    edit(config)
    config["fingerprint"] = model_fingerprint(
        config["architecture"],
        config["tokenizer"]["fingerprint"],
        config["documents"],
        config["files"]["weights"]["sha256"],
    )
    (path / "config.json").write_text(json.dumps(config))


class House:
    """A folder of models, a shelf of it, and the loop that owns the shelf."""

    def __init__(
        self,
        models: Path,
        *,
        open_model: Callable[[Path, Settings], Model] | None = None,
        **settings: Any,
    ) -> None:
        self.now = 0.0
        self.woken = threading.Event()
        self.shelf = Shelf(
            Settings(models=models, threads=1, rows=4, cache_memory=0, **settings),
            wake=self.woken.set,
            clock=lambda: self.now,
            open_model=open_model,
        )

    def close(self) -> None:
        """Close the shelf."""
        self.shelf.close()

    def ask(self, name: str) -> list[Served | RequestError]:
        """Ask for a model; what is given will be in the list."""
        found: list[Served | RequestError] = []
        self.shelf.get(name, found.append)
        return found

    def settle(self) -> None:
        """Wait for all that is being looked at and loaded, or is to be looked at soon."""
        while True:
            if self.shelf._scanning.pending or self.shelf._background.pending:
                self.wait()
            elif self.shelf._seeking:
                self.later(self.shelf.pause)
            else:
                return

    def wait(self) -> None:
        """Wait for the next thing that has been done in the background."""
        assert self.woken.wait(timeout=60)
        self.woken.clear()
        self.shelf.poll()

    def load(self, name: str) -> Served:
        """Wait for a model."""
        found = self.ask(name)
        self.settle()
        (served,) = found
        assert isinstance(served, Served)
        return served

    def refuse(self, name: str) -> RequestError:
        """Wait for a refusal."""
        found = self.ask(name)
        self.settle()
        (error,) = found
        assert isinstance(error, RequestError)
        return error

    def later(self, seconds: float = SCAN_INTERVAL) -> None:
        """Let some time pass, after which the folder is looked at."""
        self.now += seconds
        self.shelf.poll()
        while self.shelf._scanning.pending:
            self.wait()

    def names(self) -> list[str]:
        """The names of the models that are served."""
        return [card.name for card in self.shelf.cards()]

    def loaded(self) -> set[str]:
        """The names of those in memory."""
        return {served.name for served in self.shelf.in_memory()}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """An empty folder for models."""
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


Open = Callable[..., House]


@pytest.fixture
def open_house(models: Path) -> Iterator[Open]:
    """Opens a shelf of the folder, which is closed with the test."""
    houses = []

    def open_it(**settings: Any) -> House:
        houses.append(House(models, **settings))
        return houses[-1]

    yield open_it
    for house in houses:
        house.close()


def memory_for(models: Path, count: int) -> int:
    """Bytes in which so many of the models that lie there fit, and not one more."""
    with closing(House(models)) as house:
        sizes = [house.load(name).bytes for name in house.names()]
    return count * max(sizes) + max(sizes) // 2


def write(served: Served, **options: Any) -> str:
    """The text that a model writes, its engine stepped by hand."""
    engine = served.model.engine("auto")
    params = SamplingParams(max_tokens=20, **options)
    prompt = Prompt(LETTERS.encode("abc"))
    handle = engine.submit(Request(prompt=prompt, params=params, seed=5))
    while engine.step():
        pass
    return handle.result().text


# Loading


def test_a_model_is_loaded_when_it_is_first_asked_for(models: Path, open_house: Open) -> None:
    """Not before, and not in the thread that asks; who asks next gets it at once."""
    save(models / "one")
    save(models / "two", seed=1)
    house = open_house()
    assert [card.is_loaded for card in house.shelf.cards()] == [False, False]
    found = house.ask("one")
    assert found == []
    house.settle()
    (served,) = found
    assert house.ask("one") == [served]
    assert [card.is_loaded for card in house.shelf.cards()] == [True, False]
    assert house.shelf.in_memory() == (served,)


def test_all_who_wait_get_the_same_model(models: Path, open_house: Open) -> None:
    """It is loaded once, however many ask for it meanwhile."""
    save(models / "one")
    save(models / "two")
    house = open_house()
    waiting = [house.ask("one") for _ in range(3)]
    house.settle()
    (served,) = house.shelf.in_memory()
    assert waiting == [[served]] * 3


def test_a_single_model_is_loaded_at_the_start(models: Path, open_house: Open) -> None:
    """Whoever comes first need not wait for it."""
    save(models / "only")
    house = open_house()
    house.settle()
    assert house.loaded() == {"only"}


def test_models_named_by_the_settings_are_loaded_at_the_start(
    models: Path, open_house: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """Those there are; a name that is none of them is told."""
    for name in ("one", "two", "three"):
        save(models / name)
    house = open_house(preload=["two", "one", "nobody"])
    house.settle()
    assert house.loaded() == {"one", "two"}
    assert "'nobody' is not loaded at the start" in caplog.text


def test_a_served_model_writes_what_it_writes_elsewhere(models: Path, open_house: Open) -> None:
    """Its engine is stepped by hand, and the text is that of the Python interface."""
    save(models / "only")
    served = open_house().load("only")
    expected = charloom.load(models / "only").generate("abc", max_tokens=20, seed=5).text
    assert write(served) == expected


def test_settings_reach_the_model(models: Path, open_house: Open) -> None:
    """Rows and threads are those of the settings, and the precision's engine is open."""
    save(models / "only")
    house = open_house(precision="float32")
    served = house.load("only")
    (engine,) = served.model.engines
    assert (engine.capacity, served.model.threads) == (4, 1)
    assert served.model.is_open("float32")
    assert (served.precision("auto"), served.precision("int8")) == ("float32", "int8")


# Names and cards


@pytest.mark.parametrize(
    "name", ["", "nobody", "../models/only", "only/", ".", "..", "on\0ly", ".only.lock", "x" * 5000]
)
def test_a_name_that_is_no_folder_is_not_served(name: str, models: Path, open_house: Open) -> None:
    """It is told so, and no name leads out of the folder."""
    save(models / "only")
    house = open_house()
    error = house.refuse(name)
    assert (error.problem.status, error.problem.param) == (404, "model")
    assert house.shelf.card(name) is None


def test_a_card_tells_what_is_known(models: Path, open_house: Open) -> None:
    """Facts come from config.json alone, held-out loss and chat template where there are any."""
    summary = {
        "validation": {"windows": {"bits_per_character": 2.5}},
        "chat_template": "{role}: {content}\n",
    }
    fingerprint = save(models / "詩", summary=summary)
    save(models / "bare", summary={"chat_template": "{content.__class__}"})
    bare, card = open_house().shelf.cards()
    assert (card.name, card.fingerprint, card.documents) == ("詩", fingerprint, "none")
    assert (card.tokenizer, card.vocabulary) == ("characters", LETTERS.vocabulary_size)
    assert card.architecture["cell"] == "lstm"
    assert card.parameters == charloom.load(models / "詩").checkpoint.architecture.parameters
    assert (card.bits_per_character, card.chat_template) == (2.5, "{role}: {content}\n")
    assert abs(card.created - (models / "詩" / "config.json").stat().st_mtime) < 60
    assert (bare.bits_per_character, bare.chat_template) == (None, None)


def test_a_folder_without_a_model_s_name_is_not_served(
    models: Path, open_house: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """What could not be named in an address is told like damage."""
    save(models / "good")
    shutil.copytree(models / "good", models / "my model")
    house = open_house()
    assert house.names() == ["good"]
    assert "holds ' '" in house.shelf.broken["my model"]
    assert "'my model' is not served" in caplog.text


# Damage


@pytest.mark.parametrize("spoil", [damage, cut, lose, scribble])
def test_a_damaged_model_is_never_served(
    spoil: Callable[[Path], Callable[[], None]],
    models: Path,
    open_house: Open,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is refused without a word about files, logged once, kept as broken, and served again when
    it is mended.
    """
    save(models / "bad")
    save(models / "good")
    mend = spoil(models / "bad")
    house = open_house()
    for _ in range(3):
        problem = house.refuse("bad").problem
        assert (problem.status, problem.code) == (500, "model_damaged")
        assert str(models) not in problem.message
        assert house.names() == ["good"]
        assert house.shelf.card("bad") is None
        house.later()
    assert list(house.shelf.broken) == ["bad"]
    assert caplog.text.count("'bad' is not served") == 1
    assert house.load("good").name == "good"
    mend()
    house.later()
    assert (house.names(), dict(house.shelf.broken)) == (["bad", "good"], {})
    assert house.load("bad").name == "bad"


def test_a_model_that_the_runtime_refuses_is_damaged(
    models: Path, open_house: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever a load fails with, those who wait are told, the log says more, and it is not tried
    again in vain.
    """
    tried: list[Path] = []

    def fail(path: Path, _settings: Settings) -> Model:
        tried.append(path)
        raise RuntimeError("no kernel of that name")

    save(models / "odd")
    house = open_house(open_model=fail)
    for _ in range(3):
        assert house.refuse("odd").problem.code == "model_damaged"
        house.later()
    assert tried == [models / "odd"]
    assert house.shelf.broken == {"odd": "it cannot be loaded (RuntimeError)"}
    assert "no kernel of that name" in caplog.text
    save(models / "odd", seed=1, mode="overwrite")
    house.later()
    house.refuse("odd")
    assert len(tried) == 2


@pytest.mark.parametrize(
    "edit",
    [
        lambda config: config.update(summary={"chat_template": "\ud800{content}"}),
        lambda config: config.update(summary={"chat_template": "{content}" + "x" * 2**16}),
        lambda config: config["architecture"].update(hidden=10**12),
        lambda config: config["tokenizer"].update(kind="\ud800"),
    ],
    ids=["half a character", "too long", "too large", "odd tokenizer"],
)
def test_what_cannot_be_told_of_a_model_is_that_model_s_problem(
    edit: Callable[[dict[str, Any]], Any],
    models: Path,
    open_house: Open,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is never listed, logged once, and the list of the others can be sent."""
    save(models / "good")
    save(models / "odd", seed=1)
    rewrite(models / "odd", edit)
    house = open_house()
    for _ in range(2):
        assert encode(Answer(id=1, body=Models(cards=house.shelf.cards())))
        assert (house.names(), house.shelf.count) == (["good"], 1)
        assert list(house.shelf.broken) == ["odd"]
        assert house.refuse("odd").problem.code == "model_damaged"
        house.later()
    assert caplog.text.count("'odd' is not served") == 1


def test_a_loss_beyond_all_numbers_is_none(models: Path, open_house: Open) -> None:
    """Whole numbers of JSON have no end, and a summary is free-form."""
    save(models / "odd", summary={"validation": {"windows": {"bits_per_character": 10**400}}})
    (card,) = open_house().shelf.cards()
    assert card.bits_per_character is None


def test_what_fails_to_be_looked_at_leaves_the_others(
    models: Path,
    open_house: Open,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An unforeseen failure on one folder is told once, and that model's problem alone."""

    def inspect(path: Path) -> checkpoint.ModelEntry:
        if path.name == "odd":
            raise RuntimeError("nobody thought of this")
        return inspect_model(path)

    monkeypatch.setattr(catalogue, "inspect_model", inspect)
    save(models / "good")
    save(models / "odd")
    house = open_house()
    house.later()
    house.later()
    assert house.names() == ["good"]
    assert list(house.shelf.broken) == ["odd"]
    assert caplog.text.count("Looking at the model 'odd' has failed") == 1


# Shortage


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("std::bad_alloc"),
        OSError(24, "Too many open files"),
        UnreadableError("weights cannot be read (Input/output error)."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_shortage_is_no_damage(
    error: Exception, models: Path, open_house: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """Those who ask are told to come again, it is not tried again at once, and then it is."""
    tried: list[Path] = []

    def load_at_last(path: Path, _settings: Settings) -> Model:
        tried.append(path)
        if len(tried) <= 2:
            raise error
        return charloom.load(path)

    save(models / "one")
    save(models / "two")
    house = open_house(open_model=load_at_last)
    for count in (1, 2):
        for _ in range(3):
            problem = house.refuse("one").problem
            assert (problem.status, problem.code) == (503, "model_unavailable")
            assert problem.retry_after == pytest.approx(RETRY_PAUSE)
        assert len(tried) == count
        assert (house.names(), dict(house.shelf.broken)) == (["one", "two"], {})
        house.later(RETRY_PAUSE)
    assert house.load("one").name == "one"
    assert caplog.text.count("'one' cannot be loaded at the moment") == 2


def test_a_library_s_panic_leaves_nobody_waiting(models: Path, open_house: Open) -> None:
    """Where memory lacks, safetensors ends with what is no `Exception`: who waits is told."""

    class PanicException(BaseException):
        pass

    tried: list[Path] = []

    def panic_once(path: Path, _settings: Settings) -> Model:
        tried.append(path)
        if len(tried) == 1:
            raise PanicException("PyObject pointer is null")
        return charloom.load(path)

    save(models / "one")
    save(models / "two")
    house = open_house(open_model=panic_once)
    assert house.refuse("one").problem.code == "model_unavailable"
    house.later(RETRY_PAUSE)
    assert house.load("one").name == "one"


def test_what_may_not_be_read_is_looked_at_again(
    models: Path,
    open_house: Open,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A model that the system refuses to read may be sound, and is served as soon as it does not,
    though no file of it changes.
    """
    lack: list[Exception] = [MemoryError()]

    def inspect(path: Path) -> checkpoint.ModelEntry:
        if path.name == "one" and lack:
            raise lack[0]
        return inspect_model(path)

    monkeypatch.setattr(catalogue, "inspect_model", inspect)
    save(models / "one")
    save(models / "two")
    house = open_house()
    for _ in range(3):
        problem = house.refuse("one").problem
        assert (problem.status, problem.code) == (503, "model_unavailable")
        house.later()
    assert caplog.text.count("'one' is not served") == 1
    lack.clear()
    house.later()
    assert house.load("one").name == "one"


def test_a_model_whose_change_cannot_be_read_yet_stays(models: Path, open_house: Open) -> None:
    """It is in memory and was sound; what became of it is seen when it can be read."""
    save(models / "only")
    house = open_house()
    served = house.load("only")
    config = models / "only" / "config.json"
    content = config.read_bytes()
    config.unlink()
    config.mkdir()
    house.later()
    assert house.ask("only") == [served]
    assert (house.names(), dict(house.shelf.broken)) == (["only"], {})
    config.rmdir()
    config.write_bytes(content)
    house.later()
    assert house.ask("only") == [served]
    scribble(models / "only")
    house.later()
    assert house.refuse("only").problem.code == "model_damaged"


# Change


def test_a_new_model_is_found(models: Path, open_house: Open) -> None:
    """By its name at once, and in the list within a second."""
    house = open_house()
    house.later(0.5)
    save(models / "new")
    house.later(0.4)
    assert house.names() == []
    house.later(0.2)
    assert house.names() == ["new"]
    save(models / "newer")
    assert house.load("newer").name == "newer"
    save(models / "newest")
    assert house.shelf.card("newest") is None
    found: list[RequestError | None] = []
    house.shelf.seek("newest", found.append)
    house.settle()
    assert found == [None]
    assert house.shelf.card("newest") is not None


def test_the_folder_is_looked_at_beside_the_loop(
    models: Path, open_house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its disk may be slow: whoever asks for what is known does not wait for it."""
    save(models / "known")
    house = open_house()
    known = house.load("known")
    slow, threads = threading.Event(), set[threading.Thread]()

    def look(folder: Path) -> list[str]:
        threads.add(threading.current_thread())
        assert slow.wait(timeout=60)
        return model_names(folder)

    monkeypatch.setattr(catalogue, "model_names", look)
    house.now += SCAN_INTERVAL
    house.shelf.poll()
    save(models / "new")
    found = [house.ask(name) for name in ("known", "new", "none", "no/name")]
    house.shelf.poll()
    assert found[0] == [known]
    assert found[1:3] == [[], []], "it is not known yet"
    assert isinstance(found[3][0], RequestError), "a scan would not find it"
    slow.set()
    house.settle()
    (new,), (none,) = found[1:3]
    assert isinstance(new, Served)
    assert isinstance(none, RequestError)
    assert none.problem.status == 404
    assert threading.current_thread() not in threads


def test_unknown_names_share_a_look(
    models: Path, open_house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flood of them begins one every so often, and who asks for a new model meanwhile gets it."""
    house = open_house()
    looks = []
    monkeypatch.setattr(
        catalogue, "model_names", lambda folder: looks.append(folder) or model_names(folder)
    )
    first = house.ask("nobody")
    house.later(0.0)
    assert (len(first), len(looks)) == (1, 1)
    flood = [house.ask(f"nobody-{number}") for number in range(50)]
    save(models / "new")
    new = house.ask("new")
    house.later(SEEK_PAUSE / 2)
    assert (sum(map(len, flood)), len(looks)) == (0, 1)
    assert house.shelf.pause == pytest.approx(SEEK_PAUSE / 2)
    house.later(SEEK_PAUSE / 2)
    assert (sum(map(len, flood)), len(looks)) == (50, 2)
    house.settle()
    assert isinstance(new[0], Served)
    assert len(looks) == 2


def test_no_file_is_looked_at_in_the_loop(
    models: Path, open_house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor where a model is replaced while it is loaded, fails, or is removed: a slow disk would
    hold up all texts.
    """
    threads: list[threading.Thread] = []

    def note(look: Callable[[Path], Any]) -> Callable[[Path], Any]:
        return lambda path: threads.append(threading.current_thread()) or look(path)

    def load(path: Path, _settings: Settings) -> Model:
        if path.name != "fine":
            save(path, seed=2, mode="overwrite")
        if path.name == "late" and not tried:
            tried.append(path)
            raise CheckpointError("It was half there.")
        if path.name == "removed":
            shutil.rmtree(path)
            raise CheckpointError("It has gone.")
        return charloom.load(path)

    tried: list[Path] = []
    for name in ("fine", "replaced", "late", "removed"):
        save(models / name)
    house = open_house(open_model=load)
    monkeypatch.setattr(checkpoint, "stamp", note(checkpoint.stamp))
    monkeypatch.setattr(catalogue, "inspect_model", note(inspect_model))
    for name in ("fine", "replaced", "late"):
        assert house.load(name).name == name
    assert house.refuse("removed").problem.status == 404
    assert threads
    assert threading.current_thread() not in threads


def test_what_a_slow_look_has_not_seen_is_not_forgotten(
    models: Path, open_house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that turns out damaged while the folder is looked at is not served after that."""
    save(models / "bad")
    save(models / "good")
    damage(models / "bad")
    house = open_house()
    slow = threading.Event()

    def look(folder: Path) -> list[str]:
        assert slow.wait(timeout=60)
        return model_names(folder)

    monkeypatch.setattr(catalogue, "model_names", look)
    house.now += SCAN_INTERVAL
    house.shelf.poll()
    found = house.ask("bad")
    while not found:
        house.wait()
    slow.set()
    house.settle()
    house.later()
    assert set(house.shelf.broken) == {"bad"}
    assert house.names() == ["good"]


def test_a_replaced_model_is_loaded_anew(models: Path, open_house: Open) -> None:
    """Whoever asks from then on gets the new one, while the old one serves those who have it."""
    first = save(models / "only", seed=1)
    house = open_house()
    old = house.load("only")
    old.pin()
    before = write(old)
    second = save(models / "only", seed=2, mode="overwrite")
    assert house.ask("only") == [old]
    house.later()
    assert house.names() == ["only"]
    new = house.load("only")
    assert (old.fingerprint, new.fingerprint) == (first, second)
    assert set(house.shelf.in_memory()) == {old, new}
    assert write(old) == before != write(new)
    old.unpin()
    house.shelf.poll()
    assert house.shelf.in_memory() == (new,)


def test_a_replaced_model_is_loaded_before_it_is_asked_for(models: Path, open_house: Open) -> None:
    """What was in memory stays there, in its new version."""
    save(models / "only", seed=1)
    house = open_house()
    house.load("only")
    fingerprint = save(models / "only", seed=2, mode="overwrite")
    house.later()
    house.settle()
    assert [served.fingerprint for served in house.shelf.in_memory()] == [fingerprint]


def test_a_model_replaced_while_it_is_loaded_is_found_out(models: Path, open_house: Open) -> None:
    """Who waited gets the version that was read, and whoever comes later the last one."""
    is_begun, is_replaced = threading.Event(), threading.Event()

    def load_slowly(path: Path, _settings: Settings) -> Model:
        model = charloom.load(path)
        is_begun.set()
        assert is_replaced.wait(timeout=60)
        return model

    first = save(models / "one", seed=1)
    house = open_house(open_model=load_slowly)
    found = house.ask("one")
    assert is_begun.wait(timeout=60)
    second = save(models / "one", seed=2, mode="overwrite")
    is_replaced.set()
    house.settle()
    assert isinstance(found[0], Served)
    assert found[0].fingerprint == first
    house.later()
    assert house.load("one").fingerprint == second
    assert house.shelf.card("one") == house.load("one").card


def test_the_same_version_is_not_loaded_again(models: Path, open_house: Open) -> None:
    """A commit that leaves the weights alone changes the card and nothing else."""
    save(models / "only")
    house = open_house()
    served = house.load("only")
    summary = {"validation": {"windows": {"bits_per_character": 1.5}}}
    save(models / "only", mode="overwrite", summary=summary)
    house.later()
    assert house.load("only") is served
    assert served.card.bits_per_character == 1.5
    assert served.card.is_loaded


@pytest.mark.parametrize("spoil", [shutil.rmtree, scribble])
def test_what_is_removed_or_damaged_is_no_longer_given_out(
    spoil: Callable[[Path], Any], models: Path, open_house: Open
) -> None:
    """Those who have it finish, and then it goes."""
    save(models / "only")
    house = open_house()
    served = house.load("only")
    served.pin()
    spoil(models / "only")
    house.later()
    assert house.names() == []
    assert house.refuse("only").problem.status == (500 if spoil is scribble else 404)
    assert house.shelf.in_memory() == (served,)
    assert write(served)
    served.unpin()
    house.shelf.poll()
    assert house.shelf.in_memory() == ()


def test_what_fails_to_load_because_it_is_being_replaced_is_loaded_again(
    models: Path, open_house: Open
) -> None:
    """A copy that was half there is no damage, once the rest has come."""
    tried = 0

    def load_late(path: Path, _settings: Settings) -> Model:
        nonlocal tried
        tried += 1
        if tried == 1:
            save(path, seed=2, mode="overwrite")
            raise CheckpointError("The model was half there.")
        return charloom.load(path)

    save(models / "one", seed=1)
    house = open_house(open_model=load_late)
    assert house.load("one").fingerprint == inspect_model(models / "one").fingerprint
    assert (tried, dict(house.shelf.broken)) == (2, {})


@pytest.mark.parametrize("is_read", [False, True])
def test_a_model_removed_while_it_is_loaded_is_refused(
    is_read: bool, models: Path, open_house: Open
) -> None:
    """Nobody gets what is gone, whether its files had been read by then or not."""
    is_begun, is_removed = threading.Event(), threading.Event()

    def load_slowly(path: Path, _settings: Settings) -> Model:
        model = charloom.load(path) if is_read else None
        is_begun.set()
        assert is_removed.wait(timeout=60)
        return charloom.load(path) if model is None else model

    save(models / "one")
    house = open_house(open_model=load_slowly)
    found = house.ask("one")
    assert is_begun.wait(timeout=60)
    shutil.rmtree(models / "one")
    house.later()
    is_removed.set()
    house.settle()
    (error,) = found
    assert isinstance(error, RequestError)
    assert error.problem.status == 404
    assert (house.shelf.in_memory(), dict(house.shelf.broken)) == ((), {})


def test_a_folder_that_cannot_be_read_leaves_all_as_it_was(
    models: Path, open_house: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk that is away for a while is told once, and the models in memory serve on."""
    save(models / "only")
    house = open_house()
    served = house.load("only")
    models.rename(models.with_name("away"))
    models.touch()
    house.later()
    house.later()
    assert house.names() == ["only"]
    assert house.ask("only") == [served]
    assert caplog.text.count("cannot be read") == 1
    models.unlink()
    models.with_name("away").rename(models)
    house.later()
    assert house.ask("only") == [served]


# Memory


def test_the_model_used_least_recently_goes_first(models: Path, open_house: Open) -> None:
    """One that is asked for again stays before one that is not."""
    for name in ("a", "b", "c"):
        save(models / name)
    house = open_house(model_memory=memory_for(models, 2))
    for name in ("a", "b", "a", "c"):
        house.now += 0.01
        house.load(name)
    assert house.loaded() == {"a", "c"}
    assert [card.is_loaded for card in house.shelf.cards()] == [True, False, True]


def test_a_model_in_use_is_never_unloaded(models: Path, open_house: Open) -> None:
    """Another goes instead, though it was used later; use ends with the last user."""
    for name in ("a", "b", "c", "d"):
        save(models / name)
    house = open_house(model_memory=memory_for(models, 2))
    first = house.load("a")
    first.pin()
    first.pin()
    for name in ("b", "c"):
        house.now += 0.01
        house.load(name)
    assert house.loaded() == {"a", "c"}
    first.unpin()
    house.now += 0.01
    house.load("d")
    assert house.loaded() == {"a", "d"}
    first.unpin()
    house.now += 0.01
    house.load("d")
    house.load("c")
    assert house.loaded() == {"c", "d"}


def test_what_does_not_fit_beside_models_in_use_is_put_off(models: Path, open_house: Open) -> None:
    """Those who ask are told to come again, and then there is room."""
    save(models / "a")
    save(models / "b")
    house = open_house(model_memory=memory_for(models, 1))
    served = house.load("a")
    served.pin()
    problem = house.refuse("b").problem
    assert (problem.status, problem.code) == (503, "model_memory")
    assert problem.retry_after is not None
    served.unpin()
    assert house.load("b").name == "b"
    assert house.loaded() == {"b"}


def test_nothing_is_unloaded_in_vain(models: Path, open_house: Open) -> None:
    """Where models in use leave no room for another, those that nobody uses stay."""
    save(models / "a")
    save(models / "b")
    save(models / "large", hidden=120)
    with closing(House(models)) as trial:
        large = trial.load("large").bytes
    house = open_house(model_memory=large + memory_for(models, 1) // 2)
    house.load("a").pin()
    house.load("b")
    assert house.refuse("large").problem.code == "model_memory"
    assert house.loaded() == {"a", "b"}


def test_a_false_claim_unloads_nothing(models: Path, open_house: Open) -> None:
    """A config.json that tells of more weights than there are is found out before room is made."""
    save(models / "good")
    save(models / "huge", seed=1)
    rewrite(models / "huge", lambda config: config["architecture"].update(hidden=10**6))
    house = open_house()
    good = house.load("good")
    assert house.refuse("huge").problem.code == "model_damaged"
    assert house.shelf.in_memory() == (good,)


def test_a_model_that_never_fits_is_loaded_alone(
    models: Path, open_house: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning says so, it stays while nothing else is asked for, and it goes for others."""
    save(models / "a")
    save(models / "b")
    house = open_house(model_memory=1)
    house.load("a")
    assert "CHARLOOM_MODEL_MEMORY" in caplog.text
    house.later()
    assert house.loaded() == {"a"}
    house.load("b")
    assert house.loaded() == {"b"}


def test_an_engine_that_is_opened_later_takes_memory_too(models: Path, open_house: Open) -> None:
    """Then the others have less, as soon as the shelf looks."""
    save(models / "a")
    save(models / "b")
    with closing(House(models, precision="int8")) as trial:
        served = trial.load("a")
        small = served.bytes
        served.model.engine("float32")
        large = served.bytes
    if small == large:
        pytest.skip("this processor has no exact 8-bit product")
    house = open_house(precision="int8", model_memory=(3 * small + large) // 2)
    house.load("a")
    house.now += 0.01
    served = house.load("b")
    house.later()
    assert house.loaded() == {"a", "b"}
    served.model.engine("float32")
    house.later()
    assert house.loaded() == {"b"}


def test_an_unloaded_model_is_gone_at_once(models: Path, open_house: Open) -> None:
    """Nothing holds it, so that its memory does not wait for the collector."""
    save(models / "a")
    save(models / "b")
    house = open_house(model_memory=memory_for(models, 1))
    served = house.load("a")
    write(served)
    model = weakref.ref(served.model)
    gc.collect()
    gc.disable()
    try:
        del served
        house.load("b")
        assert model() is None
    finally:
        gc.enable()


# The end


def test_closing_ends_texts_and_waits(models: Path, open_house: Open) -> None:
    """Texts under way are cancelled, and who waits for a model is told."""
    save(models / "a")
    save(models / "b")
    house = open_house()
    engine = house.load("a").model.engine("auto")
    prompt = Prompt(LETTERS.encode("abc"))
    params = SamplingParams(max_tokens=10**6)
    handle = engine.submit(Request(prompt=prompt, params=params, seed=0))
    engine.step()
    found = house.ask("b")
    house.close()
    assert handle.result().ending == "cancelled"
    (error,) = found
    assert isinstance(error, RequestError)
    assert error.problem.status == 503
    assert house.shelf.in_memory() == ()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("background")]


def test_what_happens_is_logged(
    models: Path, open_house: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """Loading, replacing and unloading each have a line."""
    caplog.set_level(logging.INFO, "charloom.engine")
    save(models / "a")
    save(models / "b")
    house = open_house(model_memory=memory_for(models, 1))
    house.load("a")
    save(models / "a", seed=7, mode="overwrite")
    house.later()
    house.settle()
    house.load("b")
    for what in ("is loaded", "is retired", "is unloaded"):
        assert what in caplog.text
