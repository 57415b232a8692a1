"""The one body that every error has, on every route, status and stream: OpenAI's envelope.

{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}
"""

from typing import Any

from pydantic import Field

from service.errors import ErrorType, Problem
from service.web.wire import Answer


class Error(Answer):
    """What went wrong."""

    message: str = Field(description="A sentence that names the field, its value and the remedy.")
    type: ErrorType = Field(description="What kind of error this is.")
    param: str | None = Field(description="The field that is wrong.")
    code: str | None = Field(description="Names this very error.")


class ErrorBody(Answer):
    """The body of an answer that is an error."""

    error: Error


def envelope(problem: Problem) -> dict[str, Any]:
    """A problem as it travels."""
    return {
        "error": {
            "message": problem.message,
            "type": problem.type,
            "param": problem.param,
            "code": problem.code,
        }
    }
