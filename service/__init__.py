"""Serves the models in a folder over HTTP, to every client that speaks OpenAI's API.

    gunicorn 'service:create_app()'

HTTP workers hold no model: they pass texts to one engine process, which all of them share.
Importing this package imports nothing else; the factory does, when it is called.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flask_openapi import OpenAPI


def create_app() -> "OpenAPI":
    """The WSGI application, by the settings in the environment.

    Raises `OptionError` with all that is wrong with them.
    """
    from service.web.app import create_app as create  # heavy, and only a server needs it

    return create()
