"""MkDocs hooks: the pages that are generated, so that they cannot disagree with the code.

Home, changelog and contributing come from the files at the top of the repository, tutorials from the notebooks, recipe
fields from the schema, the command reference from the command line, tables of results from ``benchmarks/results``.
``<!-- insert: NAME -->`` in a page is replaced by the table of that name.
"""

from __future__ import annotations

import ast
import base64
import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from peftkit.methods import table
from peftkit.registry import Registry
from peftkit.schema import catalog, recipe, registries

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LINKS = {
    "docs/": "", "notebooks/": "tutorials/", ".ipynb": ".md", "benchmarks/results/README.md": "benchmark-results.md",
    "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "README.md": "index.md",
}  # fmt: skip
"""How links of the files at the top of the repository are spelled inside the site."""
ANSI = re.compile(r"\x1b\[[0-9;]*m")
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
RICH = "font-family:Menlo"
"""In the HTML of rich's tables, of which a page shows the plain text."""
ENTRY = re.compile(r"(Needs|Reached|Without)\b")
"""How an entry of a recipe file's opening begins."""
MAX_LINES = 40
"""Lines of one cell's printed output that a tutorial shows."""


def on_files(files: Files, config: Any) -> Files:
    """Adds the generated pages."""
    for uri, content in pages():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts the named tables into a page."""
    return re.sub(r"<!-- insert: (\w+) -->", lambda match: TABLES[match[1]](), markdown)


def pages() -> Iterator[tuple[str, str | bytes]]:
    """Address and content of every generated page and image."""
    for name, source in (("index", "README"), ("changelog", "CHANGELOG"), ("contributing", "CONTRIBUTING")):
        yield f"{name}.md", relinked((ROOT / f"{source}.md").read_text(encoding="utf-8"))
    results = (RESULTS / "README.md").read_text(encoding="utf-8")
    yield "benchmark-results.md", results.replace("../../docs/", "").replace("# Results", "# All benchmark results", 1)
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        yield from tutorial(notebook)
    yield "reference/recipes.md", built_in_recipes()
    yield "reference/fields.md", recipe_fields()
    yield "reference/components.md", components()
    yield "reference/cli.md", command_line()


def relinked(text: str) -> str:
    """The Markdown of a top-level file with its relative links spelled for the site."""

    def link(match: re.Match[str]) -> str:
        target = match[2]
        if "://" not in target and not target.startswith("#"):
            for old, new in LINKS.items():
                target = target.replace(old, new)
        return f"{match[1]}({target})"

    return re.sub(r"(\[[^\]]*\])\(([^)\s]+)\)", link, text)


# -- tutorials -----------------------------------------------------------------------------------------------------


def tutorial(path: Path) -> Iterator[tuple[str, str | bytes]]:
    """A notebook as a page, with what its cells printed, and its images."""
    parts = []
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        printed = ""
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                image = f"{path.stem}-{number}.png"
                yield f"tutorials/{image}", base64.b64decode(data["image/png"])
                parts.append(f"![output of the cell above]({image})")
            elif "text/html" in data and RICH not in (html := "".join(data["text/html"])):
                parts.append(f'<div class="output">{html}</div>')
            else:
                printed += "".join(output.get("text") or data.get("text/plain", ""))
        if printed.strip():
            parts.append(f"```text\n{_shortened(ANSI.sub('', printed))}\n```")
    note = f"*This page is the notebook `notebooks/{path.name}`, with the outputs of its last run.*"
    parts.insert(1, note)
    yield f"tutorials/{path.stem}.md", "\n\n".join(parts) + "\n"


def _shortened(text: str) -> str:
    lines = [line.rstrip() for line in text.strip("\n").splitlines()]
    cut = len(lines) - MAX_LINES
    return "\n".join(lines if cut <= 0 else [*lines[:MAX_LINES], f"… {cut} more lines"])


# -- the schema ----------------------------------------------------------------------------------------------------


def recipe_fields() -> str:
    """Every field of a recipe, with its values, default and meaning."""
    sections = {name: field.default for name, field in recipe.Recipe.model_fields.items()}
    plain = [name for name in sections if name in ("name", "tracking", "output_dir")]
    parts = [
        "# Recipe fields\n\nGenerated from the schema that `peftkit schema` prints. A field is set in YAML "
        '(`training: {epochs: 1}`), in Python (`training={"epochs": 1}`) and on the command line '
        "(`training.epochs=1`).",
        "## Top level\n\n" + _table(recipe.Recipe, only=plain),
    ]
    for name in ("model", "data", "training", "evaluation", "export"):
        parts += list(_section(name, _classes()[name], level=2))
    for name, registry in (
        ("method", registries.METHODS), ("task", registries.TASKS), ("quantization", registries.QUANTIZATIONS),
    ):  # fmt: skip
        absent = " `null` stores the weights unquantized." if name == "quantization" else ""
        parts.append(f"## {name}\n\nChosen by `{name}.kind`; each kind has its own fields.{absent}")
        for kind in registry.names():
            parts += list(_section(f"{name}: {kind}", registry.get(kind), level=3))
    return "\n\n".join(parts) + "\n"


def _classes() -> dict[str, Any]:
    return {
        "model": recipe.ModelConfig, "data": recipe.DataConfig, "training": recipe.TrainingConfig,
        "evaluation": recipe.EvaluationConfig, "export": recipe.ExportConfig,
    }  # fmt: skip


def _section(title: str, cls: Any, *, level: int) -> Iterator[str]:
    """A section's heading, summary and table, then the sections inside it."""
    rate = getattr(cls, "default_learning_rate", None)
    note = f" Default learning rate: {rate:g}." if rate else ""
    yield f"{'#' * level} {title}\n\n{_linked(_summary(cls))}{note}\n\n{_table(cls)}"
    for name, field in cls.model_fields.items():
        for inner in _nested(field.annotation):
            yield from _section(f"{title}.{name}", inner, level=level + 1)


