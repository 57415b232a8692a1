from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from charloom.decoding.admission import WaitingLine


def line_of(*items: str) -> WaitingLine[str]:
    """Items such as "a1", pushed in this order by the owner that their first letter names."""
    line: WaitingLine[str] = WaitingLine()
    for item in items:
        line.push(item[0], item)
    return line


def pop_all(line: WaitingLine[str]) -> list[str]:
    """All items in the order of their turns."""
    return [line.pop() for _ in range(len(line))]


def test_one_owner_is_served_in_order() -> None:
    """The items of a single owner come out as they went in."""
    assert pop_all(line_of("a1", "a2", "a3")) == ["a1", "a2", "a3"]


def test_owners_take_turns() -> None:
    """However many items an owner has, another's first one waits for one of them at most."""
    line = line_of("a1", "a2", "a3", "a4", "b1", "b2", "c1")
    assert pop_all(line) == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]


def test_an_owner_who_comes_late_is_next_but_for_those_who_wait() -> None:
    """A newcomer's turn comes after one turn of each owner who was there."""
    line = line_of("a1", "a2", "a3", "b1", "b2")
    assert line.pop() == "a1"
    line.push("c", "c1")
    assert pop_all(line) == ["b1", "a2", "c1", "b2", "a3"]


def test_an_item_put_back_comes_before_its_owners_others() -> None:
    """An item that had its turn keeps its place among its owner's items."""
    line = line_of("a1", "a2", "b1")
    line.push_back("a", line.pop())
    assert [item for item in pop_all(line) if item[0] == "a"] == ["a1", "a2"]


def test_an_item_can_be_put_back_for_an_owner_who_has_no_other() -> None:
    """The owner is then one of those who wait."""
    line = line_of("a1")
    line.push_back("a", line.pop())
    assert (len(line), list(line), pop_all(line)) == (1, ["a1"], ["a1"])


def test_items_are_taken_out_of_any_place() -> None:
    """Those that are wanted go, and the others keep their order and turns."""
    line = line_of("a1", "a2", "a3", "b1", "c1", "c2")
    assert sorted(line.take(lambda item: item in {"a2", "b1", "c1"})) == ["a2", "b1", "c1"]
    assert (len(line), sorted(line)) == (3, ["a1", "a3", "c2"])
    assert pop_all(line) == ["a1", "c2", "a3"]


def test_an_item_is_asked_about_once() -> None:
    """What becomes wanted while the line is looked through is either taken or kept, never both."""
    line = line_of("a1", "a2")
    asked: list[str] = []

    def is_wanted(item: str) -> bool:
        asked.append(item)
        return len(asked) > 1

    taken = line.take(is_wanted)
    assert asked == ["a1", "a2"]
    assert sorted([*taken, *line]) == ["a1", "a2"]


PUSHES = st.tuples(st.just("push"), st.sampled_from("abcd"))
POPS = st.tuples(st.sampled_from(["pop", "pop and put back", "take"]), st.sampled_from("abcd"))


@given(st.lists(PUSHES | POPS, max_size=40))
def test_no_item_is_lost_and_no_turn_is_missed(moves: list[tuple[str, str]]) -> None:
    """An owner's items keep their order, and between two turns every other that waits has one."""
    line: WaitingLine[str] = WaitingLine()
    kept: defaultdict[str, list[str]] = defaultdict(list)
    turns_missed: dict[str, set[str]] = defaultdict(set)
    for number, (move, owner) in enumerate(moves):
        if move == "push":
            item = f"{owner}{number}"
            line.push(owner, item)
            kept[owner].append(item)
        elif move == "take":
            wanted = set(kept[owner][::2])
            assert set(line.take(wanted.__contains__)) == wanted
            kept[owner] = [item for item in kept[owner] if item not in wanted]
            if not kept[owner]:
                turns_missed.pop(owner, None)
        elif len(line):
            item = line.pop()
            mine = item[0]
            assert item == kept[mine].pop(0)
            for other in (other for other in kept if kept[other] and other != mine):
                assert mine not in turns_missed[other]
                turns_missed[other].add(mine)
            turns_missed.pop(mine, None)
            if move == "pop and put back" and kept[mine]:
                line.push_back(mine, item)
                kept[mine].insert(0, item)
        assert len(line) == sum(map(len, kept.values()))
        assert sorted(line) == sorted(item for items in kept.values() for item in items)
