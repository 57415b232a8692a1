"""`charloom train` and `charloom evaluate`, as a user meets them."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from charloom import checkpoint as checkpoints
from charloom.checkpoint import ModelWriter
from charloom.cli import main
from training.scalars import Scalars

pytestmark = pytest.mark.slow

TEXT = "".join(f"{n} green bottles hanging on the wall,\n" for n in range(300))
SMALL = ["--hidden", "16", "--batch-size", "4", "--sequence-length", "16", "--threads", "1"]

# Saves after every step, so that a kill finds the run in every state that a save can be in.
EAGER = (
    "import sys, training.trainer as trainer; trainer.SAVE_SECONDS = -1.0;"
    "from charloom.cli import main; main(sys.argv[1:])"
)

Run = Callable[..., Result]
Shell = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "bottles.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def charloom(models: Path) -> Run:
    def call(*arguments: object, **options: Any) -> Result:
        words = ["--models", str(models), *(str(argument) for argument in arguments)]
        return CliRunner().invoke(main, words, **options)

    return call


def start(models: Path, *arguments: object, stdin: int | None = None) -> "subprocess.Popen[str]":
    """The command in a process of its own, saving after every step."""
    words = [sys.executable, "-c", EAGER, "--models", str(models), "train", *map(str, arguments)]
    return subprocess.Popen(
        words,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )


def test_training_leaves_a_model_and_says_where(charloom: Run, text: Path, models: Path) -> None:
    """Standard output is the folder's path alone; plan and progress go to standard error."""
    result = charloom("train", text, "--name", "bottles", "--steps", 20, *SMALL)

    assert result.exit_code == 0
    assert result.stdout == f"{models / 'bottles'}\n"
    for word in ("corpus", "split", "vocabulary", "network", "plan", "expected", "step", "windows"):
        assert word in result.stderr
    assert checkpoints.verify(models / "bottles") == []
    names = {path.name for path in (models / "bottles").iterdir()}
    assert {"config.json", "history.jsonl", "loss.png", "README.md", "trainer"} <= names
    assert (models / "bottles" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "bits per character" in (models / "bottles" / "README.md").read_text("utf-8")


def test_what_was_trained_can_be_sampled_and_evaluated(charloom: Run, text: Path) -> None:
    """The three commands meet in one folder."""
    charloom("train", text, "--name", "bottles", "--steps", 20, *SMALL)

    sampled = charloom("sample", "bottles", "12 green", "--seed", 1, "--max-tokens", 40)
    evaluated = charloom("evaluate", "bottles", text, "--json", "--threads", 1)

    assert sampled.exit_code == 0
    assert sampled.stdout.startswith("12 green")
    figures = json.loads(evaluated.stdout)
    assert set(figures) == {"windows", "stateful"}
    assert figures["windows"]["characters"] == len(TEXT) - 1
    assert 0 < figures["stateful"]["bits_per_character"] < 7


def test_every_choice_is_in_the_plan(charloom: Run, text: Path, models: Path) -> None:
    """What the recipe and the options settled stands in the plan, each value with its name."""
    options = ["--steps", 2, *SMALL, "--seed", 41, "--patience", 17, "--output-temperature", 1.23]
    result = charloom("train", text, "--name", "bottles", *options)

    plan = result.stderr.split("expected")[0]
    told = checkpoints.load(models / "bottles").summary["recipe"]
    for name in ("dropout", "weight_drop", "learning_rate", "weight_decay", "clip_norm"):
        assert f"{name.replace('_', ' ')} {told[name]:g}" in plan
    for part in (
        *("seed 41", "patience 17", "output temperature 1.23", "embedding 16", "4 x 16 tokens"),
        "--recipe tiny --precision",
    ):
        assert part in plan


def test_the_history_goes_to_tensorboard_too(charloom: Run, text: Path, tmp_path: Path) -> None:
    """--tensorboard DIR leaves an event file in a folder of the model's name."""
    options = ["--steps", 20, *SMALL, "--tensorboard", tmp_path / "board"]

    assert charloom("train", text, "--name", "bottles", *options).exit_code == 0

    (file,) = (tmp_path / "board" / "bottles").iterdir()
    assert file.name.startswith("events.out.tfevents")
    assert b"loss/training" in file.read_bytes()


def test_evaluation_prints_both_protocols_as_a_table(charloom: Run, text: Path) -> None:
    """Nats, bits per character and bits per byte stand in columns."""
    charloom("train", text, "--name", "bottles", "--steps", 5, *SMALL)

    result = charloom("evaluate", "bottles", text, "--threads", 1)

    header, windows, stateful = result.stdout.splitlines()
    assert header.split() == ["protocol", "nats/char", "bits/char", "bits/byte", "characters"]
    assert windows.startswith("windows")
    assert stateful.startswith("stateful")


def test_evaluation_adapts_a_copy_of_the_model(charloom: Run, text: Path, models: Path) -> None:
    """--dynamic adds a figure, lower on a text like the corpus, and changes no file."""
    charloom("train", text, "--name", "bottles", "--steps", 20, *SMALL)
    before = {file: file.read_bytes() for file in models.rglob("*") if file.is_file()}

    options = ["--json", "--threads", 1, "--precision", "float32"]
    result = charloom("evaluate", "bottles", text, *options, "--dynamic", 0.001)

    figures = json.loads(result.stdout)
    assert list(figures) == ["windows", "stateful", "dynamic"]
    assert figures["dynamic"]["tokens"] == figures["stateful"]["tokens"]
    assert figures["dynamic"]["bits_per_character"] < figures["stateful"]["bits_per_character"]
    assert {file: file.read_bytes() for file in models.rglob("*") if file.is_file()} == before


def test_evaluation_flags_characters_never_seen(charloom: Run, text: Path, tmp_path: Path) -> None:
    """They are counted in the figures and told on standard error."""
    charloom("train", text, "--name", "bottles", "--steps", 5, *SMALL)
    other = tmp_path / "other.txt"
    other.write_text("12 grüne Flaschen", encoding="utf-8")

    result = charloom("evaluate", "bottles", other, "--json", "--threads", 1)

    assert json.loads(result.stdout)["windows"]["unknown"] == 3
    assert "3 characters are not in the model's vocabulary" in result.stderr


def test_a_killed_run_resumes_to_the_same_bits(text: Path, tmp_path: Path) -> None:
    """Killed by SIGKILL at random moments and resumed each time, it equals a run never killed."""
    options = ("--weight-drop", "0.1", "--precision", "float32", *SMALL)  # nothing left to chance
    arguments = (text, "--steps", 96, "--seed", 5, *options)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    process = start(whole, *arguments, "--name", "m")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    chance = random.Random(11)
    process = start(parts, *arguments, "--name", "m")
    kills = 0
    while True:
        assert process.stderr is not None
        said = ""
        # Wait for some evaluations, then for some files of a save to come and go, then kill.
        for _ in range(chance.randint(1, 3)):
            while (line := process.stderr.readline()) and not line.startswith("step"):
                said += line
        folder = parts / "m"
        seen, changes = None, chance.randint(1, 40)
        while changes and process.poll() is None:
            names = tuple(sorted(path.name for path in folder.glob("**/*")))
            changes -= names != seen
            seen = names
        process.kill()
        _, errors = process.communicate()
        # The one before may have been killed on its way out, after its last save.
        if process.returncode == 0 or "m has finished after 96 steps" in said:
            break
        kills += 1
        assert process.returncode == -signal.SIGKILL, said + errors
        assert checkpoints.verify(folder) == []
        process = start(parts, "--resume", "--name", "m")

    assert kills >= 2
    for pattern in ("weights-*", "trainer/state-*"):
        (one,), (other,) = (whole / "m").glob(pattern), (parts / "m").glob(pattern)
        assert one.name == other.name
        assert one.read_bytes() == other.read_bytes()
    assert told(parts / "m") == told(whole / "m")


def told(folder: Path) -> tuple[object, ...]:
    """What a run tells of itself, clock times left out."""
    history = [
        {name: value for name, value in line.items() if name != "seconds"}
        for line in checkpoints.read_history(folder)
    ]
    progress = checkpoints.load_trainer(folder).values["progress"]
    return history, {**progress, "seconds": None}, (folder / "loss.png").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(
    text: Path, models: Path, number: signal.Signals
) -> None:
    """The first one ends the run after the step at hand; status and words tell of it."""
    process = start(models, text, "--name", "m", "--steps", 100_000, *SMALL)
    assert process.stderr is not None
    while not process.stderr.readline().startswith("expected"):
        pass
    while not (models / "m" / "config.json").exists():
        assert process.poll() is None
    process.send_signal(number)
    _, errors = process.communicate()

    assert process.returncode == 128 + number
    assert f"Go on with: charloom --models {models} train --resume --name m" in errors
    assert checkpoints.verify(models / "m") == []
    assert not checkpoints.load(models / "m").summary["finished"]


def test_a_run_of_another_version_is_not_resumed(charloom: Run, models: Path) -> None:
    """A trainer folder that does not tell what this version needs is refused with a sentence."""
    golden = Path(__file__).parent / "golden" / "format-1"
    shutil.copytree(golden, models / "old")

    result = charloom("train", "--resume", "--name", "old")

    assert result.exit_code == 2
    assert "old cannot be resumed here" in result.stderr


def test_a_text_of_one_character_has_no_score(charloom: Run, text: Path, tmp_path: Path) -> None:
    """Nothing precedes it, so there is no figure, and the sentence says so."""
    charloom("train", text, "--name", "m", "--steps", 3, *SMALL)
    single = tmp_path / "single.txt"
    single.write_text("1", encoding="utf-8")

    result = charloom("evaluate", "m", single)

    assert result.exit_code == 2
    assert "a first token has no score" in result.stderr


def test_a_finished_run_is_not_resumed(charloom: Run, text: Path) -> None:
    """There is nothing to resume, and the sentence says what else to do."""
    charloom("train", text, "--name", "m", "--steps", 3, *SMALL)

    result = charloom("train", "--resume", "--name", "m")

    assert result.exit_code == 2
    assert "m has finished after 3 steps" in result.stderr


@pytest.fixture
def stopped(text: Path, models: Path) -> Path:
    """A run that was stopped by a signal early on."""
    return stop_early(models, text)


def stop_early(models: Path, text: Path, *options: object) -> Path:
    """Begin a long run and end it by a signal once something is saved."""
    process = start(models, text, "--name", "m", "--steps", 100_000, *SMALL, *options)
    assert process.stderr is not None
    while (line := process.stderr.readline()) and not line.startswith("expected"):
        pass
    while not (models / "m" / "config.json").exists():
        assert process.poll() is None
    process.terminate()
    process.communicate()
    return models / "m"


def test_resuming_with_another_corpus_is_refused(
    charloom: Run, stopped: Path, tmp_path: Path
) -> None:
    """The sentence names the corpus, and the run stays as it was."""
    other = tmp_path / "other.txt"
    other.write_text("another text, long enough to be split in two parts\n" * 20, encoding="utf-8")
    before = {path: path.read_bytes() for path in stopped.glob("**/*") if path.is_file()}

    result = charloom("train", other, "--resume", "--name", "m")

    assert result.exit_code == 2
    assert "other.txt is not the text that m was trained on" in result.stderr
    assert before == {path: path.read_bytes() for path in before}


def test_resuming_with_another_architecture_is_refused(charloom: Run, stopped: Path) -> None:
    """Every differing option is named with both values."""
    result = charloom("train", "--resume", "--name", "m", "--hidden", 32, "--layers", 3)

    assert result.exit_code == 2
    assert "--hidden 32 (the run has 16)" in result.stderr
    assert "--layers 3 (the run has 2)" in result.stderr
    assert checkpoints.verify(stopped) == []


@pytest.mark.usefixtures("stopped")
def test_resuming_with_the_same_options_is_fine(text: Path, models: Path) -> None:
    """What agrees with the plan may be said again, text and recipe included."""
    process = start(models, text, "--resume", "--name", "m", "--hidden", 16, "--recipe", "tiny")
    assert process.stderr is not None
    lines = iter(process.stderr.readline, "")
    assert any(line.startswith("Resuming m after step") for line in lines)
    process.terminate()
    process.communicate()


@pytest.mark.usefixtures("stopped")
def test_resuming_with_another_recipe_is_refused(charloom: Run) -> None:
    """The sentence tells which one the plan chose, though none was named."""
    again = charloom("train", "--resume", "--name", "m", "--recipe", "large")

    assert again.exit_code == 2
    assert "--recipe large (the run has tiny)" in again.stderr


def test_a_resumed_run_goes_on_in_tensorboard(
    charloom: Run, text: Path, models: Path, tmp_path: Path
) -> None:
    """What the stopped run had shown beyond its last save is purged, and nothing before it."""
    saved = checkpoints.load(stop_early(models, text, "--steps", 2000)).summary["step"]
    with Scalars(tmp_path / "m", after=0, report=pytest.fail) as before:
        for step in range(1, saved + 3):
            before.add({"step": step, "training": 9.0})

    options = ["--resume", "--name", "m", "--tensorboard", tmp_path]
    assert charloom("train", *options).exit_code == 0

    events = EventAccumulator(str(tmp_path / "m")).Reload().Scalars("loss/training")
    old = [event.step for event in events if event.value == 9.0]
    assert old == list(range(1, saved + 1))
    assert len(events) > len(old)
    assert all(event.step > saved for event in events if event.value != 9.0)


def test_an_existing_name_is_kept(charloom: Run, text: Path, models: Path) -> None:
    """Without --overwrite or --resume nothing is touched."""
    charloom("train", text, "--name", "m", "--steps", 3, *SMALL)
    before = (models / "m" / "config.json").read_bytes()

    result = charloom("train", text, "--name", "m", "--steps", 3, *SMALL)

    assert result.exit_code == 2
    assert "--overwrite" in result.stderr
    assert "--resume" in result.stderr
    assert (models / "m" / "config.json").read_bytes() == before


def test_overwriting_replaces_the_model(charloom: Run, text: Path, models: Path) -> None:
    """The name then holds the new model alone."""
    charloom("train", text, "--name", "m", "--steps", 3, *SMALL)

    result = charloom("train", text, "--name", "m", "--steps", 4, "--overwrite", *SMALL)

    assert result.exit_code == 0
    assert checkpoints.load(models / "m").summary["step"] == 4
    assert len(list((models / "m").glob("weights-*"))) == 1


def test_a_name_in_training_is_refused(text: Path, models: Path) -> None:
    """Another process holds the lock, so the sentence asks to wait or choose another name."""
    with ModelWriter(models / "m", mode="new"):
        script = "import sys; from charloom.cli import main; main(sys.argv[1:])"
        words = ["--models", str(models), "train", str(text), "--name", "m", "--steps", "3"]
        done = subprocess.run(
            [sys.executable, "-c", script, *words], capture_output=True, text=True, check=False
        )

    assert done.returncode == 2
    assert "is being written by" in done.stderr


def test_all_bad_options_are_reported_at_once(charloom: Run, text: Path, models: Path) -> None:
    """Name, training and corpus options each have their sentence, and nothing is written."""
    result = charloom(
        *("train", text, "--name", "a/b", "--layers", 0, "--dropout", 2),
        *("--validation", 1, "--device", "gpu"),
    )

    assert result.exit_code == 2
    parts = ("'a/b'", "--layers is 0", "--dropout is 2.0", "--validation is 1.0", "--device is 'gp")
    for part in parts:
        assert part in result.stderr
    assert not models.exists()


def test_evaluation_reports_bad_options_before_it_looks_for_the_model(charloom: Run) -> None:
    """Threads and encoding each have their sentence; of the model none is needed yet."""
    options = ["--threads", 0, "--encoding", "utf-9", "--dynamic", -1]

    result = charloom("evaluate", "nowhere", "text.txt", *options)

    assert result.exit_code == 2
    for part in ("--threads is 0", "--encoding is 'utf-9'", "--dynamic is -1.0; give a number"):
        assert part in result.stderr
    assert "nowhere" not in result.stderr


def test_a_model_is_found_wherever_the_folder_is_named(text: Path, tmp_path: Path) -> None:
    """--models before a command, behind it or behind a subcommand: the last one said counts."""

    def said(*words: object) -> Result:
        return CliRunner().invoke(main, [str(word) for word in words])

    there, elsewhere = tmp_path / "there", tmp_path / "elsewhere"
    trained = said(
        *("--models", elsewhere, "train", text, "--name", "m", "--steps", 2),
        *("--models", there, *SMALL),
    )

    assert trained.stdout == f"{there / 'm'}\n"
    assert f"Try: charloom sample {there / 'm'}" in trained.stderr
    assert said("sample", "m", "1", "-n", 1, "--models", there).exit_code == 0
    assert said("evaluate", "m", text, "--models", there, "--threads", 1).exit_code == 0
    for words in (
        ("--models", there, "models", "list"),
        ("models", "--models", there, "list"),
        ("models", "list", "--models", there),
        ("--models", elsewhere, "models", "list", "--models", there),
    ):
        assert "lstm 2 x 16" in said(*words).stdout


def test_sentencepiece_is_its_usual_kind(charloom: Run, text: Path, models: Path) -> None:
    """The library's name stands for unigram, in a run and when that is resumed."""
    words = ["--tokenizer", "sentencepiece", "--vocab-size", 300]
    folder = stop_early(models, text, *words)

    resumed = charloom("train", "--resume", "--name", "m", *words, "--hidden", 32)

    assert checkpoints.load(folder).summary["corpus"]["options"]["tokenizer"] == "unigram"
    assert "which differs from --hidden 32 (the run has 16); leave" in resumed.stderr


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "a\nb", "a\\b", ""])
def test_names_that_cannot_be_folders_are_refused(charloom: Run, text: Path, name: str) -> None:
    """The sentence says what is wrong with the name."""
    result = charloom("train", text, "--name", name, "--steps", 1)

    assert result.exit_code == 2
    assert result.stderr.startswith("The model name")


