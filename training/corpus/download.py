"""Text from http(s) addresses and standard input, brought to a file that can be read twice.

What an address gives is kept in the cache with the validators that the server sent (ETag,
Last-Modified), and asked for again only in case it has changed; a server that sends none is read
anew each time. A body shorter than announced, an error status, silence for `TIMEOUT` seconds and
more than `MAXIMUM_BYTES` are errors, and leave what was kept before as it was.
"""

import http.client
import json
import os
import string
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from email.message import Message
from pathlib import Path
from typing import IO
from urllib.parse import quote, urlsplit

from charloom.errors import CorpusError
from training.corpus import text

TIMEOUT = 60.0
_VALIDATORS = {"ETag": "If-None-Match", "Last-Modified": "If-Modified-Since"}


def shown_address(address: str) -> str:
    """The address without name, password, query and fragment, which may hold secrets."""
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def spool(stream: IO[bytes], path: Path, *, name: str) -> None:
    """Write all that comes from standard input or a pipe to a file."""

    def chunks() -> Iterator[bytes]:
        try:
            while data := stream.read(text.CHUNK_BYTES):
                yield data
        except OSError as error:
            raise text.unreadable(name, error) from error

    _write(chunks(), path, name)


def download(
    address: str, body: Path, *, report: Callable[[str], None], timeout: float = TIMEOUT
) -> None:
    """Make the file `body` hold what the address gives; its validators stand beside it.

    Raises `CorpusError` when the address gives nothing, too little or too much.
    """
    name = shown_address(address)
    notes, partial = body.with_suffix(".json"), body.with_suffix(".partial")
    headers = {"User-Agent": "charloom", **(_conditions(notes) if body.is_file() else {})}
    try:
        # Letters beyond ASCII and blanks, as copied from a browser, travel escaped.
        request = urllib.request.Request(quote(address, safe=string.punctuation), headers=headers)
        with urllib.request.urlopen(request, timeout=timeout) as response:
            if response.headers.get_content_type() == "text/html":
                report(f"{name} gives a web page, not plain text; its HTML is learnt as it is.")
            _write(_body(response, name, timeout), partial, name)
            # Without its notes a body counts as unknown, so this order survives being cut off.
            notes.unlink(missing_ok=True)
            partial.replace(body)
            notes.write_text(json.dumps(_validators(response.headers)), encoding="utf-8")
    except urllib.error.HTTPError as error:
        with error:
            if error.code == http.HTTPStatus.NOT_MODIFIED:
                return
            raise CorpusError(
                f"{name} answers {error.code} {error.reason}; check the address."
            ) from error
    except urllib.error.URLError as error:
        raise _unreached(name, error.reason, timeout) from error
    except (http.client.InvalidURL, UnicodeError, ValueError) as error:
        raise CorpusError(f"{name} is not an address that can be asked ({error}).") from error
    except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
        raise _unreached(name, error, timeout) from error
    finally:
        partial.unlink(missing_ok=True)


def _unreached(name: str, reason: object, timeout: float) -> CorpusError:
    if isinstance(reason, TimeoutError):
        return CorpusError(
            f"{name} was silent for {timeout:g} seconds; try again, or download it yourself and "
            "give the file."
        )
    return CorpusError(
        f"{name} cannot be downloaded ({reason}); check the address and the network, or download "
        "it yourself and give the file."
    )


def _conditions(notes: Path) -> dict[str, str]:
    try:
        kept = json.loads(notes.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return {_VALIDATORS[header]: value for header, value in kept.items() if header in _VALIDATORS}


def _validators(headers: Message) -> dict[str, str]:
    return {header: headers[header] for header in _VALIDATORS if headers[header] is not None}


def _body(response: http.client.HTTPResponse, name: str, timeout: float) -> Iterator[bytes]:
    announced = response.length  # counts down while it is read
    received = 0
    while True:
        try:
            data = response.read(text.CHUNK_BYTES)
        except http.client.IncompleteRead as error:
            received += len(error.partial)
            raise _cut_off(name, received, announced) from error
        except (OSError, http.client.HTTPException) as error:
            raise _unreached(name, error, timeout) from error
        if not data:
            break
        received += len(data)
        yield data
    if announced is not None and received != announced:
        raise _cut_off(name, received, announced)


def _cut_off(name: str, received: int, announced: int | None) -> CorpusError:
    promised = "its end" if announced is None else f"the {announced:,} bytes announced"
    return CorpusError(
        f"{name} broke off after {received:,} bytes, before {promised}; try again, or download it "
        "yourself and give the file."
    )


def _write(chunks: Iterator[bytes], path: Path, name: str) -> None:
    total = 0
    with path.open("wb") as out:
        for data in chunks:
            total += len(data)
            if total > text.MAXIMUM_BYTES:
                raise CorpusError(
                    f"{name} gives more than {text.MAXIMUM_BYTES:,} bytes; if that is meant, save "
                    "them to a file and give the file, which has no bound."
                )
            out.write(data)
        out.flush()
        os.fsync(out.fileno())
