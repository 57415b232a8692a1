"""The cache of encoded corpora: one corpus for one text, never a stale or damaged one."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from charloom.errors import CorpusError
from training.corpus import (
    CorpusOptions,
    EncodedCorpus,
    default_cache,
    encoder,
    open_corpus,
    prepare_corpus,
)
from training.corpus import prepare as prepare_module
from training.corpus.cache import Cache

TEXT = "The quick brown fox jumps over the lazy dog.\n" * 20
REUSED = "The text is unchanged since it was encoded; its tokens are reused."
SAME = "The same text was encoded before; its tokens are reused."
LONG_AGO = 1_600_000_000 * 10**9


class Workbench:
    """A cache, and what was reported while it was used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache = folder / "cache"
        self.reports: list[str] = []

    def write(self, name: str, text: str, *, changed: int = LONG_AGO) -> Path:
        """Write a text file that was last changed at this time."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, newline="")
        os.utime(path, ns=(changed, changed))
        return path

    def prepare(self, *sources: Path | str, **options: Any) -> EncodedCorpus:
        """Prepare a corpus and keep what is reported; standard input holds the text."""
        self.reports = []
        return prepare_corpus(
            [str(source) for source in sources],
            CorpusOptions(**options),
            cache=self.cache,
            report=self.reports.append,
            stdin=io.BytesIO(TEXT.encode()),
        )


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    """A workbench in a folder of this test."""
    return Workbench(tmp_path)


def test_a_second_call_reads_no_text(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """With path, size and time unchanged the tokens come from the cache, the text unread."""
    path = bench.write("a.txt", TEXT)
    first = bench.prepare(path)
    assert bench.reports == []
    monkeypatch.setattr(prepare_module, "take_census", None)
    second = bench.prepare(path)
    assert second.fingerprint == first.fingerprint
    assert second.folder == first.folder
    assert second.description == first.description
    assert bench.reports == [REUSED]


def test_a_touched_but_unchanged_file_gives_the_same(bench: Workbench) -> None:
    """A new time of change makes the text be read again, and its content decides."""
    first = bench.prepare(bench.write("a.txt", TEXT))
    again = bench.prepare(bench.write("a.txt", TEXT, changed=LONG_AGO + 1))
    assert again.fingerprint == first.fingerprint
    assert bench.reports == [SAME]


def test_a_file_changed_just_now_is_not_trusted(bench: Workbench) -> None:
    """A change within the grain of the clock leaves size and time alike, so it is read again."""
    path = bench.write("a.txt", TEXT)
    os.utime(path)
    bench.prepare(path)
    bench.prepare(path)
    assert bench.reports == [SAME]


def test_changed_content_of_the_same_size_gives_another(bench: Workbench) -> None:
    """One letter is enough for another fingerprint; the first corpus stays."""
    first = bench.prepare(bench.write("a.txt", TEXT))
    other = bench.prepare(bench.write("a.txt", TEXT.replace("q", "Q"), changed=LONG_AGO + 1))
    assert other.fingerprint != first.fingerprint
    assert open_corpus(first.fingerprint, cache=bench.cache) is not None


def test_names_do_not_matter(bench: Workbench) -> None:
    """Renamed, split in two, piped in or in another encoding, a text is the same text."""
    first = bench.prepare(bench.write("a.txt", TEXT))
    parts = bench.write("b/1", TEXT[:100]), bench.write("b/2", TEXT[100:])
    utf16 = bench.folder / "utf16"
    utf16.write_bytes(TEXT.encode("utf-16"))
    for corpus in (
        bench.prepare(bench.write("renamed", TEXT)),
        bench.prepare(*parts),
        bench.prepare(bench.folder / "b"),
        bench.prepare("-"),
        bench.prepare(utf16, encoding="utf-16"),
    ):
        assert corpus.fingerprint == first.fingerprint
    assert bench.reports == [SAME]


def test_what_matters_changes_the_fingerprint(bench: Workbench) -> None:
    """Each option that changes tokens or sides, and the order of files, gives another corpus."""
    one, two = bench.write("1", TEXT), bench.write("2", "The end of it.\n")
    prints = [
        bench.prepare(one, two).fingerprint,
        bench.prepare(two, one).fingerprint,
        bench.prepare(one, two, validation=0.2).fingerprint,
        bench.prepare(one, two, documents="files", validation=0).fingerprint,
        bench.prepare(one, two, documents="lines").fingerprint,
        bench.prepare(one, two, tokenizer="bytes").fingerprint,
        bench.prepare(one, two, min_count=3).fingerprint,
    ]
    assert len(set(prints)) == len(prints)


def test_the_description_is_of_this_call(bench: Workbench) -> None:
    """A corpus found under another name is described by the name it was asked for."""
    bench.prepare(bench.write("a.txt", TEXT))
    path = bench.write("b.txt", TEXT)
    assert bench.prepare(path).description["sources"] == [str(path)]
    assert bench.prepare(path).description["sources"] == [str(path)]
    assert bench.reports == [REUSED]


def test_a_corpus_opens_by_its_fingerprint(bench: Workbench) -> None:
    """Resuming needs no text: the fingerprint finds all that was prepared."""
    path = bench.write("a.txt", TEXT)
    corpus = bench.prepare(path, documents="lines", validation=0)
    path.unlink()
    opened = open_corpus(corpus.fingerprint, cache=bench.cache)
    assert opened is not None
    assert np.array_equal(opened.train.tokens, corpus.train.tokens)
    assert opened.train.boundaries is not None
    assert corpus.train.boundaries is not None
    assert np.array_equal(opened.train.boundaries, corpus.train.boundaries)
    assert np.array_equal(opened.token_counts, corpus.token_counts)
    assert opened.tokenizer.fingerprint == corpus.tokenizer.fingerprint
    assert opened.description == corpus.description


@pytest.mark.parametrize("fingerprint", ["0" * 64, "", "../../etc", "0" * 63 + "\0"])
def test_an_unknown_fingerprint_opens_nothing(bench: Workbench, fingerprint: str) -> None:
    """What was never prepared, and what is no fingerprint, is None, not an error."""
    bench.prepare(bench.write("a.txt", TEXT))
    assert open_corpus(fingerprint, cache=bench.cache) is None


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "name",
    ["train.tokens", "validation.tokens", "train.boundaries", "token-counts", "tokenizer.json"],
)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_corpus_is_made_anew(bench: Workbench, name: str, damage: str) -> None:
    """A flipped bit, a missing end or a missing file is noticed, and everything is rebuilt."""
    text = "".join(f"This is line {i} of them.\n" for i in range(99))
    path = bench.write("a.txt", text)
    corpus = bench.prepare(path, documents="lines")
    tokens = np.array(corpus.train.tokens)
    target = corpus.folder / name
    if damage == "flip":
        flip_a_byte(target)
    elif damage == "cut":
        target.write_bytes(target.read_bytes()[:-1])
    else:
        target.unlink()
    assert open_corpus(corpus.fingerprint, cache=bench.cache) is None
    rebuilt = bench.prepare(path, documents="lines")
    assert bench.reports == []
    assert rebuilt.fingerprint == corpus.fingerprint
    assert np.array_equal(rebuilt.train.tokens, tokens)


@pytest.mark.parametrize("manifest", ["", "{}", "[]", "null", "{", '{"format": 99}'])
def test_a_manifest_that_is_not_one_is_made_anew(bench: Workbench, manifest: str) -> None:
    """Empty, foreign and newer manifests are treated alike: the corpus is made again."""
    path = bench.write("a.txt", TEXT)
    corpus = bench.prepare(path)
    (corpus.folder / "manifest.json").write_text(manifest)
    assert open_corpus(corpus.fingerprint, cache=bench.cache) is None
    assert bench.prepare(path).fingerprint == corpus.fingerprint


@pytest.mark.parametrize("note", ["", "{}", "[]", "{"])
def test_a_damaged_request_is_read_again(bench: Workbench, note: str) -> None:
    """What is kept about a request is a short cut and no more."""
    path = bench.write("a.txt", TEXT)
    bench.prepare(path)
    [request] = (bench.cache / "requests").iterdir()
    request.write_text(note)
    bench.prepare(path)
    assert bench.reports == [SAME]


def test_a_text_that_changes_while_it_is_read_is_refused(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts of one text never meet the tokens of another."""
    path = bench.write("a.txt", TEXT)
    real = encoder.encode_corpus

    def meddle(*arguments: Any, **named: Any) -> object:
        path.write_text(TEXT.replace("q", "b"))
        return real(*arguments, **named)

    monkeypatch.setattr(prepare_module, "encode_corpus", meddle)
    with pytest.raises(CorpusError, match="changed while it was read"):
        bench.prepare(path)
    assert not (bench.cache / "corpora").exists()


