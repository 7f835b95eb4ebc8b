"""The building blocks of a recipe: frozen sections that refuse unknown keys, and sections chosen by ``kind``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from peftkit.errors import RecipeError, did_you_mean
from peftkit.registry import Registry


class ConfigSection(BaseModel):
    """A frozen section of a recipe that refuses unknown keys and suggests the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            for key in value:
                if key not in cls.model_fields:
                    raise PydanticCustomError(
                        "unknown_field", "unknown field '{key}': {hint}",
                        {"key": str(key), "hint": did_you_mean(str(key), cls.model_fields)},
                    )  # fmt: skip
        return value


def _as_class_name(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"a class name cannot be true or false; quote it as the data spell it: '{value}'")
    return str(value) if isinstance(value, int) else value


ClassName = Annotated[str, BeforeValidator(_as_class_name)]
"""The name of a class, which may be written as a whole number."""


@dataclass(frozen=True)
class NameIn:
    """Pydantic annotation of a text: one of the names in a registry."""

    registry: Registry[Any]

    def validate(self, value: str) -> str:
        try:
            self.registry.get(value)
        except RecipeError as error:
            raise ValueError(str(error)) from None
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.validate, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": self.registry.names(), "type": "string"}


@dataclass(frozen=True)
class DiscriminatedBy:
    """Pydantic annotation: the class that ``kind`` names in a registry validates the mapping."""

    registry: Registry[Any]

    def validate(self, value: Any) -> Any:
        if isinstance(value, ConfigSection):
            return value
        if isinstance(value, str):
            value = {"kind": value}
        if not isinstance(value, Mapping) or "kind" not in value:
            names = ", ".join(self.registry.names())
            raise ValueError(f"expected a mapping with 'kind', one of: {names}")
        try:
            part = self.registry.get(str(value["kind"]))
        except RecipeError as error:
            raise ValueError(str(error)) from None
        return part.model_validate(dict(value))

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        dump = core_schema.plain_serializer_function_ser_schema(
            lambda part, info: part.model_dump(mode=info.mode), info_arg=True
        )
        return core_schema.no_info_plain_validator_function(self.validate, serialization=dump)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """One of the sections with its ``kind``, or the kind alone, which means the section with its defaults."""
        names = self.registry.names()
        parts = [handler(self.registry.get(name).__pydantic_core_schema__) for name in names]
        for part in parts:
            handler.resolve_ref_schema(part)["required"] = ["kind"]
        return {"oneOf": [*parts, {"type": "string", "enum": names}]} if names else {"type": "object"}
