"""A stranger's adapter: whatever stands in its files, loading it gives a model or one message, and runs nothing."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peftkit.errors import PeftkitError
from tests.faults.kinds import Outcome, Reference, begin

CODE = "import pathlib; pathlib.Path({canary!r}).touch()"
TEMPLATE = (
    "{{% for x in ().__class__.__base__.__subclasses__() %}}{{% if 'warning' in x.__name__ %}}"
    "{{{{ x()._module.__builtins__['open']({canary!r}, 'w') }}}}{{% endif %}}{{% endfor %}}"
    "{{{{ cycler.__init__.__globals__.os.system('touch ' + {canary!r}) }}}}"
)
ODD: list[Any] = [
    None,
    -1,
    10**30,
    1e308,
    "",
    "../../..",
    "/etc/passwd",
    "a" * 5000,
    [],
    {},
    [[[]]],
    {"a": {"b": []}},
    True,
]


class _Touch:
    """Unpickled, it makes the canary."""

    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (exec, (CODE.format(canary=self.canary),))


def _json_value(name: str, values: dict[str, Any]) -> Callable[[Path, Path], None]:
    def harm(folder: Path, canary: Path) -> None:
        file = folder / name
        held = json.loads(file.read_text()) if file.is_file() else {}
        filled = json.loads(json.dumps(values).replace("CANARY", str(canary)))
        file.write_text(json.dumps(held | filled))

    return harm


def _write(name: str, content: Callable[[Path], bytes]) -> Callable[[Path, Path], None]:
    return lambda folder, canary: (folder / name).write_bytes(content(canary)) and None


def _module(folder: Path, canary: Path) -> None:
    """Code beside the model, and every config that could name it."""
    (folder / "mine.py").write_text(CODE.format(canary=str(canary)) + "\nclass Mine: pass\n")
    auto = {"AutoConfig": "mine.Mine", "AutoModel": "mine.Mine", "AutoTokenizer": ["mine.Mine", "mine.Mine"]}
    _json_value("config.json", {"auto_map": auto, "model_type": "mine"})(folder, canary)
    _json_value("tokenizer_config.json", {"auto_map": auto, "tokenizer_class": "Mine"})(folder, canary)


def _link(folder: Path, canary: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to("/etc/passwd")


def _header(size: int, text: bytes) -> bytes:
    return struct.pack("<Q", size) + text


HARMS: dict[str, Callable[[Path, Path], None]] = {
    "a pickle beside the weights": _write("adapter_model.bin", lambda c: pickle.dumps(_Touch(str(c)))),
    "a pickle named .pt": _write("optimizer.pt", lambda c: pickle.dumps(_Touch(str(c)))),
    "a pickle called safetensors": _write("adapter_model.safetensors", lambda c: pickle.dumps(_Touch(str(c)))),
    "a header of 2^63 bytes": _write("adapter_model.safetensors", lambda c: _header(2**63 - 1, b"{}")),
    "a header that is no JSON": _write("adapter_model.safetensors", lambda c: _header(8, b"[[[[[[[[")),
    "a nested header": _write("adapter_model.safetensors", lambda c: _header(60000, b"[" * 60000)),
    "offsets past the end": _write(
        "adapter_model.safetensors",
        lambda c: _header(72, b'{"a":{"dtype":"F32","shape":[9999999],"data_offsets":[0,39999996]}}'.ljust(72)),
    ),
    "an empty weight file": _write("adapter_model.safetensors", lambda c: b""),
    "auto_mapping": _json_value(
        "adapter_config.json", {"auto_mapping": {"base_model_class": "Mine", "parent_library": "mine"}}
    ),
    "auto_map and code": _module,
    "auto_map in the config": _json_value("config.json", {"auto_map": {"AutoModel": "mine.Mine"}, "model_type": "x"}),
    "another peft type": _json_value("adapter_config.json", {"peft_type": "MIXED"}),
    "an unknown peft type": _json_value("adapter_config.json", {"peft_type": "NO_SUCH"}),
    "a base elsewhere": _json_value("adapter_config.json", {"base_model_name_or_path": "/etc"}),
    "targets as a slow pattern": _json_value("adapter_config.json", {"target_modules": "(a+)+$"}),
    "targets as a broken pattern": _json_value("adapter_config.json", {"target_modules": "((("}),
    "a huge rank": _json_value("adapter_config.json", {"r": 10**9}),
    "unknown fields": _json_value("adapter_config.json", {"no_such_field": 1, "runtime_config": {"x": 1}}),
    "a template that breaks out": _write("chat_template.jinja", lambda c: TEMPLATE.format(canary=str(c)).encode()),
    "a template in the tokenizer": _json_value(
        "tokenizer_config.json", {"chat_template": TEMPLATE.format(canary="CANARY")}
    ),
    "a recipe with tags": _write(
        "recipe.yaml", lambda c: f"name: !!python/object/apply:os.system ['touch {c}']\n".encode()
    ),
    "a recipe of another base": lambda folder, canary: (folder / "recipe.yaml").write_text(
        (folder / "recipe.yaml").read_text().replace("bert", "../../etc")
    ) and None,
    "a description that is a list": _write("peftkit.json", lambda c: b"[1, 2]"),
    "a nested description": _write("peftkit.json", lambda c: b'{"format": 1, "info": ' + b"[" * 5000),
    "a description of the future": _json_value("peftkit.json", {"format": 99}),
    "a description of another base": _json_value("peftkit.json", {"fingerprint": "0" * 64}),
    "fewer labels": _json_value(
        "peftkit.json", {"info": {"problem_type": "single_label_classification", "labels": ["a"]}}
    ),
    "labels that are no names": _json_value(
        "peftkit.json", {"info": {"problem_type": "single_label_classification", "labels": [1, None, {}]}}
    ),
    "a tokenizer that is no JSON": _write("tokenizer.json", lambda c: b"{"),
    "a tokenizer of odd parts": _json_value("tokenizer.json", {"model": {"type": "Mine"}}),
    "a config that is a list": _write("config.json", lambda c: b"[]"),
    "a config of odd sizes": _json_value("config.json", {"hidden_size": -3, "num_hidden_layers": "many"}),
    "figures that are no JSON": _write("metrics.json", lambda c: b"\xff\xfe"),
    "a link out of the folder": _link,
}  # fmt: skip


def hostile(folder: Path, whole: Reference, trials: int, seed: int = 0) -> Outcome:
    """Every harm above in turn, and then values at random in the files that say how to load: nothing runs."""
    outcome = begin("hostile adapters and templates", "a model or one message, 0 canaries run, 0 writes elsewhere")
    canary = folder / "canary"
    for trial, generator in outcome.left(trials, seed):
        run = folder / f"hostile-{trial}"
        shutil.copytree(whole.path / "adapter", run)
        names = list(HARMS)
        name = names[trial] if trial < len(names) else "values at random"
        harm = HARMS.get(name) or _at_random(generator)
        harm(run, canary)
        before = _listing(folder)
        said = _load(run)
        problems = [said] if said and not said.startswith("refused") else []
        problems += ["code was run"] if canary.exists() else []
        problems += ["files were written"] if _listing(folder) != before else []
        outcome.add("refused; the others load, as what was changed does not matter", said.startswith("refused"))
        outcome.count(problems, name)
        shutil.rmtree(run)
        canary.unlink(missing_ok=True)
    return outcome


def _load(folder: Path) -> str:
    """Loads and uses an adapter; what came of it: empty when all went well."""
    import peftkit

    try:
        peftkit.load(folder).predict(["the king said good day"])
    except PeftkitError as error:
        return f"refused: {error}" if str(error) else "an empty message"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


def _at_random(generator: random.Random) -> Callable[[Path, Path], None]:
    """One to three values in a JSON file of the adapter replaced by odd ones."""

    def harm(folder: Path, canary: Path) -> None:
        name = generator.choice(["adapter_config.json", "peftkit.json", "config.json", "tokenizer_config.json"])
        file = folder / name
        held = json.loads(file.read_text())
        for _ in range(generator.randint(1, 3)):
            held[generator.choice(sorted(held))] = generator.choice(ODD)
        file.write_text(json.dumps(held))

    return harm


def _listing(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*") if "__pycache__" not in str(path))
