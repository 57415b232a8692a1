import runpy
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.errors import unavailable
from service.messages import AskMetrics, AskStatus, Status, Text
from service.settings import Settings
from service.web import drain
from service.web.app import create_app

SCRIPTED = runpy.run_path(str(Path(__file__).parent / "scripted_link.py"))


@pytest.fixture
def link() -> Any:
    """Give an engine that says what it is told to."""
    return SCRIPTED["ScriptedLink"]()


@pytest.fixture
def client(link: Any) -> Any:
    """Give a client of the service on that engine."""
    return create_app(Settings(), link).test_client()


def status(**changes: Any) -> Any:
    """Give an engine's answer about itself, all well but for the changes."""
    values = {"active": 3, "waiting": 0, "queue": 8, "models": 1, "step_age": 0.01, **changes}
    return lambda _: Status(**values)


def test_a_live_process_is_healthy_whatever_the_engine_does(client: Any, link: Any) -> None:
    """`/healthz` asks nobody, so that a busy engine restarts no HTTP worker."""
    link.fail(unavailable("There is no engine.", code="engine_unavailable"))
    answer = client.get("/healthz")
    assert answer.status_code == 200
    assert answer.get_json() == {"status": "ok"}
    assert link.asked == []


def test_a_service_that_takes_requests_is_ready(client: Any, link: Any) -> None:
    """The engine is asked, with a second's patience."""
    answer = client.get("/readyz")
    assert answer.status_code == 200
    assert answer.get_json() == {"status": "ok"}
    assert link.asked == [AskStatus()]
    assert link.timeouts == [1.0]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"step_age": 5.0}, "engine_stalled"),
        ({"models": 0}, "no_models"),
        ({"can_count": False}, "limits_unavailable"),
        ({"waiting": 8}, "queue_full"),
        ({"waiting": 9}, "queue_full"),
    ],
)
def test_a_service_that_takes_none_says_why(
    client: Any, link: Any, changes: dict[str, Any], code: str
) -> None:
    """Each reason has a code of its own, a sentence, and a time after which to look again."""
    link.answers[AskStatus] = status(**changes)
    answer = client.get("/readyz")
    assert answer.status_code == 503
    error = answer.get_json()["error"]
    assert error["code"] == code
    assert error["type"] == "overloaded_error"
    assert error["message"].endswith(".")
    assert answer.headers["Retry-After"] == "1"


@pytest.mark.parametrize(
    "changes", [{"step_age": 4.99}, {"waiting": 7}, {"queue": 0, "waiting": 0}]
)
def test_a_busy_service_is_ready(client: Any, link: Any, changes: dict[str, Any]) -> None:
    """Up to the bounds all is well, also where no request may wait at all."""
    link.answers[AskStatus] = status(**changes)
    assert client.get("/readyz").status_code == 200


def test_no_engine_is_not_ready(client: Any, link: Any) -> None:
    """An engine that cannot be asked is told as unavailable, whatever the link says."""
    link.fail(unavailable("It starts.", code="engine_unavailable", retry_after=3))
    answer = client.get("/readyz")
    assert answer.status_code == 503
    assert answer.get_json()["error"]["code"] == "engine_unavailable"
    assert "It starts." in answer.get_json()["error"]["message"]


def test_a_worker_that_is_stopping_is_not_ready(client: Any, link: Any) -> None:
    """A draining worker says so without asking the engine, and stays healthy."""
    leaving = {drain.KEY: drain.Drain(deadline=0.0)}
    answer = client.get("/readyz", environ_overrides=leaving)
    assert answer.status_code == 503
    assert answer.get_json()["error"]["code"] == "draining"
    assert link.asked == []
    assert client.get("/healthz", environ_overrides=leaving).status_code == 200


def test_metrics_come_from_the_engine_as_they_are(client: Any, link: Any) -> None:
    """Prometheus gets the text format under the type that it knows."""
    text = 'charloom_requests_total{model="dämo"} 5.0\n'
    link.answers[AskMetrics] = lambda _: Text(text=text)
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.content_type == "text/plain; version=0.0.4; charset=utf-8"
    assert answer.text == text
    (family,) = text_string_to_metric_families(answer.text)
    assert family.samples[0].value == 5.0
