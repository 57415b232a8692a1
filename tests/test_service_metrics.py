from collections.abc import Iterable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.engine.metrics import METRICS, ROWS, SECONDS, Metrics, Sample
from service.errors import Problem
from service.messages import Tally, TurnedAway


def make_job(**facts: Any) -> Any:
    """A request that has ended."""
    return SimpleNamespace(
        **{
            "served": SimpleNamespace(name="demo"),
            "result": "completed",
            "prompt_tokens": 20,
            "cached_tokens": 5,
            "completion_tokens": 200,
            "texts": 2,
            "admitted_at": 10.0,
            "started_at": 10.5,
            "first_at": 10.75,
            **facts,
        }
    )


def read(metrics: Metrics) -> dict[tuple[str, tuple[str, ...]], float]:
    """All numbers by name and the values of their labels."""
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(metrics.text())
        for sample in family.samples
    }


def look_at_everything() -> Iterable[Sample]:
    """One number of every kind that is kept elsewhere."""
    own = set(Metrics(lambda: ())._registry._names_to_collectors)
    for name, (_, labels, _) in METRICS.items():
        if name not in own:
            yield name, labels, 1.0


def make_full() -> Metrics:
    """Metrics in which everything has happened once."""
    metrics = Metrics(look_at_everything)
    metrics.finish(make_job(), 14.5)
    metrics.step(64)
    metrics.tally(Tally(answers=[("/v1/completions", "POST", 200, 0.25)]))
    metrics.refuse(
        Problem(status=503, type="overloaded_error", code="queue_full", message="x"),
        is_request=True,
    )
    return metrics


def test_names_types_and_labels_are_as_documented() -> None:
    """What Prometheus reads is the list, no more and no less, beside the process's own."""
    families = {
        family.name: family
        for family in text_string_to_metric_families(make_full().text())
        if not family.name.startswith("process_") and not family.name.endswith("_created")
    }
    assert set(families) == set(METRICS)
    for name, (kind, labels, text) in METRICS.items():
        family = families[name]
        assert (family.type, family.documentation) == (kind, text)
        found = {tuple(sorted({*sample.labels} - {"le"})) for sample in family.samples}
        assert found == {tuple(sorted(labels))}


def test_the_process_is_measured_too() -> None:
    """Memory and processor time of the engine process are there."""
    names = {name for name, _ in read(make_full())}
    assert {"process_resident_memory_bytes", "process_cpu_seconds_total"} <= names


def test_a_request_is_counted_when_it_ends() -> None:
    """Outcome, tokens and the parts of its time."""
    found = read(make_full())
    assert found["charloom_requests_total", ("completed",)] == 1
    assert found["charloom_prompt_tokens_total", ("demo",)] == 20
    assert found["charloom_cached_tokens_total", ("demo",)] == 5
    assert found["charloom_completion_tokens_total", ("demo",)] == 200
    assert found["charloom_queue_seconds_sum", ()] == 0.5
    assert found["charloom_first_token_seconds_sum", ()] == 0.75
    assert found["charloom_request_seconds_sum", ()] == 4.5
    assert found["charloom_token_seconds_sum", ()] == pytest.approx(4.0 / 100)


def test_what_did_not_happen_is_not_timed() -> None:
    """A request that never had a row has no queue time, one that is not streamed no first token."""
    metrics = Metrics(lambda: ())
    metrics.finish(make_job(result="cancelled", started_at=None, first_at=None), 11.0)
    metrics.finish(make_job(completion_tokens=0, first_at=None), 11.0)
    found = read(metrics)
    assert found["charloom_requests_total", ("cancelled",)] == 1
    assert found["charloom_queue_seconds_count", ()] == 1
    assert found["charloom_first_token_seconds_count", ()] == 0
    assert found["charloom_token_seconds_count", ()] == 0


@pytest.mark.parametrize("is_request", [True, False])
def test_refusals_are_counted_by_reason(is_request: bool) -> None:
    """A question that is refused is no request; a problem without a code goes by its type."""
    metrics = Metrics(lambda: ())
    for code in ("queue_full", None):
        problem = Problem(status=400, type="invalid_request_error", code=code, message="x")
        metrics.refuse(problem, is_request=is_request)
    found = read(metrics)
    assert found["charloom_refusals_total", ("queue_full",)] == 1
    assert found["charloom_refusals_total", ("invalid_request_error",)] == 1
    assert found.get(("charloom_requests_total", ("refused",)), 0) == 2 * is_request


def test_workers_answers_add_up() -> None:
    """Tallies of several workers are one number."""
    metrics = Metrics(lambda: ())
    for status in (200, 200, 429):
        metrics.tally(Tally(answers=[("/v1/models", "GET", status, 0.5)]))
    found = read(metrics)
    assert found["charloom_http_answers_total", ("GET", "/v1/models", "200")] == 2
    assert found["charloom_http_answers_total", ("GET", "/v1/models", "429")] == 1
    assert found["charloom_http_seconds_sum", ("GET", "/v1/models")] == 1.5


def test_what_workers_turn_away_is_among_the_refusals() -> None:
    """A worker's own refusals count as the engine's do, texts and questions apart."""
    metrics = Metrics(lambda: ())
    for code, is_request in (("queue_full", True), ("queue_full", False), ("draining", True)):
        refusal = TurnedAway(code=code, is_request=is_request)
        answers = [("/v1/x", "POST", 503, 0.5)]
        metrics.tally(Tally(answers=answers, refusals=[refusal]))
    found = read(metrics)
    assert found["charloom_refusals_total", ("queue_full",)] == 2
    assert found["charloom_refusals_total", ("draining",)] == 1
    assert found["charloom_requests_total", ("refused",)] == 2


def test_buckets_begin_at_ten_microseconds() -> None:
    """A character of a small model is told from ten of them, and a minute from ten."""
    assert SECONDS[0] == pytest.approx(1e-5)
    assert SECONDS[-1] == 600.0
    assert sorted(SECONDS) == list(SECONDS)
    assert sorted(ROWS) == list(ROWS)
    assert max(later / earlier for earlier, later in pairwise(SECONDS)) <= 2.5001


def test_the_text_is_kept_for_a_second() -> None:
    """Asking more often takes no time from texts."""
    now, looks = [1000.0], list[float]()

    def look() -> Iterable[Sample]:
        looks.append(now[0])
        return ()

    metrics = Metrics(look, clock=lambda: now[0])
    text = metrics.text()
    now[0] += 0.9
    metrics.step(3)
    assert metrics.text() is text
    now[0] += 0.1
    assert "charloom_batch_rows_count 1.0" in metrics.text()
    assert looks == [1000.0, 1001.0]