def test_a_corpus_and_a_name_are_needed(charloom: Run) -> None:
    """Both are asked for at once, with what they could be."""
    result = charloom("train")

    assert result.exit_code == 2
    assert "No corpus is given" in result.stderr
    assert "No name is given" in result.stderr


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "give a corpus that is not empty"),
        (b"a" * 500, "one distinct character"),
        (b"abc", "too short: it has 3 characters"),
        (b"caf\xe9 " * 100, "0xE9 at offset 3"),
        (b"\0\1\2" * 500, "binary"),
    ],
)
def test_a_corpus_that_cannot_be_learnt_is_refused(
    charloom: Run, tmp_path: Path, models: Path, content: bytes, sentence: str
) -> None:
    """One sentence, exit status 2, and no model folder is left."""
    file = tmp_path / "corpus.txt"
    file.write_bytes(content)

    result = charloom("train", file, "--name", "m", "--steps", 1)

    assert result.exit_code == 2
    assert sentence in result.stderr
    assert not (models / "m").exists()


def test_a_missing_corpus_is_refused(charloom: Run, tmp_path: Path) -> None:
    """The sentence names the path."""
    result = charloom("train", tmp_path / "nowhere.txt", "--name", "m")

    assert result.exit_code == 2
    assert "nowhere.txt" in result.stderr


