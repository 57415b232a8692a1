"""Bodies of requests and answers as they travel: the only home of OpenAI's field names."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

MODEL_LIMIT = 255
"""Characters of the longest model name that is looked up."""


class Request(BaseModel):
    """What holds for all bodies of requests: types are exact, and no field is passed over."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Answer(BaseModel):
    """What holds for all bodies of answers: every field is there, also in the document."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_mode_override="serialization",
        json_schema_serialization_defaults_required=True,
    )


def example(value: dict[str, Any]) -> ConfigDict:
    """An example of a body, for the document."""
    return ConfigDict(json_schema_extra={"examples": [value]})


def unsupported(reason: str) -> Any:
    """A published field that may be left out, or say that nothing is wanted of it."""
    return Field(default=None, description=f"Not supported: {reason}")


def _refuse_true(value: bool) -> bool:
    if value:
        raise PydanticCustomError(
            "false_required", "this service does not support it, leave it out"
        )
    return value


# Not Literal[False], which takes 0 for it.
Off = Annotated[
    bool, AfterValidator(_refuse_true), WithJsonSchema({"type": "boolean", "const": False})
]
"""A published switch that cannot be turned on."""


def fingerprint_of(fingerprint: str, precision: str) -> str:
    """A model's fingerprint and the arithmetic, as OpenAI's `system_fingerprint`."""
    return f"fp_{fingerprint[:16]}_{precision}"
