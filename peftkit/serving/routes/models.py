"""The names that requests may give as ``model``."""

from __future__ import annotations

from typing import ClassVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from peftkit.serving.route import ROUTES, Route


@ROUTES.register("models")
class Models(Route):
    """The run, further adapters, and the base where it is served."""

    path: ClassVar[str] = "/v1/models"
    method: ClassVar[str] = "GET"

    async def answer(self, request: Request) -> Response:
        service = self.service
        entries = [
            {"id": name, "object": "model", "created": service.created, "owned_by": "peftkit"} for name in service.names
        ]
        return JSONResponse({"object": "list", "data": entries})
