"""The application: its routes, and what every request goes through.

A request is refused before it is read where it has no key, comes under a foreign host name, or is too large; then its
route answers it, and it is counted and logged.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route as StarletteRoute
from starlette.types import Receive, Scope, Send

from peftkit.errors import UserError
from peftkit.serving.errors import RequestError
from peftkit.serving.observers import RequestRecord
from peftkit.serving.route import ROUTES, Route
from peftkit.serving.service import Service

log = logging.getLogger(__name__)
LOOPBACK = ("localhost", "127.0.0.1", "::1")
BODY_SECONDS = 30.0
"""Until the whole of a request must have arrived."""


def build_app(
    service: Service, *, key: str | None = None, hosts: Sequence[str] | None = LOOPBACK, log_requests: bool = False
) -> Starlette:
    """The ASGI application of a service.

    Args:
        key: what requests must carry as ``Authorization: Bearer KEY``; None for none.
        hosts: names that requests may address the server by, so that no web page can reach it by a name of its own;
            None for any.
        log_requests: print a JSON line for each request to stderr.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        service.close()

    routes = []
    for name in ROUTES:
        kind = ROUTES.get(name)
        if kind.serves(service.run):
            endpoint = _guarded(kind(service), service, key, hosts, log_requests)
            routes.append(StarletteRoute(kind.path, endpoint, methods=[kind.method]))
    handlers = {404: _unknown, 405: _unknown}
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)  # type: ignore[arg-type]
    app.state.service = service
    return app


async def _unknown(request: Request, error: Any) -> Response:
    known = ", ".join(f"{'/'.join(sorted(route.methods - {'HEAD'}))} {route.path}" for route in request.app.routes)
    status = error.status_code
    what = "no such path" if status == 404 else f"{request.method} is not what this path answers"
    return RequestError(f"{what}; this server has {known}", status=status).response()


def _guarded(
    route: Route, service: Service, key: str | None, hosts: Sequence[str] | None, log_requests: bool
) -> Callable[[Request], Any]:
    async def endpoint(request: Request) -> _Reported:
        started = time.perf_counter()
        request.state.record = {}

        def done(status: int) -> None:
            record = RequestRecord(route.path, status, time.perf_counter() - started, **request.state.record)
            if entered:
                service.leave(record)
            else:
                service.report(record)
            if log_requests:
                _print(record)

        entered = False
        try:
            _check_host(request, hosts)
            if not route.open:
                _check_key(request, key)
                await _check_size(request, service.limits.body)
                service.enter()
                entered = True
            response = await route.answer(request)
        except ClientDisconnect:
            response = RequestError("the client has left", status=499).response()
        except RequestError as error:
            response = error.response()
        except UserError as error:
            response = RequestError(str(error)[:1000]).response()
        except Exception:
            log.exception("a request to %s failed", route.path)
            response = RequestError("the server failed on this request", status=500).response()
        return _Reported(response, done)

    return endpoint


class _Reported(Response):
    """A response after which ``done`` is called with its status, even if the client left before it began."""

    def __init__(self, response: Response, done: Callable[[int], None]) -> None:
        super().__init__(status_code=response.status_code)
        self.response, self.done = response, done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.response(scope, receive, send)
        finally:
            self.done(self.status_code)


def _check_key(request: Request, key: str | None) -> None:
    if key is None:
        return
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.encode()):
        raise RequestError(
            "no or a wrong key; send Authorization: Bearer KEY", status=401, code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )  # fmt: skip


def _check_host(request: Request, hosts: Sequence[str] | None) -> None:
    if hosts is None:
        return
    host = request.headers.get("host", "").lower()
    name = host[1 : host.find("]")] if host.startswith("[") else host.partition(":")[0]
    if name not in hosts:
        raise RequestError("this server answers on the loopback only", status=403, code="unknown_host")


async def _check_size(request: Request, limit: int) -> None:
    """Reads the body, which then is at hand; raises RequestError as soon as it is too large."""
    declared = request.headers.get("content-length", "")
    too_large = RequestError(f"the request is larger than {limit} bytes", status=413, code="too_large")
    if declared.isdecimal() and int(declared[:18]) > limit:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise too_large
                parts.append(part)
    except TimeoutError:
        raise RequestError(f"the request did not arrive in {BODY_SECONDS:g} seconds", status=408) from None
    request._body = b"".join(parts)


def _print(record: RequestRecord) -> None:
    line = {
        "time": round(time.time(), 3), "route": record.route, "status": record.status, "model": record.model,
        "seconds": round(record.seconds, 4), "texts": len(record.texts), **record.usage,
    }  # fmt: skip
    print(json.dumps(line), file=sys.stderr, flush=True)
