"""The contract of a route: a path, the runs that it can be served for, and how a request is answered.

A route is one file in ``peftkit.serving.routes``, or a class that another package names under the entry-point group
``peftkit.routes``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from peftkit.registry import Registry
from peftkit.serving.errors import RequestError

if TYPE_CHECKING:
    from peftkit.inference.trained_model import LoadedRun
    from peftkit.serving.service import Service

ROUTES: Registry[Any] = Registry("route", package="peftkit.serving.routes", group="peftkit.routes")


class Route(ABC):
    """One path of the server."""

    path: ClassVar[str]
    method: ClassVar[str] = "POST"
    open: ClassVar[bool] = False
    """Whether it answers without a key, and while the server is full."""

    def __init__(self, service: Service) -> None:
        self.service = service

    @classmethod
    def serves(cls, run: LoadedRun) -> bool:
        """Whether the run can answer such requests."""
        return True

    @abstractmethod
    async def answer(self, request: Request) -> Response:
        """The response; raises RequestError for a request that cannot be answered."""


class Fields(BaseModel):
    """Fields of a request, or of a part of one; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Body(Fields):
    """The fields that all requests share."""

    model: str | None = None
    user: str | None = None
    """Accepted and not used."""


B = TypeVar("B", bound=Body)


async def read(request: Request, kind: type[B]) -> B:
    """The request's JSON as fields.

    Raises:
        RequestError: no JSON, or a field that is unknown or has a value that it cannot have.
    """
    raw = await request.body()
    try:
        return kind.model_validate_json(raw, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("function-", "list[", "str")))
        if first["type"] == "extra_forbidden":
            raise RequestError(f"unknown field '{place}'"[:300], param=place[:100], code="unknown_field") from None
        message = f"{place}: {first['msg']}" if place else first["msg"]
        raise RequestError(message[:500], param=place[:100] or None, code="invalid_value") from None
