import resource
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from charloom.checkpoint import ModelWriter, history, load, read_history, verify
from charloom.errors import CheckpointError, StorageError

lines = st.lists(
    st.one_of(
        st.fixed_dictionaries({"step": st.integers(0, 20)}, optional={"text": st.text()}),
        st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False), max_size=2),
    )
)


@given(lines, st.integers(-1, 21), st.data())
def test_cutting_keeps_the_whole_lines_up_to_a_step(written, step: int, data) -> None:
    """Wherever the file ends, cutting equals dropping torn and later lines one by one."""
    encoded = [history.encode_line(line) for line in written]
    content = b"".join(encoded)
    content = content[: data.draw(st.integers(0, len(content)))]
    whole = content.count(b"\n")
    expected = [line for line in written[:whole] if not line.get("step", step) > step]
    assert history.parse(content) == written[:whole]
    assert history.parse(history.cut(content, step)) == expected
    assert history.cut(content, 10**9) == b"".join(encoded[:whole])


def test_lines_can_be_read_while_the_writer_goes_on(saved: Path) -> None:
    """Each line is there for others as soon as it is appended, after those of earlier writers."""
    assert read_history(saved) == []
    with ModelWriter(saved, mode="resume") as writer:
        writer.append_history({"step": 1, "loss": 2.5})
        assert read_history(saved) == [{"step": 1, "loss": 2.5}]
    with ModelWriter(saved, mode="resume") as writer:
        writer.append_history({"step": 2, "text": "中\n"})
        assert read_history(saved) == [{"step": 1, "loss": 2.5}, {"step": 2, "text": "中\n"}]


def test_cutting_back_goes_on_from_the_step(saved: Path) -> None:
    """After a cut later lines are gone, lines without a step stay, and appending goes on."""
    with ModelWriter(saved, mode="resume") as writer:
        writer.append_history({"plan": {}})
        for step in range(5):
            writer.append_history({"step": step})
        writer.cut_history(2)
        writer.append_history({"step": 3, "again": True})
    assert read_history(saved)[0] == {"plan": {}}
    assert read_history(saved)[1:] == [
        {"step": 0},
        {"step": 1},
        {"step": 2},
        {"step": 3, "again": True},
    ]


def test_a_torn_line_is_not_read_nor_joined_to_the_next(saved: Path) -> None:
    """What a killed writer left of a line is dropped by readers and by the next writer."""
    (saved / "history.jsonl").write_bytes(b'{"step": 1}\n{"st')
    assert read_history(saved) == [{"step": 1}]
    assert verify(saved) == []
    with ModelWriter(saved, mode="resume") as writer:
        writer.append_history({"step": 2})
    assert (saved / "history.jsonl").read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_a_line_that_the_disk_refused_is_not_joined_to_the_next(saved: Path) -> None:
    """After a refusal in mid-line, history goes on with whole lines."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with ModelWriter(saved, mode="resume") as writer:
        writer.append_history({"step": 1})
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
        try:
            with pytest.raises(StorageError, match="File too large"):
                writer.append_history({"step": 2, "text": "long"})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert (saved / "history.jsonl").stat().st_size == 20
        writer.append_history({"step": 3})
    assert read_history(saved) == [{"step": 1}, {"step": 3}]


@pytest.mark.parametrize("content", [b"nonsense\n{}\n", b"[]\n{}\n", b"{}\nNaN\n", b'{"x": NaN}\n'])
def test_damage_within_the_history_is_told(content: bytes, saved: Path) -> None:
    """A line that is no JSON object is named by its number; the model itself still loads."""
    (saved / "history.jsonl").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"history\.jsonl is damaged: line [12] is"):
        read_history(saved)
    with (
        ModelWriter(saved, mode="resume") as writer,
        pytest.raises(CheckpointError, match=r"Mend or delete history\.jsonl"),
    ):
        writer.cut_history(1)
    load(saved)


def test_lines_before_the_first_save_land_with_it(tmp_path: Path, version) -> None:
    """History of a model that is not there yet is held back, can be cut, and is then written."""
    with ModelWriter(tmp_path / "demo", mode="new") as writer:
        for step in range(4):
            writer.append_history({"step": step})
        writer.cut_history(1)
        assert read_history(tmp_path / "demo") == []
        writer.commit(**version(1))
        writer.append_history({"step": 2})
    assert read_history(tmp_path / "demo") == [{"step": 0}, {"step": 1}, {"step": 2}]


def test_companions_are_replaced_as_a_whole(saved: Path) -> None:
    """The model card and the picture hold what was written last."""
    with ModelWriter(saved, mode="resume") as writer:
        for number in range(2):
            writer.write_text("README.md", f"# 中 {number}\n")
            writer.write_bytes("loss.png", bytes([number]))
    assert (saved / "README.md").read_text(encoding="utf-8") == "# 中 1\n"
    assert (saved / "loss.png").read_bytes() == b"\1"
