"""`charloom serve`: the engine and the HTTP workers, from a few options and the environment.

The engine starts first, in a process of its own, and loads the model while this one imports the
application and forks its workers. Ctrl-C and SIGTERM let running answers end; the engine ends with
the last worker.
"""

import ipaddress
import logging
import os
import socket
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import click

from charloom.cli.context import Context
from charloom.cli.options import given
from charloom.errors import OptionError
from service import settings as environment
from service.errors import RequestError
from service.launch import ensure_engine
from service.settings import Problems, Settings

BACKLOG = 2048
"""Connections that the system keeps until a worker takes them."""

_log = logging.getLogger(__name__)


class _Command(click.Command):
    """A command whose help ends with all settings of the environment."""

    def format_epilog(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a line for each setting."""
        rows = []
        for name, field in Settings.model_fields.items():
            default = environment.default_of(field)
            ending = f"  [default: {default}]" if default else ""
            rows.append((environment.variable(name), f"{field.description}{ending}"))
        with formatter.section("Settings, from the environment"):
            formatter.write_dl(rows)


@click.command(cls=_Command)
@click.option("--host", metavar="ADDRESS", help="Address to listen on; 0.0.0.0 is every one.")
@click.option("--port", metavar="NUMBER", help="Port to listen on; 0 takes a free one.")
@click.option("--workers", metavar="NUMBER", help="HTTP worker processes; they share one engine.")
@click.pass_context
def serve(ctx: click.Context, /, **_options: str | None) -> None:
    """Serve the models over HTTP, to every client that speaks OpenAI's API.

    Options go before the environment.
    """
    options = dict(given(ctx, ["host", "port", "workers"]))
    context = ctx.find_object(Context)
    assert context is not None, "the group has made it"
    if context.is_named:
        options["models"] = context.models
    settings = environment.read(options)
    problems = Problems()
    with ExitStack() as stack:
        with problems.gather():
            names = _models_in(settings.models)
        with problems.gather():
            listener = stack.enter_context(_listen(settings.host, settings.port))
        if not problems:
            with problems.gather():
                _start_engine(settings)
        # The engine starts in the half second that these take; where nothing can start, they tell
        # what else is wrong.
        from service.web import server
        from service.web.app import create_app
        from service.web.context import NAME

        with problems.gather():
            app = create_app(settings)
        problems.tell()
        url = _url(listener)
        known = app.extensions[NAME].access.names
        # The name that a client has to say, where the address itself is none that is gone by.
        name = None if not known or urlsplit(url).hostname in known else settings.hosts[0]
        announce = partial(_announce, settings, url, name, names)
        server.run(app, settings, listener, announce)


def _start_engine(settings: Settings) -> None:
    """See to it that an engine listens; ends the command where none can be started."""
    try:
        ensure_engine(settings)
    except RequestError as error:
        click.echo(error.problem.message, err=True)
        raise click.exceptions.Exit(1) from error


def _announce(settings: Settings, url: str, name: str | None, names: list[str]) -> None:
    """Say where the service is, and how to ask it."""
    place = url if name is None else f"{url} for those who ask by the name {name}"
    if settings.log_format == "json":
        _log.info("Serving %s at %s.", settings.models, place)
        return
    click.echo(f"Serving {settings.models} at {place}; Ctrl-C ends it.", err=True)
    if not names:
        click.echo("There is no model yet; it is served once training has written it.", err=True)
        return
    headers = "" if settings.is_open else "-H 'Authorization: Bearer KEY' "
    if name is not None:
        headers += f"-H 'Host: {f'[{name}]' if ':' in name else name}' "
    body = f'{{"model": "{names[0]}", "prompt": "", "max_tokens": 100}}'
    click.echo(
        f"\n  curl {url}/v1/completions {headers}-H 'Content-Type: application/json' -d '{body}'\n",
        err=True,
    )


def _models_in(folder: Path) -> list[str]:
    """The names of what may be models; raises `OptionError` where the folder cannot be read."""
    try:
        return sorted(
            path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != "."
        )
    except OSError as error:
        raise OptionError(
            [
                f"The models folder {folder} cannot be read ({error.strerror}); train a model, or "
                "name another folder with --models or CHARLOOM_MODELS."
            ]
        ) from error


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; raises `OptionError` where it cannot."""
    try:
        (family, _, _, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        return socket.create_server(
            address[:2],
            family=family,
            backlog=BACKLOG,
            dualstack_ipv6=family == socket.AF_INET6 and address[0] == "::",
        )
    except socket.gaierror as error:
        raise OptionError(
            [f"The host {host!r} is no address ({error.strerror}); give one, such as 127.0.0.1."]
        ) from error
    except OSError as error:
        # Its own text names the address once more.
        reason = error.strerror if error.errno is None else os.strerror(error.errno)
        raise OptionError(
            [
                f"Nothing can listen on port {port} of {host} ({reason}); give another --port, "
                "such as 0 for a free one, or another --host."
            ]
        ) from error


def _url(listener: socket.socket) -> str:
    """The address for a client on this machine."""
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "::1" if listener.family == socket.AF_INET6 else "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
