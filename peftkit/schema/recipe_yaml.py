"""Recipes as YAML: safe loading, with the line and column of whatever is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from peftkit.errors import RecipeError
from peftkit.schema.validation import complaint, flatten

Result = TypeVar("Result")
MAX_BYTES = 1_000_000
MAX_ALIASES = 100
MAX_DEPTH = 20
PLAIN = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "merge": (r"<<", "<"),
}  # fmt: skip


_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml where PyYAML was built with it


class Loader(_SafeLoader):
    """YAML 1.2's plain values: ``1e-3`` is a number, ``no``, ``on`` and ``2024-01-01`` are words."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


class Dumper(yaml.SafeDumper):
    """Quotes exactly the words that Loader would read as something else."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


for _tag, (_pattern, _first) in PLAIN.items():
    for _side in (Loader, Dumper):
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def value_of(text: str) -> Any:
    """One plain value, list or mapping; raises yaml.YAMLError."""
    loader = Loader(text)
    node = loader.get_single_node()
    return None if node is None else _construct(loader, node)


def _construct(loader: Loader, node: yaml.Node) -> Any:
    try:
        return loader.construct_document(node)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        # PyYAML trusts an explicit tag (!!int, !!bool, …) to stand before a value that fits it
        raise yaml.constructor.ConstructorError(
            None, None, f"a value does not fit its tag: {error}", node.start_mark
        ) from None


def read(path: Path, validate: Callable[[Any], Result]) -> Result:
    """Reads a recipe file and validates its values; raises RecipeError naming file, line, column and field."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError(f"{path}: a recipe is at most {MAX_BYTES:,} bytes; is this a data file?")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 (byte {error.start})") from None
    values, node = _parse(text, path)
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: expected a mapping of a recipe's parts, found {type(values).__name__}")
    try:
        return validate(values)
    except ValidationError as error:
        lines = dict.fromkeys(
            f"{path}, {_position(node, loc, message)}: {complaint(loc, message, value)}"
            for loc, message, value in flatten(error)
        )
        raise RecipeError("\n".join(lines)) from None


def write(recipe: BaseModel, *, defaults: bool = True) -> str:
    """The recipe as YAML that ``read`` gives back unchanged."""
    values = recipe.model_dump(mode="json")
    if not defaults:
        unset = recipe.model_dump(mode="json", exclude_defaults=True)
        for part in ("method", "task", "quantization"):  # dumped whole, so trim them by their own defaults
            if values.get(part):
                own = getattr(recipe, part).model_dump(mode="json", exclude_defaults=True)
                unset[part] = {"kind": values[part]["kind"], **own}
        values = {key: unset[key] for key in values if key in unset}
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)


def _parse(text: str, path: Path) -> tuple[Any, yaml.Node | None]:
    try:
        if sum(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader)) > MAX_ALIASES:
            raise RecipeError(f"{path}: more than {MAX_ALIASES} YAML aliases")
        loader = Loader(text)
        node = loader.get_single_node()
        _refuse_repeated_keys(node, path)
        return (None if node is None else _construct(loader, node)), node
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise RecipeError(f"{path}{where}: not YAML that can be read: {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{path}: not YAML that can be read: {error}") from None


def _refuse_repeated_keys(node: yaml.Node | None, path: Path, depth: int = 0, known: set[int] | None = None) -> None:
    """``known`` holds the nodes already looked at: aliases may lead to one node along very many ways."""
    known = set() if known is None else known
    if depth > MAX_DEPTH:
        raise RecipeError(f"{path}: nested more than {MAX_DEPTH} deep")
    if node is None or id(node) in known:
        return
    known.add(id(node))
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if isinstance(key.value, str) and key.value in seen:
                mark = key.start_mark
                raise RecipeError(f"{path}, line {mark.line + 1}, column {mark.column + 1}: '{key.value}' occurs twice")
            if isinstance(key.value, str):
                seen.add(key.value)
            _refuse_repeated_keys(value, path, depth + 1, known)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_repeated_keys(value, path, depth + 1, known)


def _position(node: yaml.Node | None, loc: tuple[Any, ...], message: str) -> str:
    """``line L, column C`` of the deepest node on the way to ``loc`` (or to the unknown key the message names)."""
    mark = node.start_mark if node else None
    unknown = message.split("'")[1] if message.startswith("unknown field '") else None
    for part in (*loc, *([unknown] if unknown else [])):
        step = _child(node, part)
        if step is None:
            break
        mark, node = step
    return f"line {mark.line + 1}, column {mark.column + 1}" if mark else "line 1"


def _child(node: yaml.Node | None, part: Any) -> tuple[yaml.Mark, yaml.Node] | None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == str(part):
                return key.start_mark, value
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part].start_mark, node.value[part]
    return None
