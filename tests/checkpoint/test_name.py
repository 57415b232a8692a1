from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from charloom.checkpoint import check_name, find_model
from charloom.errors import ModelMissingError, ModelNameError


@pytest.mark.parametrize(
    "name", ["demo", "a", "2x256", "verse-2_b.v1", "стихи", "詩", "शेर", "é", "a" * 100]
)
def test_names_of_any_script_are_taken(name: str) -> None:
    """Letters, marks and digits of any script, with '-', '_' and '.' inside, make a name."""
    check_name(name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "is empty"),
        ("a/b", "holds a slash"),
        ("a\\b", "holds a slash"),
        ("/", "holds a slash"),
        (".", "begins with '.'"),
        ("..", "begins with '.'"),
        (".hidden", "begins with '.'"),
        ("-rf", "begins with '-'"),
        ("a..b", "holds '..'"),
        ("a.", "ends with a dot"),
        ("a ", "ends with a space"),
        ("a b", "U+0020, space"),
        ("a\nb", "U+000A"),
        ("a\0b", "U+0000"),
        ("a\x1b[31m", "U+001B"),
        ("a\u202eb", "U+202E, right-to-left override"),
        ("a\u200bb", "U+200B, zero width space"),
        ("a\udc80", "U+DC80"),
        ("\u0301a", "combining mark (U+0301)"),
        ("e\u0301", "composed form"),
        ("a" * 101, "101 bytes"),
        ("詩" * 34, "102 bytes"),
    ],
)
def test_other_names_are_refused_with_their_fault(name: str, reason: str) -> None:
    """A name that cannot be a folder everywhere is refused by a sentence that says why."""
    with pytest.raises(ModelNameError) as caught:
        check_name(name)
    assert reason in str(caught.value)
    assert "Choose letters and digits" in str(caught.value)
    assert str(caught.value).isprintable()


@given(st.text())
def test_an_accepted_name_is_one_plain_component_of_a_path(name: str) -> None:
    """Whatever text is tried, a name that passes is one visible folder inside models."""
    try:
        check_name(name)
    except ModelNameError:
        return
    assert (Path("models") / name).parts == ("models", name)
    assert name.isprintable()
    assert name[0] != "."
    assert len(name.encode()) <= 100


def test_a_bare_name_is_looked_up_in_models_first(tmp_path: Path, monkeypatch) -> None:
    """A name means the folder in models even where a folder of that name is at hand."""
    (tmp_path / "demo").mkdir()
    (tmp_path / "models" / "demo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_model("demo", models=Path("models")) == Path("models/demo")


def test_an_existing_folder_is_a_path(tmp_path: Path, monkeypatch) -> None:
    """A name that models does not hold, and any argument with a separator, is a path."""
    (tmp_path / "else where").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_model("else where", models=Path("models")) == Path("else where")
    assert find_model("./else where", models=Path("models")) == Path("else where")


def test_a_missing_name_lists_what_there_is_and_the_nearest(tmp_path: Path) -> None:
    """The sentence for a missing model names the models that exist and the likeliest of them."""
    for name in ("verse", "names", ".hidden"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ModelMissingError) as caught:
        find_model("vers", models=tmp_path)
    assert str(caught.value).endswith("Did you mean 'verse'? It holds: names, verse.")


def test_a_missing_name_in_an_empty_house_says_how_to_train(tmp_path: Path) -> None:
    """Without any model the sentence gives the command that makes one."""
    with pytest.raises(ModelMissingError, match="charloom train CORPUS --name demo"):
        find_model("demo", models=tmp_path / "none")


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    """An argument with a separator is never looked up in models."""
    with pytest.raises(ModelMissingError, match=r"There is no model folder '\./demo'"):
        find_model("./demo", models=tmp_path)


@pytest.mark.parametrize("argument", ["", "a\0b", "a\udc80\ud800", "a" * 5000])
def test_an_argument_that_no_system_call_takes_is_a_bad_name(argument, tmp_path: Path) -> None:
    """An argument that cannot be a name and leads nowhere gets the sentence for names."""
    with pytest.raises(ModelNameError):
        find_model(argument, models=tmp_path)


@pytest.mark.parametrize("argument", ["../\0", "./" + "a" * 5000])
def test_a_path_that_no_system_call_takes_leads_nowhere(argument, tmp_path: Path) -> None:
    """An impossible path is a missing model, told in a sentence of bounded length."""
    with pytest.raises(ModelMissingError) as caught:
        find_model(argument, models=tmp_path)
    assert len(str(caught.value)) < 1000