def test_options_come_from_a_file_and_the_command_line_wins(
    charloom: Run, text: Path, tmp_path: Path, models: Path
) -> None:
    """TOML holds the options by their names; a budget given on the line replaces the file's."""
    file = tmp_path / "options.toml"
    file.write_text(
        'hidden = 24\nlayers = 1\ncell = "gru"\nminutes = 3\nthreads = 1\nvalidation = 0.2\n',
        encoding="utf-8",
    )

    result = charloom("train", text, "--name", "m", "--config", file, "--layers", 2, "--steps", 3)

    assert result.exit_code == 0, result.stderr
    checkpoint = checkpoints.load(models / "m")
    assert checkpoint.architecture.cell == "gru"
    assert checkpoint.architecture.hidden == 24
    assert checkpoint.architecture.layers == 2
    assert checkpoint.summary["step"] == 3
    assert checkpoint.summary["corpus"]["options"]["validation"] == 0.2


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("hiden = 24\n", "sets 'hiden', which is no option of a file; write hidden."),
        ("hidden = \n", "is not TOML"),
        ('hidden = "many"\n', "--hidden is 'many'"),
        ("device = true\n", "--device is True; choose auto, cpu, cuda, cuda:N or mps."),
        ("device = []\n", "--device is []; choose auto"),
    ],
)
def test_a_bad_options_file_is_refused(
    charloom: Run, text: Path, tmp_path: Path, content: str, sentence: str
) -> None:
    """The sentence names the file or the option."""
    file = tmp_path / "options.toml"
    file.write_text(content, encoding="utf-8")

    result = charloom("train", text, "--name", "m", "--config", file)

    assert result.exit_code == 2
    assert sentence in result.stderr