def _nested(annotation: Any) -> list[Any]:
    options = getattr(annotation, "__args__", (annotation,))
    return [option for option in options if inspect.isclass(option) and hasattr(option, "model_fields")]


def _table(cls: Any, only: list[str] | None = None) -> str:
    schema = cls.model_json_schema()
    required = schema.get("required", [])
    rows = []
    for name, field in schema.get("properties", {}).items():
        if name == "kind" or (only is not None and name not in only):
            continue
        default = "required" if name in required else f"`{json.dumps(field.get('default'), ensure_ascii=False)}`"
        if "$ref" in field or any("$ref" in option for option in field.get("anyOf", ())):
            default = "`null`" if field.get("default", 0) is None else "below"
        meaning = _linked(_cell(field.get("description", "")))
        rows.append(f"| `{name}` | {_values(field)} | {default} | {meaning} |")
    if not rows:
        return "No fields of its own."
    return "\n".join(["| field | values | default | meaning |", "|---|---|---|---|", *rows])


def _values(field: dict[str, Any]) -> str:
    """What a field takes, in words."""
    if "$ref" in field:
        return "a section of its own"
    if "anyOf" in field or "oneOf" in field:
        options = [_values(option) for option in field.get("anyOf") or field["oneOf"]]
        return " or ".join(dict.fromkeys(options))
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum") or [field["const"]])
    kind = field.get("type")
    if kind == "array":
        items = field.get("items") or (field.get("prefixItems") or [{}])[0]
        count = f"{len(field['prefixItems'])} × " if field.get("prefixItems") else "list of "
        return count + _values(items if isinstance(items, dict) else {})
    if kind == "object":
        inner = field.get("additionalProperties")
        return f"mapping to {_values(inner)}" if isinstance(inner, dict) else "mapping"
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {field[key]:g}" for key, sign in bounds.items() if key in field]
    names = {"integer": "integer", "number": "number", "string": "text", "boolean": "`true`, `false`", "null": "`null`"}
    return " ".join([names.get(str(kind), "any value"), ", ".join(limits)]).strip()


def _summary(cls: Any) -> str:
    return _cell(inspect.getdoc(cls) or "")


def _cell(text: str) -> str:
    """Text on one line, safe in a table and free of Sphinx's double backquotes."""
    return " ".join(text.split()).replace("``", "`").replace("|", "\\|")


