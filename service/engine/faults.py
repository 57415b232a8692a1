"""What a failure inside the engine process is told as: never an unforeseen exception's own text."""

import logging

from charloom.errors import (
    CharloomError,
    ClosedError,
    DecodingError,
    ModelError,
    OptionError,
    UnknownTextError,
)
from charloom.tokenizer.base import ON_THE_COMMAND_LINE
from service.errors import RequestError, failed, invalid, unavailable

_log = logging.getLogger("charloom.engine")


def explain(error: BaseException, *, param: str | None = None) -> RequestError:
    """The refusal that an error comes to; `param` is the field it would be about.

    What is no fault of the request is logged with its traceback.
    """
    if isinstance(error, RequestError):
        return error
    if isinstance(error, OptionError | UnknownTextError):
        return invalid(worded(error), param=param)
    if isinstance(error, ClosedError):
        return unavailable("The model is being unloaded; send the request again.", code="unloading")
    _log.error("A request has failed.", exc_info=error)
    if isinstance(error, DecodingError):  # its text quotes whatever the runtime said
        return failed(
            "The network's step failed and took the text with it; the service's log says more.",
            code="decoding_failed",
        )
    if isinstance(error, ModelError):
        return failed(str(error), code="model_damaged")
    if isinstance(error, CharloomError):
        return failed(str(error))
    return failed("The engine failed on this request; the service's log says more.")


def worded(error: OptionError | UnknownTextError) -> str:
    """The sentence about what cannot be used, without what helps on a command line alone."""
    return str(error).replace(ON_THE_COMMAND_LINE, "")