HOSTILE = (
    "春眠不覺曉，處處聞啼鳥。\r\n夜來風雨聲，花落知多少。\n"
    "السلام عليكم ورحمة الله\tوبركاته\n"
    "👩‍👩‍👧‍👦 👍🏽 🇩🇪 e\u0301 \u200d \u00a0\n"
    "tab\there, nul\0here, crlf\r\nand ▁ ▅ \ufeff\n"
)


@pytest.mark.parametrize(
    "tokenizer",
    [
        ("characters",),
        ("bytes",),
        ("unigram", "--vocab-size", "320"),
        ("bpe", "--vocab-size", "320"),
        ("char", "--vocab-size", "320"),
    ],
)
def test_every_script_survives_training_and_sampling(
    charloom: Run, tmp_path: Path, models: Path, tokenizer: tuple[str, ...]
) -> None:
    """Verse, Arabic, joined emoji, CRLF, tabs and NUL come back from tokens and from a prompt."""
    file = tmp_path / "hostile.txt"
    file.write_bytes((HOSTILE * 60).encode())

    trained = charloom(
        "train", file, "--name", "m", "--steps", 3, "--tokenizer", *tokenizer, *SMALL
    )
    assert trained.exit_code == 0, trained.stderr
    loaded = checkpoints.load(models / "m").tokenizer
    assert loaded.decode(loaded.encode(HOSTILE)) == HOSTILE
    prompt = tmp_path / "prompt.txt"
    prompt.write_bytes(HOSTILE.encode())

    sampled = charloom("sample", "m", "--prompt-file", prompt, "--seed", 1, "--max-tokens", 50)

    assert sampled.exit_code == 0, sampled.stderr
    assert sampled.stdout_bytes.startswith(HOSTILE.encode())
    sampled.stdout_bytes.decode()


