"""Recipes: what their files hold, and what becomes of it for a text and a user's choices."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from charloom.errors import OptionError
from training.recipe import RECIPES, Draft, RecipeName, at

POINTS = ((2.0, 0.0), (8.0, 0.1), (32.0, 0.5))


@given(name=st.sampled_from(RECIPES), passes=st.floats(1e-6, 1e6), tokens=st.floats(0.0, 1e9))
def test_every_named_recipe_can_be_settled(name: RecipeName, passes: float, tokens: float) -> None:
    """However often a text is read and however short its documents, all values are in range."""
    recipe = Draft.named(name).settle({}, passes=passes, document_tokens=tokens)

    assert recipe.batch_size >= 1


def test_recipes_grow() -> None:
    """From one name to the next the network is larger, and wants more text to be read."""
    drafts = [Draft.named(name) for name in RECIPES]
    for smaller, larger in pairwise(drafts):
        sizes = [
            draft.settle({}, passes=1.0).architecture(100).parameters for draft in (smaller, larger)
        ]
        assert sizes[0] < sizes[1]
        assert smaller.worth_from < larger.worth_from
    assert drafts[0].worth_from == 0


@pytest.mark.parametrize(
    ("passes", "value"),
    [(0.1, 0.0), (2.0, 0.0), (4.0, 0.05), (8.0, 0.1), (16.0, 0.3), (32.0, 0.5), (1000.0, 0.5)],
)
def test_a_value_by_passes_is_straight_on_a_logarithmic_scale(passes: float, value: float) -> None:
    """Halfway between two points lies their geometric mean; beyond the ends nothing changes."""
    assert at(POINTS, passes) == value


@given(st.floats(2.0, 31.9))
def test_a_value_by_passes_is_a_round_number(passes: float) -> None:
    """Between the points it is the twentieth nearest to what NumPy interpolates."""
    exact = np.interp(math.log(passes), [math.log(x) for x, _ in POINTS], [y for _, y in POINTS])

    assert at(POINTS, passes) == pytest.approx(exact, abs=0.025001)
    assert 20 * at(POINTS, passes) == pytest.approx(round(20 * at(POINTS, passes)))


def test_what_the_user_chose_stands() -> None:
    """Each choice replaces the recipe's own value, and nothing else changes."""
    draft = Draft.named("small")
    choices = {"dropout": 0.0, "batch_size": 3, "cell": "gru", "residual": True}

    settled, plain = draft.settle(choices, passes=50.0), draft.settle({}, passes=50.0)

    for name in type(settled).__dataclass_fields__:
        assert getattr(settled, name) == choices.get(name, getattr(plain, name))


@pytest.mark.parametrize(
    ("choices", "size"),
    [
        ({"hidden": 512}, 128),
        ({"hidden": 32}, 32),
        ({"hidden": 512, "tied": True}, 512),
        ({"hidden": 512, "embedding": 7}, 7),
    ],
)
def test_an_embedding_fits_the_hidden_size(choices: dict[str, int], size: int) -> None:
    """Unless chosen it is the hidden size, 128 at most, and all of it where it is tied."""
    assert Draft.named("small").settle(choices, passes=1.0).embedding == size


def test_short_documents_are_read_in_more_lanes() -> None:
    """A step reads as many tokens of names of 8 characters as of one long text."""
    draft = Draft.named("small")
    long, short = (draft.settle({}, passes=1.0, document_tokens=n) for n in (1e9, 8.0))

    assert short.sequence_length == long.sequence_length
    assert short.batch_size * 8 == long.batch_size * long.sequence_length


@pytest.mark.parametrize(
    ("tokens", "document_tokens", "lanes"), [(900, math.inf, 14), (480, 8, 60), (3, math.inf, 1)]
)
def test_a_small_text_is_read_in_fewer_lanes(
    tokens: int, document_tokens: float, lanes: int
) -> None:
    """No more than it has sequences or documents, so that none stands twice in a batch."""
    recipe = Draft.named("small").settle(
        {}, passes=1.0, tokens=tokens, document_tokens=document_tokens
    )

    assert recipe.sequence_length == 64
    assert recipe.batch_size == lanes


def test_lanes_stay_within_their_limit() -> None:
    """However long a sequence is chosen to be, short documents ask for no impossible batch."""
    draft = Draft.named("small")

    assert (
        draft.settle({"sequence_length": 65536}, passes=1.0, document_tokens=2).batch_size == 65536
    )


@pytest.mark.parametrize(
    ("choices", "name"),
    [
        ({"hidden": 16, "layers": 1}, "tiny"),
        ({"hidden": 200}, "small"),
        ({"hidden": 256, "layers": 3}, "small"),
        ({"hidden": 600}, "base"),
        ({"hidden": 4096}, "large"),
    ],
)
def test_a_chosen_network_takes_the_recipe_nearest_in_size(
    choices: dict[str, int], name: RecipeName
) -> None:
    """What else the recipe says then suits that network."""
    assert Draft.nearest(choices).name == name


def test_only_dropouts_depend_on_the_passes() -> None:
    """What is rounded to twentieths must be a share."""
    for name in RECIPES:
        values = Draft.named(name).values
        points = {key for key, value in values.items() if isinstance(value, tuple)}
        assert points <= {"dropout", "weight_drop"}


def test_an_impossible_combination_is_refused() -> None:
    """What only the recipe's own values make impossible is told by the same sentence."""
    with pytest.raises(OptionError, match="--tied needs --embedding equal to --hidden, not 7 and"):
        Draft.named("tiny").settle({"tied": True, "embedding": 7}, passes=1.0)
