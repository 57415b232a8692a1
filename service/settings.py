"""The service's settings: the only place that reads `CHARLOOM_*` from the environment.

Each field is one setting, told once: its name in the environment is `CHARLOOM_` and the field's in
capitals, its default is safe on a laptop and bounded everywhere, its description is what the docs
and `charloom serve --help` say. All that is wrong is reported together, in sentences; what is only
doubtful, such as a misspelt name or an open door, is for `remarks`.
"""

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from string import Formatter
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from charloom.errors import OptionError
from charloom.params import THREADS_LIMIT, Precision

PREFIX = "CHARLOOM_"

FOREIGN = frozenset({"CHARLOOM_CACHE"})
"""Names of this prefix that others read: training's cache folder."""

VALUE_SHOWN = 80
"""Characters of a wrong value that its sentence shows."""

_ORIGIN = re.compile(r"\*|https?://(\[[0-9a-f:.]+\]|[\w.-]+)(:\d+)?", re.IGNORECASE | re.ASCII)

_HOST = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?", re.ASCII)

_BRACKETED = re.compile(r"\[[0-9a-f.]*:", re.IGNORECASE)
"""How an address of IPv6 begins, as in a URL."""

_STORAGE = re.compile(r"memory://|redis(s|\+unix|\+cluster|\+sentinel)?://.+")


def _split(value: object) -> object:
    """The list that a variable stands for: JSON where it begins with a bracket, else by commas."""
    if not isinstance(value, str):
        return value
    if not value.lstrip().startswith("[") or _BRACKETED.match(value.lstrip()):
        return [part.strip() for part in value.split(",") if part.strip()]
    try:
        return json.loads(value)
    except ValueError:
        raise ValueError("close the JSON list, or separate its parts by commas alone") from None


def _check_origin(origin: str) -> str:
    """An origin as browsers send it: flask-cors would take anything else for a pattern."""
    if not _ORIGIN.fullmatch(origin):
        raise ValueError("give an origin such as https://example.com:8443, without a path, or *")
    return origin


def _check_host(host: str) -> str:
    """A name as the header Host has it, in one spelling: without the port, whatever that is."""
    name = host.lower()
    if _HOST.fullmatch(name):
        return name
    try:
        return str(IPv6Address(name.removeprefix("[").removesuffix("]")))
    except ValueError:
        raise ValueError(
            "give a name or an address, such as text.example, without scheme, port or path"
        ) from None


def _check_storage(uri: str) -> str:
    """An address that the `limits` library knows, of those that are installed with the service."""
    if not _STORAGE.fullmatch(uri):
        raise ValueError("give memory:// or an address such as redis://HOST:PORT")
    if uri.startswith("redis") and find_spec("redis") is None:
        raise ValueError("install what it takes to ask Redis: pip install 'charloom[redis]'")
    return uri


def check_template(template: str | None) -> str | None:
    """A template of the two names alone: `str.format` would also read attributes of values."""
    if template is not None:
        try:
            parts = [part[1:] for part in Formatter().parse(template) if part[1] is not None]
        except ValueError:
            raise ValueError("double each brace that stands for itself: {{ and }}") from None
        if not {("content", "", None)} <= set(parts) <= {("content", "", None), ("role", "", None)}:
            raise ValueError("name {content} in it, {role} if you like, and nothing else")
    return template


Texts = Annotated[list[str], NoDecode, BeforeValidator(_split)]
"""A list that is written with commas or as JSON; pydantic-settings alone takes JSON only."""

Host = Annotated[str, AfterValidator(_check_host)]

Origin = Annotated[str, AfterValidator(_check_origin)]