def test_ending_a_run_before_its_first_save_leaves_nothing(models: Path) -> None:
    """SIGTERM while the corpus is read gives the name free again."""
    process = start(models, "-", "--name", "m", stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(TEXT * 30)  # more than a pipe holds, so once written it is being read
    process.stdin.flush()
    assert (models / "m").exists()
    process.terminate()
    process.communicate()

    assert process.returncode == 128 + signal.SIGTERM
    assert not (models / "m").exists()


def test_an_unfinished_model_is_listed_as_such(charloom: Run, stopped: Path) -> None:
    """The list tells that a run was stopped, and where."""
    result = charloom("models", "list")

    assert stopped.name in result.stdout
    assert "unfinished, step" in result.stdout
    assert "of 100000" in result.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_standard_output_is_a_sentence(charloom: Run, text: Path, models: Path) -> None:
    """What cannot be written is told on standard error, with the exit status of an error."""
    charloom("train", text, "--name", "m", "--steps", 2, *SMALL)
    words = [sys.executable, "-m", "charloom", "--models", str(models), "models", "list"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)

    assert done.returncode == 2
    assert "Standard output cannot be written: No space left on device" in done.stderr


def test_a_corpus_from_closed_standard_input_is_a_sentence(shell: Shell, models: Path) -> None:
    """Nothing is left of the name."""
    done = shell(models, "<&- train - --name m --steps 2", *SMALL)

    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode() == "Standard input (-) is closed; give it a text, such as < FILE.\n"
    assert not (models / "m").exists()


def test_a_closed_standard_error_stops_neither_training_nor_evaluation(
    shell: Shell, models: Path, text: Path
) -> None:
    """What has nowhere to be shown is not shown, and standard output is the product alone."""
    trained = shell(models, "2>&- train --name m --steps 2", text, *SMALL)
    evaluated = shell(models, "2>&- evaluate m --json --threads 1", text)

    assert (trained.returncode, trained.stdout.decode()) == (0, f"{models / 'm'}\n")
    assert evaluated.returncode == 0
    assert set(json.loads(evaluated.stdout)) == {"windows", "stateful"}


def test_an_evaluation_that_cannot_be_told_is_refused(
    shell: Shell, charloom: Run, models: Path, text: Path
) -> None:
    """Closed standard output is a sentence before the text is read."""
    charloom("train", text, "--name", "m", "--steps", 2, *SMALL)

    done = shell(models, ">&- evaluate m", text)

    assert done.returncode == 2
    assert done.stderr.decode() == (
        "Standard output is closed; send it somewhere, such as > FILE.\n"
    )


def test_a_prompt_that_is_no_text_is_a_sentence(charloom: Run, text: Path) -> None:
    """Bytes that are not UTF-8 on the command line are refused, whatever --unknown says."""
    charloom("train", text, "--name", "m", "--steps", 2, *SMALL)

    result = charloom("sample", "m", "a\udcff", "--unknown", "skip")

    assert result.exit_code == 2
    assert "PROMPT is not UTF-8" in result.stderr


def test_a_processor_without_bfloat16_trains_in_float32(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where oneDNN refuses bfloat16, as on older laptops, auto takes float32 and says so."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    process = start(tmp_path / "models", text, "--steps", 3, "--name", "m", *SMALL)
    _, errors = process.communicate()

    assert process.returncode == 0
    assert "float32 on cpu" in errors