def test_nothing_is_left_in_the_workshops(bench: Workbench) -> None:
    """Neither success nor failure leaves half-made files behind."""
    bench.prepare("-")
    with pytest.raises(CorpusError):
        bench.prepare(bench.write("short", "ab"))
    assert [path.name for path in (bench.cache / "workshops").iterdir()] in ([], ["door.lock"])


def test_the_workshop_of_a_killed_process_is_swept(bench: Workbench) -> None:
    """Gigabytes of a run that was killed are gone with the next one."""
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from training.corpus.cache import Cache\n"
        "with Cache(Path(sys.argv[1])).workshop() as folder:\n"
        "    (folder / 'big').write_bytes(b'x' * 100)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(bench.cache)], check=False)
    assert killed.returncode == -9
    assert list((bench.cache / "workshops").glob("*/big"))
    bench.prepare("-")
    assert not list((bench.cache / "workshops").glob("*/big"))


def test_processes_that_prepare_the_same_do_not_disturb_each_other(bench: Workbench) -> None:
    """Three processes at once, by the same name and by others, all get one sound corpus."""
    text = "".join(f"This is line {i} of {i * i}.\n" for i in range(20_000))
    paths = [bench.write("a.txt", text), bench.write("b.txt", text)]
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from training.corpus import CorpusOptions, prepare_corpus\n"
        "options = CorpusOptions(documents='lines')\n"
        "corpus = prepare_corpus([sys.argv[1]], options, cache=Path(sys.argv[2]))\n"
        "print(corpus.fingerprint, int(corpus.train.tokens.sum()))\n"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(path), str(bench.cache)], stdout=subprocess.PIPE
        )
        for path in (paths[0], paths[0], paths[1])
    ]
    outputs = {process.communicate()[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(outputs) == 1
    corpus = bench.prepare(paths[0], documents="lines")
    assert outputs == {f"{corpus.fingerprint} {int(corpus.train.tokens.sum())}\n".encode()}


def test_a_place_taken_by_another_is_used(bench: Workbench) -> None:
    """Who comes second finds the corpus there and keeps it; a damaged one is replaced."""
    corpus = bench.prepare(bench.write("a.txt", TEXT))
    manifest = json.loads((corpus.folder / "manifest.json").read_text())
    cache = Cache(bench.cache)
    with cache.workshop() as workshop:
        built = workshop / "corpus"
        shutil.copytree(corpus.folder, built)
        before = corpus.folder.stat().st_ino
        cache.publish(built, corpus.fingerprint)
        assert corpus.folder.stat().st_ino == before
        (corpus.folder / "token-counts").unlink()
        cache.publish(built, corpus.fingerprint)
        assert corpus.folder.stat().st_ino != before
    assert json.loads((corpus.folder / "manifest.json").read_text()) == manifest


def test_a_cache_that_cannot_be_written_is_told(bench: Workbench) -> None:
    """The sentence names the folder, the reason and the variable that names another."""
    bench.cache.write_text("a file where the folder should be")
    with pytest.raises(CorpusError, match=r"cache folder .* cannot be used: .* CHARLOOM_CACHE"):
        bench.prepare("-")


def test_a_disk_that_is_full_is_told(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """No room for the tokens is told with the remedy, and leaves nothing half done."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_module, "encode_corpus", full)
    with pytest.raises(CorpusError, match=r"cannot be used: No space left on device\. Make room"):
        bench.prepare("-")
    assert not (bench.cache / "corpora").exists()


def test_progress_rises_to_its_total(bench: Workbench) -> None:
    """Both passes are counted in the stored bytes of all files, and end at the total."""
    paths = [bench.write("1", TEXT), bench.write("2", TEXT * 2)]
    told: list[tuple[int, int | None]] = []
    prepare_corpus(
        [str(path) for path in paths],
        CorpusOptions(),
        cache=bench.cache,
        progress=lambda done, total: told.append((done, total)),
    )
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert {total for _, total in told} == {6 * len(TEXT)}
    assert told[-1] == (6 * len(TEXT), 6 * len(TEXT))


def test_a_guess_is_reported_every_time(bench: Workbench) -> None:
    """With --encoding auto the guess is told when the text is read and when it is not."""
    path = bench.folder / "a.txt"
    path.write_bytes("Я помню чудное мгновенье: передо мной явилась ты.\n".encode("cp1251") * 20)
    os.utime(path, ns=(LONG_AGO, LONG_AGO))
    guess = "The encoding is guessed to be (with the number of files): cp1251 (1)."
    corpus = bench.prepare(path, encoding="auto")
    assert bench.reports == [guess]
    assert corpus.description["encodings"] == {"cp1251": 1}
    bench.prepare(path, encoding="auto")
    assert bench.reports == [guess, REUSED]


def test_a_built_in_corpus_needs_no_file(bench: Workbench) -> None:
    """The reference text of Python is prepared by name and found again by name."""
    first = bench.prepare("python-docs")
    assert first.train.characters > 300_000
    assert bench.prepare("python-docs").fingerprint == first.fingerprint
    assert bench.reports[-1] == REUSED


def test_several_files_are_counted(bench: Workbench) -> None:
    """What a folder or a pattern came to is told before anything is read."""
    bench.write("corpus/1", TEXT)
    bench.write("corpus/2", TEXT)
    bench.prepare(bench.folder / "corpus")
    assert bench.reports == ["The corpus is made of 2 files."]


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """CHARLOOM_CACHE names it; unset or empty, it is the user's own cache folder."""
    monkeypatch.setenv("CHARLOOM_CACHE", "/some/where")
    assert default_cache() == Path("/some/where")
    monkeypatch.setenv("CHARLOOM_CACHE", "")
    unnamed = default_cache()
    monkeypatch.delenv("CHARLOOM_CACHE")
    assert default_cache() == unnamed
    assert unnamed.name == "charloom"
