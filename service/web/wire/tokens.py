"""The bodies of the routes between texts and tokens: OpenAI has none, other open servers do."""

from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field

from charloom.params import UnknownPolicy
from service.messages import ModelCard
from service.web.wire import Answer, Off, Request, example
from service.web.wire.inputs import Token
from service.web.wire.inspection import Name

_GIVEN: dict[str, Any] = {"type": "string"}
_NOT_GIVEN: dict[str, Any] = {"type": "null"}


class TokenizeRequest(Request):
    """A text whose tokens are asked for."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "demo", "prompt": "To be"}],
            "oneOf": [
                {"required": [one], "properties": {one: _GIVEN, other: _NOT_GIVEN}}
                for one, other in (("prompt", "text"), ("text", "prompt"))
            ],
        }
    )

    model: Name | None = Field(None, description="May be left out where one model is served.")
    prompt: str | None = Field(None, description="The text.")
    text: str | None = Field(None, description="Another name for it.")
    add_special_tokens: Off | None = Field(
        None, description="Nothing is ever added; clients of other servers may say so."
    )
    unknown: UnknownPolicy | None = Field(
        None,
        description="What to do with characters that the model has no token for; error by default.",
    )


class TokenizeAnswer(Answer):
    """The tokens of a text."""

    model_config = example({"tokens": [32, 53], "count": 2, "pieces": ["T", "o"]})

    tokens: list[int]
    count: int = Field(description="How many there are.")
    pieces: list[str] = Field(description="What each of them adds to the text.")


class DetokenizeRequest(Request):
    """Tokens whose text is asked for."""

    model_config = example({"model": "demo", "tokens": [20, 53, 1, 40, 43]})

    model: Name | None = Field(None, description="May be left out where one model is served.")
    tokens: Annotated[list[Token], Field(fail_fast=True)] = Field(description="The tokens.")


class DetokenizeAnswer(Answer):
    """The text of tokens."""

    model_config = example({"prompt": "To"})

    prompt: str = Field(description="The text.")


class TokenizerInfo(Answer):
    """What a client has to know that encodes texts itself."""

    model_config = example(
        {
            "tokenizer_class": "characters",
            "vocabulary_size": 65,
            "eos_token": None,
            "bos_token": None,
            "pad_token": None,
            "chat_template": None,
        }
    )

    tokenizer_class: str = Field(description="What its tokens are.")
    vocabulary_size: int = Field(description="How many there are.")
    eos_token: str | None = Field(description="Null: the end of a document is no text.")
    bos_token: str | None = Field(description="Null: nothing stands before a text.")
    pad_token: str | None = Field(description="Null: nothing is filled up.")
    chat_template: str | None = Field(
        description="How chat messages become a prompt, in Python's str.format."
    )

    @classmethod
    def of(cls, card: ModelCard, template: str | None) -> Self:
        """What is known of a model; its own chat template holds where no other is given."""
        return cls(
            tokenizer_class=card.tokenizer,
            vocabulary_size=card.vocabulary,
            eos_token=None,
            bos_token=None,
            pad_token=None,
            chat_template=card.chat_template if template is None else template,
        )
