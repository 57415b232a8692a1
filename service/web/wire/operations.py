"""The bodies of the routes for who runs the service."""

from typing import Literal

from pydantic import Field

from service.web.wire import Answer, example


class Health(Answer):
    """All is well; whatever is not comes as an error."""

    model_config = example({"status": "ok"})

    status: Literal["ok"] = Field(description="That it is.")