class Settings(BaseSettings):
    """All settings of HTTP workers, engine process and their supervisor."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, extra="ignore", frozen=True, env_ignore_empty=True
    )

    # Where
    models: Path = Field(Path("models"), description="Folder whose models are served.")
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 is every one.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    socket: Path | None = Field(
        None,
        description="Unix socket between HTTP workers and engine; by default one of the user's "
        "own, named after the other settings.",
    )

    # Processes
    workers: int = Field(1, ge=1, le=64, description="HTTP worker processes; they share one batch.")
    threads: int | None = Field(
        None,
        ge=1,
        le=THREADS_LIMIT,
        description="Processor threads of the engine's step; by default one less than there are "
        "processors.",
    )
    drain: float = Field(
        30.0, gt=0, le=3600, description="Seconds that running requests get at a shutdown."
    )

    # Models
    preload: Texts = Field(
        [],
        description="Models to load at the start, separated by commas; others are loaded when "
        "they are first asked for. Where just one model is there, it is loaded at the start.",
    )
    model_memory: int = Field(
        1 << 30,
        gt=0,
        description="Bytes of loaded models; beyond it the one least recently used is unloaded.",
    )
    cache_memory: int = Field(
        64 << 20, ge=0, description="Bytes of hidden states kept of each model's prompts."
    )
    precision: Precision = Field(
        "auto", description="Arithmetic of requests that do not ask for one."
    )
    chat_template: Annotated[str | None, AfterValidator(check_template)] = Field(
        None,
        description="How chat messages become a prompt, by Python's str.format with {role} and "
        "{content} for each message; by default the model's own, else '{content}' and a newline.",
    )

    # How much at once
    rows: int = Field(
        64, ge=1, le=4096, description="Texts of one model that are written at the same time."
    )
    queue: int = Field(
        128, ge=0, le=4096, description="Requests that may wait; further ones are refused."
    )
    work: int = Field(
        1_000_000,
        gt=0,
        description="Tokens that one request may cost: prompt tokens, and prompts x choices x "
        "max_tokens.",
    )
    timeout: float = Field(
        600.0, gt=0, le=86400, description="Seconds from a request's admission to its deadline."
    )
    logprobs: int = Field(
        20, ge=0, le=1_000_000, description="Most alternatives that `logprobs` may ask for."
    )

    # Streams
    stream_interval: float = Field(
        0.025,
        ge=0,
        le=60,
        description="Seconds between two events of a stream; its first character comes at once.",
    )
    heartbeat: float = Field(
        10.0, gt=0, le=600, description="Seconds of silence after which a stream sends a comment."
    )

    # Clients
    body_limit: int = Field(4 << 20, gt=0, description="Bytes of the largest request body.")
    json_depth: int = Field(16, ge=1, le=500, description="Deepest nesting in a request body.")
    receive_timeout: float = Field(
        20.0, gt=0, le=3600, description="Seconds in which a whole request must have arrived."
    )
    send_timeout: float = Field(
        20.0,
        gt=0,
        le=3600,
        description="Seconds after which a client that takes nothing is cut off.",
    )
    proxies: int = Field(
        0,
        ge=0,
        le=16,
        description="Trusted proxies in front, whose X-Forwarded-For and -Proto are believed.",
    )

    # Access
    keys: str | None = Field(
        None,
        repr=False,
        description="API keys, as NAME=KEY separated by commas; without keys everybody may ask. "
        "A key may be given as sha256:HEX of itself.",
    )
    keys_file: Path | None = Field(
        None,
        description="File of API keys, NAME=KEY one a line; read again when it changes.",
    )
    hosts: Annotated[list[Host], NoDecode, BeforeValidator(_split)] = Field(
        [],
        description="Names that a request's Host may have, without ports, separated by commas; by "
        "default any, but without keys on a loopback address only this machine's own, so that no "
        "page in a browser gets at it under a name of its own. With keys this machine's own names "
        "count too; probes answer by any.",
    )
    requests_per_minute: int = Field(
        0, ge=0, description="Requests that a key (else an address) may send in a minute; 0: any."
    )
    tokens_per_minute: int = Field(
        0,
        ge=0,
        description="Tokens that a key (else an address) may ask for in a minute, read and "
        "written; 0: any.",
    )
    limits_storage: Annotated[str, AfterValidator(_check_storage)] = Field(
        "memory://",
        repr=False,  # it may hold a password
        description="Where these are counted: memory://, or redis://HOST:PORT for several hosts.",
    )
    cors_origins: Annotated[list[Origin], NoDecode, BeforeValidator(_split)] = Field(
        [],
        description="Origins whose pages may ask, separated by commas, or * for all; none by "
        "default.",
    )
    public_metrics: bool = Field(
        False, description="Whether /metrics needs no key where there are keys."
    )

    # What is written down
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severity of the lines on standard error."
    )
    log_format: Literal["text", "json"] = Field("text", description="Form of these lines.")
    log_prompts: bool = Field(
        False, description="Whether prompts are written to the log, cut at 200 characters."
    )

    @property
    def is_open(self) -> bool:
        """Whether everybody may ask, as there are no keys."""
        return self.keys is None and self.keys_file is None

    @property
    def is_local(self) -> bool:
        """Whether only this machine can ask, as it listens on a loopback address."""
        return _is_loopback(self.host)


class Problems:
    """What is wrong with settings that can be read, found by several checks and told together."""

    def __init__(self) -> None:
        self._found: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._found)

    @contextmanager
    def gather(self) -> Iterator[None]:
        """Keep what a check's `OptionError` says, for `tell`."""
        try:
            yield
        except OptionError as error:
            self._found.update(dict.fromkeys(error.problems))

    def tell(self) -> None:
        """Raise `OptionError` with all that was found, each sentence once, if anything was."""
        if self._found:
            raise OptionError([*self._found])


