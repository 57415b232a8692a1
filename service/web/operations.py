"""Routes for who runs the service: is the process there, would a request be taken, what happened.

GET /healthz   this process answers; it says nothing about the engine, so that a restart of one
               does not restart the other
GET /readyz    the engine has looked at its work lately, has models, can count what budgets allow,
               and its queue takes more
GET /metrics   all that was counted, in Prometheus' text format
"""

from flask import Response
from flask_openapi import APIBlueprint

from service.errors import RequestError, unavailable
from service.messages import AskMetrics, AskStatus
from service.web import drain
from service.web.body import dump
from service.web.context import current
from service.web.waiting import Watch
from service.web.wire.operations import Health

PATIENCE = 1.0
"""Seconds that the engine has to say how it is."""

METRICS_PATIENCE = 5.0
"""Seconds that the engine has to tell what it has counted: half of what Prometheus waits."""

STALE = 5.0
"""Seconds without a step after which the engine counts as stuck."""

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

blueprint = APIBlueprint(
    "operations", __name__, abp_tags=[{"name": "Operations", "description": "Health and metrics."}]
)


@blueprint.get("/healthz", summary="Is this process there?", responses={200: Health})
def healthz() -> Response:
    """Answers as long as this process can answer, whatever the engine does."""
    return _well()


@blueprint.get("/readyz", summary="Would a request be taken?", responses={200: Health})
def readyz() -> Response:
    """200 where the engine has stepped lately, has models to serve, can count what budgets allow
    and has room in its queue; else 503 with the reason.
    """
    if drain.current().is_on:
        raise unavailable("This worker is stopping.", code="draining")
    try:
        status = current().link.ask(AskStatus(), timeout=PATIENCE)
    except RequestError as error:
        raise unavailable(
            f"The engine does not answer: {error.problem.message}", code="engine_unavailable"
        ) from error
    if status.step_age >= STALE:
        raise unavailable(
            f"The engine has not looked at its work for {status.step_age:.0f} seconds.",
            code="engine_stalled",
        )
    if status.models == 0:
        raise unavailable(
            "There is no model to serve; train one, or set CHARLOOM_MODELS to the folder that "
            "has some.",
            code="no_models",
        )
    if not status.can_count:
        raise unavailable(
            "The storage of budgets does not answer, and what cannot be counted is not admitted; "
            "see to what CHARLOOM_LIMITS_STORAGE names.",
            code="limits_unavailable",
        )
    if status.waiting > 0 and status.waiting >= status.queue:
        raise unavailable(f"The queue is full: {status.waiting} requests wait.", code="queue_full")
    return _well()


@blueprint.get(
    "/metrics",
    summary="What happened",
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
def metrics() -> Response:
    """All that was counted, by HTTP workers and the engine, in Prometheus' text format."""
    text = current().link.ask(AskMetrics(), timeout=METRICS_PATIENCE, look=Watch.current())
    return Response(text.text, content_type=METRICS_TYPE)


def _well() -> Response:
    return Response(dump(Health(status="ok")), content_type="application/json")
