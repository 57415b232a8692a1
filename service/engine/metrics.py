"""What the service counts, for Prometheus: one registry, in the engine process, for all workers.

There are no files shared between processes and no numbers per worker that would have to be added
up: HTTP workers report their answers in `Tally` messages, all else happens here. `METRICS` is the
documented list, and its names stay the same. Nothing is observed per character: requests are when
they end and steps once a block, and what others count anyway is looked up when it is asked for.

Histograms begin at 10 microseconds, since a small model writes a character in 20.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service.engine.job import Job
from service.errors import Problem
from service.messages import Tally

SECONDS = (
    *(digit * 10.0**power for power in range(-5, 2) for digit in (1, 2.5, 5)),
    *(100.0, 250.0, 600.0),
)
ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096)


class Description(NamedTuple):
    """A metric as the documents tell of it; where it is read, a counter's name ends in `_total`."""

    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    text: str


METRICS = {
    "charloom_requests": Description(
        "counter",
        ("outcome",),
        "Requests for texts: completed, cancelled, deadline, failed or refused.",
    ),
    "charloom_refusals": Description(
        "counter", ("code",), "Requests for texts and questions that were refused, by reason."
    ),
    "charloom_waiting_requests": Description("gauge", (), "Admitted requests without a row."),
    "charloom_active_texts": Description("gauge", (), "Texts in the making."),
    "charloom_queue_seconds": Description(
        "histogram", (), "From a request's admission to its first row."
    ),
    "charloom_first_token_seconds": Description(
        "histogram", (), "From a stream's admission to its first token."
    ),
    "charloom_token_seconds": Description(
        "histogram", (), "From a request's first row to its end, per token of its mean text."
    ),
    "charloom_request_seconds": Description(
        "histogram", (), "From a request's admission to its end."
    ),
    "charloom_prompt_tokens": Description("counter", ("model",), "Tokens of requests' prompts."),
    "charloom_cached_tokens": Description(
        "counter", ("model",), "Prompts' tokens that were not read, since a state was kept."
    ),
    "charloom_completion_tokens": Description("counter", ("model",), "Tokens written."),
    "charloom_batch_rows": Description(
        "histogram", (), "Texts that were written together, once for each block of steps."
    ),
    "charloom_read_tokens": Description(
        "counter", ("model",), "Tokens fed to a loaded model, of texts to write or to score."
    ),
    "charloom_drawn_tokens": Description("counter", ("model",), "Tokens drawn by a loaded model."),
    "charloom_cache_hits": Description(
        "counter", ("model",), "Prompts that began like one whose state a loaded model had kept."
    ),
    "charloom_cache_misses": Description("counter", ("model",), "Prompts that did not."),
    "charloom_cache_bytes": Description("gauge", ("model",), "Bytes of states kept."),
    "charloom_models_served": Description("gauge", (), "Models that can be asked for."),
    "charloom_models_loaded": Description(
        "gauge", (), "Models in memory, replaced ones that still write included."
    ),
    "charloom_models_broken": Description("gauge", (), "Folders that hold no sound model."),
    "charloom_model_bytes": Description("gauge", ("model",), "Bytes of each model in memory."),
    "charloom_workers": Description("gauge", (), "HTTP workers that are connected."),
    "charloom_http_answers": Description(
        "counter", ("route", "method", "status"), "HTTP answers of all workers."
    ),
    "charloom_http_seconds": Description(
        "histogram", ("route", "method"), "From an HTTP request to the end of its answer."
    ),
    "charloom_engine_restarts": Description(
        "counter", (), "Engine processes that have died and were replaced."
    ),
}
"""All of them; to these come the client library's `process_...` of the engine process."""

TEXT_AGE = 1.0
"""Seconds for which the text is kept: making it takes milliseconds in which nothing is written."""

Sample = tuple[str, tuple[str, ...], float]
"""A metric's name, the values of its labels, and the number at this moment."""


class _Snapshot(Collector):
    """The numbers that are kept elsewhere, as they are when Prometheus asks."""

    def __init__(self, look: Callable[[], Iterable[Sample]]) -> None:
        self._look = look

    def describe(self) -> Iterator[Metric]:
        """The registry need not look while it is being set up."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """The families of all that was seen."""
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for name, labels, value in self._look():
            family = families.get(name)
            if family is None:
                told = METRICS[name]
                kind = CounterMetricFamily if told.kind == "counter" else GaugeMetricFamily
                family = families[name] = kind(name, told.text, labels=told.labels)
            family.add_metric(labels, value)
        yield from families.values()


class Metrics:
    """The service's registry; `look` gives the numbers that are kept elsewhere."""

    def __init__(
        self, look: Callable[[], Iterable[Sample]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._text, self._made_at = "", -math.inf
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(_Snapshot(look))
        self._requests = self._counter("charloom_requests")
        self._refusals = self._counter("charloom_refusals")
        self._prompt_tokens = self._counter("charloom_prompt_tokens")
        self._cached_tokens = self._counter("charloom_cached_tokens")
        self._completion_tokens = self._counter("charloom_completion_tokens")
        self._http_answers = self._counter("charloom_http_answers")
        self._queue_seconds = self._histogram("charloom_queue_seconds")
        self._first_token_seconds = self._histogram("charloom_first_token_seconds")
        self._token_seconds = self._histogram("charloom_token_seconds")
        self._request_seconds = self._histogram("charloom_request_seconds")
        self._http_seconds = self._histogram("charloom_http_seconds")
        self._batch_rows = self._histogram("charloom_batch_rows", ROWS)

    def refuse(self, problem: Problem, *, is_request: bool) -> None:
        """Count what was not admitted; a question is not among the requests."""
        self._refuse(problem.code or problem.type, is_request=is_request)

    def finish(self, job: Job, now: float) -> None:
        """Count a request that has come to its end."""
        model = job.served.name
        self._requests.labels(job.result).inc()
        self._request_seconds.observe(now - job.admitted_at)
        self._prompt_tokens.labels(model).inc(job.prompt_tokens)
        self._cached_tokens.labels(model).inc(job.cached_tokens)
        self._completion_tokens.labels(model).inc(job.completion_tokens)
        if job.started_at is not None:
            self._queue_seconds.observe(job.started_at - job.admitted_at)
            if job.completion_tokens:
                each = job.completion_tokens / job.texts
                self._token_seconds.observe((now - job.started_at) / each)
        if job.first_at is not None:
            self._first_token_seconds.observe(job.first_at - job.admitted_at)

    def step(self, rows: int) -> None:
        """Count a block of steps."""
        self._batch_rows.observe(rows)

    def tally(self, message: Tally) -> None:
        """Count what a worker has answered, and refused without asking the engine."""
        for route, method, status, seconds in message.answers:
            self._http_answers.labels(route, method, str(status)).inc()
            self._http_seconds.labels(route, method).observe(seconds)
        for refusal in message.refusals:
            self._refuse(refusal.code, is_request=refusal.is_request)

    def text(self) -> str:
        """All of it in Prometheus' text format, as it was a second ago at most."""
        now = self._clock()
        if now - self._made_at >= TEXT_AGE:
            self._text, self._made_at = generate_latest(self._registry).decode(), now
        return self._text

    def _refuse(self, code: str, *, is_request: bool) -> None:
        self._refusals.labels(code).inc()
        if is_request:
            self._requests.labels("refused").inc()

    def _counter(self, name: str) -> Counter:
        _, labels, text = METRICS[name]
        return Counter(name, text, labels, registry=self._registry)

    def _histogram(self, name: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
        _, labels, text = METRICS[name]
        return Histogram(name, text, labels, registry=self._registry, buckets=buckets)