def _linked(text: str) -> str:
    return ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def components() -> str:
    """What every registry holds: name and first line of each item."""
    parts = [
        "# Components\n\nEverything that is found by name, as installed when this page was built. Packages add their "
        "own through entry points; [Extending](../extending.md) shows how."
    ]
    for registry in vars(registries).values():
        if not isinstance(registry, Registry):
            continue
        rows = []
        for name in registry.names():
            summary = (inspect.getdoc(registry.get(name)) or "").partition("\n\n")[0]
            rows.append(f"| `{name}` | {_linked(_cell(summary))} |")
        title = f"{registry.noun[0].upper()}{registry.noun[1:]}s"
        parts.append("\n".join([f"## {title}\n", "| name | what it is |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


# -- recipes and commands ------------------------------------------------------------------------------------------


def built_in_recipes() -> str:
    """Every recipe of the package: what it needs, what it reached, and its text."""
    parts = [
        "# Built-in recipes\n\n`peftkit list` prints these names; `peftkit show NAME` prints one as YAML, with every "
        "field. A recipe file runs under `python`, `accelerate launch` and `torchrun` alike."
    ]
    files = catalog.built_in()
    for path in dict.fromkeys(files.values()):
        text = path.read_text(encoding="utf-8")
        header = inspect.cleandoc(ast.get_docstring(ast.parse(text)) or "")
        title, _, rest = header.partition("\n")
        names = ", ".join(f"`{name}`" for name, file in files.items() if file == path)
        body = text.partition('"""\n\n')[2].strip()
        parts.append(
            f"## {path.stem}\n\n{title} Recipes: {names}.\n\n{_header(rest)}\n\n"
            f'??? note "recipes/{path.name}"\n\n'
            + "\n".join(f"    {line}".rstrip() for line in ["```python", *body.splitlines(), "```"])
        )
    return "\n\n".join(parts) + "\n"


def _header(text: str) -> str:
    """A recipe file's opening as Markdown: indented commands become code, an entry such as "Needs:" a paragraph."""
    parts: list[str] = []
    for line in text.strip("\n").splitlines():
        code = line.startswith("    ")
        if code and parts and parts[-1].startswith("```"):
            parts[-1] = parts[-1].removesuffix("\n```") + f"\n{line[4:]}\n```"
        elif code:
            parts.append(f"```bash\n{line[4:]}\n```")
        elif (
            not line.strip() or not parts or parts[-1].startswith("```") or re.match(r"(Needs|Reached|Without)\b", line)
        ):
            parts.append(line)
        else:
            parts[-1] += f" {line}"
    text = "\n\n".join(part for part in parts if part.strip())
    return re.sub(r"^(Needs|Reached):", r"**\1:**", text, flags=re.MULTILINE)


def command_line() -> str:
    """Every command with its arguments and options."""
    import typer

    from peftkit.cli.app import app

    group = typer.main.get_command(app)
    parts = [
        "# Command line\n\n`peftkit COMMAND --help` prints the same. Results go to stdout and everything else to "
        "stderr, so every command works in a pipe. Exit codes: 0 for success, 1 for failed work, 2 for wrong input, "
        "128 plus the signal's number for a run stopped by a signal. `PEFTKIT_DEBUG=1` adds the traceback to an error."
    ]
    for name, command in group.commands.items():
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        usage = " ".join(["peftkit", name, "[OPTIONS]", *(_argument(p) for p in arguments)])
        rows = [f"| `{_argument(p)}` | {_cell(p.help or '')} |" for p in arguments]
        rows += [f"| {_option(p)} | {_cell(p.help or '')}{_default(p)} |" for p in command.params if p not in arguments]
        listing = "\n".join(["| | |", "|---|---|", *rows]) if rows else ""
        parts.append(f"## {name}\n\n{_cell(command.help or '')}\n\n```text\n{usage}\n```\n\n{listing}".rstrip())
    return "\n\n".join(parts) + "\n"


def _argument(parameter: Any) -> str:
    name = str(parameter.metavar or parameter.name.upper())
    return name if parameter.required or name.startswith("[") else f"[{name}]"


def _option(parameter: Any) -> str:
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    return names if parameter.is_flag else f"{names} `{parameter.metavar or 'VALUE'}`"


def _default(parameter: Any) -> str:
    value = parameter.default
    return "" if parameter.is_flag or value is None or callable(value) else f" Default: `{value}`."


# -- tables --------------------------------------------------------------------------------------------------------


def _result(name: str) -> Callable[[], str]:
    """Reads the table in a file of ``benchmarks/results``."""
    return lambda: "\n".join(re.findall(r"^\|.*", (RESULTS / name).read_text(encoding="utf-8"), re.MULTILINE))


TABLES: dict[str, Callable[[], str]] = {
    "methods": table.markdown,
    "plan_accuracy": _result("plan_accuracy.md"),
    "plan_accuracy_avx2_imitated": _result("plan_accuracy_avx2_imitated.md"),
    "methods_ag_news": _result("methods_ag_news.md"),
}