def read(options: Mapping[str, Any] | None = None) -> Settings:
    """The settings of this process's environment; `options` of the command line go before it.

    Raises `OptionError` with a sentence for each value that is wrong.
    """
    given = {} if options is None else dict(options)
    try:
        return Settings(**given)
    except ValidationError as error:
        raise OptionError([_explain(part, given) for part in error.errors()]) from None


def remarks(
    settings: Settings,
    environment: Mapping[str, str] = os.environ,
    *,
    addresses: Sequence[str] | None = None,
) -> list[str]:
    """Sentences about what is allowed and probably not meant.

    `addresses` are those that are listened on where they are not the settings' own.
    """
    known = {name.upper() for name in Settings.model_fields}
    found = []
    for name in sorted(environment):
        bare = name.removeprefix(PREFIX)
        if bare != name and bare not in known and name not in FOREIGN:
            near = difflib.get_close_matches(bare, known, n=1)
            hint = f"; did you mean {PREFIX}{near[0]}?" if near else "."
            found.append(f"{name} is set, but there is no such setting{hint}")
    reached = [settings.host] if addresses is None else addresses
    public = [address for address in reached if not _is_loopback(address)]
    if settings.is_open and public:
        found.append(
            f"Everybody who can reach {public[0]} may use this service: set CHARLOOM_KEYS or "
            "CHARLOOM_KEYS_FILE, or listen on 127.0.0.1."
        )
    if settings.public_metrics and settings.is_open:
        found.append("CHARLOOM_PUBLIC_METRICS has no effect: there are no keys.")
    if "limits_storage" in settings.model_fields_set and not (
        settings.requests_per_minute or settings.tokens_per_minute
    ):
        found.append(
            "CHARLOOM_LIMITS_STORAGE has no effect: set CHARLOOM_REQUESTS_PER_MINUTE or "
            "CHARLOOM_TOKENS_PER_MINUTE."
        )
    return found


def variable(name: str) -> str:
    """The environment variable of a field."""
    return PREFIX + name.upper()


def default_of(field: FieldInfo) -> str:
    """How a field's default is written in the environment; empty where it is not set."""
    value = field.default
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None or value == [] else f"{value}"


def _is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _explain(part: ErrorDetails, options: Mapping[str, Any]) -> str:
    """One problem as a sentence that names the setting, its value and what it may be."""
    name, *rest = part["loc"]
    field = Settings.model_fields[str(name)]
    label = f"--{name}" if name in options else variable(str(name))
    shown = repr(part["input"])
    if len(shown) > VALUE_SHOWN:
        shown = shown[:VALUE_SHOWN] + "..."
    said = f"{'holds' if rest else 'is'} {shown}" if field.repr else "is not valid"
    remedy = str(part["ctx"]["error"]) if part["type"] == "value_error" else _remedy(field)
    return f"{label} {said}; {remedy}."


def _remedy(field: FieldInfo) -> str:
    """What to give, from the field's type and bounds."""
    kind: Any = field.annotation
    if get_origin(kind) is UnionType:
        (kind,) = (part for part in get_args(kind) if part is not NoneType)
    if get_origin(kind) is Literal:
        return f"give one of {', '.join(get_args(kind))}"
    words = {int: "a whole number", float: "a number", bool: "true or false"}
    given = f"give {words.get(kind, 'text')}"
    match [bound for bound in field.metadata if isinstance(bound, Ge | Gt | Le)]:
        case [Ge(ge=least), Le(le=most)]:
            return f"{given} from {least} to {most}"
        case [Gt(gt=limit), Le(le=most)]:
            return f"{given} above {limit}, at most {most}"
        case [Ge(ge=least)]:
            return f"{given} of at least {least}"
        case [Gt(gt=limit)]:
            return f"{given} above {limit}"
    return given
