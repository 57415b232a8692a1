"""Texts and tokens in a request: one or several, in the forms that OpenAI's clients send.

The first item of a list decides which form is meant, so that a refusal speaks of that form and
names the item that does not fit it.
"""

from typing import Annotated, Any, TypeVar

from pydantic import Discriminator, Field, Tag

from service.messages import PROMPTS_LIMIT, Prompt

TOKEN_LIMIT = 1 << 31
"""Numbers of tokens lie below it: what the engine's tables are indexed by."""

Token = Annotated[int, Field(ge=0, lt=TOKEN_LIMIT)]

_Text = TypeVar("_Text", bound=str)
_Tokens = Annotated[list[Token], Field(fail_fast=True, min_length=1)]
_Several = Field(fail_fast=True, min_length=1, max_length=PROMPTS_LIMIT)


def _shape(value: Any) -> str | None:
    """Which of the forms this is meant to be."""
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list) or not value:
        return None
    match value[0]:
        case str():
            return "texts"
        case list():
            return "token lists"
    return "tokens"


Texts = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[str], _Several, Tag("texts")],
    Discriminator(
        _shape,
        custom_error_type="texts",
        custom_error_message=f"give a text, or a list of 1 to {PROMPTS_LIMIT} texts",
    ),
]

_TextsOrTokens = Annotated[
    Annotated[_Text, Tag("text")]
    | Annotated[list[_Text], _Several, Tag("texts")]
    | Annotated[_Tokens, Tag("tokens")]
    | Annotated[list[_Tokens], _Several, Tag("token lists")],
    Discriminator(
        _shape,
        custom_error_type="texts_or_tokens",
        custom_error_message=f"give a text, a list of tokens, or a list of 1 to {PROMPTS_LIMIT} of "
        "either",
    ),
]

Prompts = _TextsOrTokens[str]
"""What is continued, also from nothing."""

Inputs = _TextsOrTokens[Annotated[str, Field(min_length=1)]]
"""What is read, of which there has to be something."""


def listed(given: str | list[str] | list[int] | list[list[int]]) -> list[Prompt]:
    """Texts and lists of tokens one by one; a flat list of numbers is one of them."""
    if isinstance(given, str):
        return [given]
    tokens = [item for item in given if isinstance(item, int)]
    return [tokens] if tokens else [item for item in given if not isinstance(item, int)]
