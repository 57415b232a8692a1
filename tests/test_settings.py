import json
import sys
from pathlib import Path

import pytest

from charloom.errors import OptionError
from service.settings import Settings, read, remarks, variable


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin with no setting in the environment."""
    for name in Settings.model_fields:
        monkeypatch.delenv(variable(name), raising=False)


def problems(monkeypatch: pytest.MonkeyPatch, **values: str) -> tuple[str, ...]:
    """What is said of an environment that holds these values."""
    for name, value in values.items():
        monkeypatch.setenv(variable(name), value)
    with pytest.raises(OptionError) as caught:
        read()
    return caught.value.problems


# Values


def test_defaults_are_safe() -> None:
    """Without any setting only this machine can ask, and everything is bounded."""
    settings = read()
    assert settings.host == "127.0.0.1"
    assert settings.cors_origins == []
    assert remarks(settings, {}) == []
    bounds = ("rows", "queue", "work", "timeout", "body_limit", "json_depth", "model_memory")
    assert all(getattr(settings, name) > 0 for name in bounds)


def test_the_environment_sets_each_kind_of_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers, switches, paths and words are read from text."""
    monkeypatch.setenv("CHARLOOM_PORT", "0")
    monkeypatch.setenv("CHARLOOM_DRAIN", "0.5")
    monkeypatch.setenv("CHARLOOM_LOG_PROMPTS", "true")
    monkeypatch.setenv("CHARLOOM_MODELS", "/srv/models")
    monkeypatch.setenv("CHARLOOM_LOG_FORMAT", "json")
    settings = read()
    assert (settings.port, settings.drain, settings.log_prompts) == (0, 0.5, True)
    assert (settings.models, settings.log_format) == (Path("/srv/models"), "json")


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose files pass on variables that nobody has set as empty ones."""
    monkeypatch.setenv("CHARLOOM_PORT", "")
    monkeypatch.setenv("CHARLOOM_KEYS", "")
    assert read() == Settings()


@pytest.mark.parametrize("value", ["a,b", " a , b ,", '["a", "b"]', ' ["a","b"]'])
def test_a_list_is_written_with_commas_or_as_json(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    """Both forms mean the same."""
    monkeypatch.setenv("CHARLOOM_PRELOAD", value)
    assert read().preload == ["a", "b"]


def test_options_go_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given to `read` counts, as text or as a value, and the rest stays."""
    monkeypatch.setenv("CHARLOOM_PORT", "1234")
    monkeypatch.setenv("CHARLOOM_ROWS", "3")
    settings = read({"port": "4321", "models": Path("elsewhere")})
    assert (settings.port, settings.models, settings.rows) == (4321, Path("elsewhere"), 3)


@pytest.mark.parametrize(
    "origin", ["http://localhost:3000", "https://example.com", "http://[::1]:80", "*"]
)
def test_origins_are_those_that_browsers_send(monkeypatch: pytest.MonkeyPatch, origin: str) -> None:
    """Scheme, host and port are an origin."""
    monkeypatch.setenv("CHARLOOM_CORS_ORIGINS", origin)
    assert read().cors_origins == [origin]


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("Text.example", "text.example"),
        ("my_host", "my_host"),
        ("192.0.2.1", "192.0.2.1"),
        ("[::1]", "::1"),
        ("2001:DB8:0::1", "2001:db8::1"),
    ],
)
def test_hosts_are_names_and_addresses(
    monkeypatch: pytest.MonkeyPatch, host: str, name: str
) -> None:
    """Each in the one spelling that a request's Host is compared in."""
    monkeypatch.setenv("CHARLOOM_HOSTS", host)
    assert read().hosts == [name]


