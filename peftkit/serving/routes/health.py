"""Liveness, readiness and metrics."""

from __future__ import annotations

from typing import ClassVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from peftkit.serving.route import ROUTES, Route


@ROUTES.register("health")
class Health(Route):
    """Whether the process answers at all."""

    path: ClassVar[str] = "/healthz"
    method: ClassVar[str] = "GET"
    open: ClassVar[bool] = True

    async def answer(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})


@ROUTES.register("readiness")
class Readiness(Route):
    """Whether it has room for a request."""

    path: ClassVar[str] = "/readyz"
    method: ClassVar[str] = "GET"
    open: ClassVar[bool] = True

    async def answer(self, request: Request) -> Response:
        ready = self.service.in_flight < self.service.limits.queue
        return JSONResponse({"status": "ready" if ready else "busy"}, 200 if ready else 503)


@ROUTES.register("metrics")
class PrometheusMetrics(Route):
    """Metrics in Prometheus' text format."""

    path: ClassVar[str] = "/metrics"
    method: ClassVar[str] = "GET"
    open: ClassVar[bool] = True

    async def answer(self, request: Request) -> Response:
        return Response(self.service.metrics.page(), media_type="text/plain; version=0.0.4")
