"""What a request can be refused with: one shape, from the engine process to the client.

A `Problem` is the body of an answer that is an error, and a `RequestError` carries one through the
code. Each has an HTTP status, OpenAI's error type and code, a sentence that names the field, the
value and the remedy, and, where waiting helps, how long.

    400  invalid_request_error   a field is wrong: correct the request
    401  authentication_error    no API key, or an unknown one
    404  not_found_error         no such model or route
    405, 408, 413, 415           the request as HTTP
    429  rate_limit_error        the key is over its budget: wait
    500  server_error            a defect or a damaged model: the same request fails again
    503  overloaded_error        full, draining or restarting: wait

Nothing here knows HTTP or Flask, and no text of an unforeseen exception ever becomes a message.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

TOLD = 8
"""Most problems of one request that are told."""

ErrorType = Literal[
    "invalid_request_error",
    "authentication_error",
    "not_found_error",
    "rate_limit_error",
    "server_error",
    "overloaded_error",
]


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """Why a request is not answered as it was meant."""

    status: int
    type: ErrorType
    code: str | None
    message: str
    param: str | None = None
    """The field that is wrong."""
    retry_after: float | None = None
    """Seconds after which the same request may succeed."""

    @property
    def recurs(self) -> bool:
        """Whether asking for the same again costs as much and ends alike, though clients that go by
        the status alone would.
        """
        return self.status in (500, 501) or self.code == "deadline"


class RequestError(Exception):
    """A request that is refused or fails; `problem` is what its sender gets to see."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        super().__init__(problem.message)


def invalid(message: str, param: str | None = None, code: str | None = None) -> RequestError:
    """A request that no waiting mends."""
    return RequestError(
        Problem(status=400, type="invalid_request_error", code=code, message=message, param=param)
    )


def invalid_all(problems: Sequence[tuple[str, str]], *, untold: int = 0) -> RequestError:
    """A request with several problems, each a field ("" is the whole body) and a sentence.

    No more than `TOLD` are told; `untold` counts those that not even have a sentence.
    """
    sentences = [sentence for _, sentence in problems[:TOLD]]
    untold += len(problems) - len(sentences)
    if untold > 0:
        sentences.append(f"There are {untold} more problems.")
    field = problems[0][0]
    return invalid(" ".join(sentences), None if field == "" else field)


def renamed(problem: Problem, names: Mapping[str, str]) -> Problem:
    """The same problem, with the name that its sender knows the field by where that is another."""
    if problem.param is None or problem.param not in names:
        return problem
    name = names[problem.param]
    # Sentences begin with the field's name, as far as they can.
    rest = problem.message.removeprefix(problem.param)
    message = problem.message if rest == problem.message else name + rest
    return msgspec.structs.replace(problem, param=name, message=message)


def unknown_model(name: str) -> RequestError:
    """A model that is not served."""
    return RequestError(
        Problem(
            status=404,
            type="not_found_error",
            code="model_not_found",
            message=f"The model {name!r} is not served here; GET /v1/models lists those that are.",
            param="model",
        )
    )


def over_budget(message: str, retry_after: float) -> RequestError:
    """A key that has used up what it may use in a minute."""
    return RequestError(
        Problem(
            status=429,
            type="rate_limit_error",
            code="rate_limit_exceeded",
            message=message,
            retry_after=retry_after,
        )
    )


def unavailable(message: str, *, code: str, retry_after: float = 1.0) -> RequestError:
    """A service that is full, draining or restarting."""
    return RequestError(
        Problem(
            status=503,
            type="overloaded_error",
            code=code,
            message=message,
            retry_after=retry_after,
        )
    )


def failed(message: str, code: str = "internal_error") -> RequestError:
    """A defect or a damaged model; asking again does not help."""
    return RequestError(Problem(status=500, type="server_error", code=code, message=message))