@pytest.mark.parametrize(
    "host",
    [
        "myhost:8105",
        "[::1]:8000",
        "*.example.com",
        "*",
        "http://x/",
        "x/y",
        "a b",
        "bücher.example",
    ],
)
def test_hosts_that_no_request_can_have_are_refused(
    monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    """What is written with a port, a scheme, a path or a pattern would match nothing."""
    assert problems(monkeypatch, hosts=json.dumps([host])) == (
        f"CHARLOOM_HOSTS holds {host!r}; give a name or an address, such as text.example, without "
        "scheme, port or path.",
    )


@pytest.mark.parametrize(
    "uri", ["memory://", "redis://host:6379/0", "rediss://u:p@host", "redis+sentinel://a:1,b:2/m"]
)
def test_limits_are_counted_in_memory_or_redis(monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    """These addresses of a storage are taken."""
    monkeypatch.setenv("CHARLOOM_LIMITS_STORAGE", uri)
    assert read().limits_storage == uri


@pytest.mark.parametrize("uri", ["rediss+cluster://host", "redis://", "postgres://host"])
def test_no_other_storage_is_taken(monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    """What `limits` has no storage for ends the start, not the engine."""
    (problem,) = problems(monkeypatch, limits_storage=uri)
    assert "redis://HOST:PORT" in problem


def test_redis_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address of Redis without the package that asks it is a sentence with the remedy."""
    monkeypatch.setitem(sys.modules, "redis", None)
    (problem,) = problems(monkeypatch, limits_storage="redis://host")
    assert "charloom[redis]" in problem


@pytest.mark.parametrize("template", ["{content}", "{role}: {content}\n", "{{{content}}}"])
def test_a_chat_template_names_the_content(monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    """Role and content may stand anywhere in a template."""
    monkeypatch.setenv("CHARLOOM_CHAT_TEMPLATE", template)
    assert read().chat_template == template


# Problems


def test_all_that_is_wrong_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each wrong value has a sentence that names the variable, the value and what it may be."""
    assert problems(
        monkeypatch,
        port="80a",
        workers="65",
        drain="0",
        work="-1",
        model_memory="many",
        cache_memory="-1",
        precision="int4",
        log_prompts="maybe",
        heartbeat="nan",
        preload='["a"',
    ) == (
        "CHARLOOM_PORT is '80a'; give a whole number from 0 to 65535.",
        "CHARLOOM_WORKERS is '65'; give a whole number from 1 to 64.",
        "CHARLOOM_DRAIN is '0'; give a number above 0, at most 3600.",
        "CHARLOOM_PRELOAD is '[\"a\"'; close the JSON list, or separate its parts by commas alone.",
        "CHARLOOM_MODEL_MEMORY is 'many'; give a whole number above 0.",
        "CHARLOOM_CACHE_MEMORY is '-1'; give a whole number of at least 0.",
        "CHARLOOM_PRECISION is 'int4'; give one of auto, int8, float32.",
        "CHARLOOM_WORK is '-1'; give a whole number above 0.",
        "CHARLOOM_HEARTBEAT is 'nan'; give a number above 0, at most 600.",
        "CHARLOOM_LOG_PROMPTS is 'maybe'; give true or false.",
    )


def test_a_wrong_part_of_a_list_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the whole list is shown, only what is wrong in it."""
    assert problems(
        monkeypatch, preload='["a", 1]', cors_origins="https://a.example,https://b.example/x"
    ) == (
        "CHARLOOM_PRELOAD holds 1; give text.",
        "CHARLOOM_CORS_ORIGINS holds 'https://b.example/x'; give an origin such as "
        "https://example.com:8443, without a path, or *.",
    )


@pytest.mark.parametrize(
    "template",
    ["no field", "{role}", "{content.__class__}", "{content!r}", "{0}", "{content:{role}}"],
)
def test_a_chat_template_of_anything_else_is_refused(
    monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    """A template cannot reach beyond the two names."""
    (problem,) = problems(monkeypatch, chat_template=template)
    assert problem.endswith("name {content} in it, {role} if you like, and nothing else.")


def test_a_brace_that_stands_alone_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence tells how to write one."""
    (problem,) = problems(monkeypatch, chat_template="{content} {")
    assert problem.endswith("double each brace that stands for itself: {{ and }}.")


def test_an_option_is_named_as_it_was_given() -> None:
    """Who typed --port is not told of an environment variable."""
    with pytest.raises(OptionError) as caught:
        read({"port": "x"})
    assert caught.value.problems == ("--port is 'x'; give a whole number from 0 to 65535.",)


def test_secrets_are_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a problem nor the settings' own form tells keys or passwords."""
    assert problems(monkeypatch, limits_storage="mysql://me:sesame@host") == (
        "CHARLOOM_LIMITS_STORAGE is not valid; give memory:// or an address such as "
        "redis://HOST:PORT.",
    )
    settings = Settings(keys="me=sesame", limits_storage="redis://me:sesame@host")
    assert "sesame" not in repr(settings)
    assert "sesame" not in str(settings)


def test_a_long_value_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sentence stays one."""
    (problem,) = problems(monkeypatch, port="9" * 5000)
    assert len(problem) < 200


# Remarks


def test_a_misspelt_name_is_remarked() -> None:
    """A variable of the prefix that is no setting is named, with the nearest that is."""
    environment = {
        "CHARLOOM_PROT": "80",
        "CHARLOOM_XYZZY": "1",
        "CHARLOOM_CACHE": "/tmp",
        "PORT": "1",
    }
    assert remarks(Settings(), environment) == [
        "CHARLOOM_PROT is set, but there is no such setting; did you mean CHARLOOM_PORT?",
        "CHARLOOM_XYZZY is set, but there is no such setting.",
    ]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.com"])
def test_an_open_door_is_remarked(host: str) -> None:
    """Listening beyond this machine without keys is said."""
    (remark,) = remarks(Settings(host=host), {})
    assert remark.startswith(f"Everybody who can reach {host} may use this service")
    assert remarks(Settings(host=host, keys="me=0123456789abcdef"), {}) == []
    assert remarks(Settings(host=host, keys_file=Path("keys")), {}) == []


def test_the_address_that_is_listened_on_counts() -> None:
    """Where gunicorn's command line says another than the settings, it decides."""
    (remark,) = remarks(Settings(), {}, addresses=["127.0.0.1", "192.168.1.2"])
    assert remark.startswith("Everybody who can reach 192.168.1.2 may use this service")
    assert remarks(Settings(host="0.0.0.0"), {}, addresses=["127.0.0.1"]) == []
    assert remarks(Settings(host="0.0.0.0"), {}, addresses=[]) == []


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_this_machine_alone_is_no_open_door(host: str) -> None:
    """Loopback addresses need no keys."""
    assert remarks(Settings(host=host), {}) == []


def test_a_setting_without_effect_is_remarked() -> None:
    """What another setting would have to switch on is said."""
    assert remarks(Settings(public_metrics=True, limits_storage="redis://host"), {}) == [
        "CHARLOOM_PUBLIC_METRICS has no effect: there are no keys.",
        "CHARLOOM_LIMITS_STORAGE has no effect: set CHARLOOM_REQUESTS_PER_MINUTE or "
        "CHARLOOM_TOKENS_PER_MINUTE.",
    ]
    assert remarks(Settings(limits_storage="redis://host", tokens_per_minute=9), {}) == []
