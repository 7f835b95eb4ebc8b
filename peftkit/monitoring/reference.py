"""What a run makes of its own validation rows, computed once and cached: what served texts are compared with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peftkit import __version__
from peftkit.data.pipeline import prepare
from peftkit.errors import DataError, HubError
from peftkit.export.folder import ExportFolder
from peftkit.inference import texts as text_files
from peftkit.inference import trained_model
from peftkit.inference.texts import Text
from peftkit.monitoring import features
from peftkit.monitoring.drift import Measurements
from peftkit.system.cache import cache_folder, cached_entry
from peftkit.system.files import file_digest, write_json

KIND = "monitor-reference"
MOST = 2000
"""Rows that the model is run on."""


def measured(export: ExportFolder, *, file: Path | None = None, embed: bool = False) -> Measurements:
    """The measurements of the run's validation rows, or of those of a file.

    Raises:
        DataError: the run's data are not there any more, or the file cannot be read.
    """
    texts = _sample(_texts_of_file(export, file) if file else _validation_texts(export))
    path = cache_folder(KIND) / _key(export, texts, embed)
    with cached_entry(path, lambda folder: _compute(export, texts, embed, folder)):
        with np.load(path / "numbers.npz", allow_pickle=False) as stored:
            numbers = {name: stored[name] for name in stored.files}
        vectors = np.load(path / "embeddings.npy", allow_pickle=False) if embed else None
        return Measurements(numbers, json.loads((path / "labels.json").read_text(encoding="utf-8")), vectors)


def of_rows(rows: Sequence[dict[str, Any]], answers: Sequence[tuple[Any, float | None]]) -> Measurements:
    """Measurements of texts by their features, and of the (label, probability) of each answer."""
    numbers = {
        name: np.array([row[key] for row in rows], dtype=float)
        for name, key in (("characters", "characters"), ("tokens", "tokens"), ("unknown tokens", "unknown"))
    }
    numbers["confidence"] = np.array([one for _, one in answers if one is not None], dtype=float)
    numbers["answer"] = np.array([label for label, _ in answers if isinstance(label, float)], dtype=float)
    labels: list[str] = []
    for label, _ in answers:
        if isinstance(label, (tuple, list)):
            labels += map(str, label or ("none",))
        elif isinstance(label, str):
            labels.append(label)
    return Measurements({name: values for name, values in numbers.items() if len(values)}, labels)


def embeddings(model: Any, texts: Sequence[Text]) -> np.ndarray:
    """Vectors of length 1 of served texts, rounded as the log keeps them; of pairs read apart, of the first text."""
    joined = model.recipe.task.joins_pair

    def read(text: Text) -> Text:
        if isinstance(text, str) or (joined and not model.head.writes_text):
            return text
        return "\n".join(text) if model.head.writes_text else text[0]

    vectors: np.ndarray = model.embed([read(text) for text in texts], normalize=True)
    return vectors.astype("<f2").astype(np.float32)


def _validation_texts(export: ExportFolder) -> list[Text]:
    recipe = export.recipe
    try:
        rows = prepare(recipe).splits["validation"]
    except (DataError, HubError) as error:
        raise DataError(
            f"the run's own validation rows cannot be read ({error}); give others with --reference FILE"
        ) from None
    if export.manifest.head.writes_text:
        prompts = (recipe.task.prompt(row)[0] for row in rows)
        return [prompt if isinstance(prompt, str) else tuple(turn["content"] for turn in prompt) for prompt in prompts]
    inputs = (recipe.task.input_texts(row) for row in rows)
    return [texts[0] if len(texts) == 1 else texts for texts in inputs]


def _texts_of_file(export: ExportFolder, file: Path) -> list[Text]:
    text_files.check_files(file, None)
    task, data = export.recipe.task, export.recipe.data
    columns = [data.text] if export.manifest.head.writes_text else list(task.input_columns(data))
    rows = text_files.InputTexts(file, columns, data)
    rows.check()
    return [text_files.text_of(row, columns) for row in rows]


def _sample(texts: list[Text]) -> list[Text]:
    """At most ``MOST`` of the texts, spread over all."""
    chosen = np.linspace(0, len(texts) - 1, min(MOST, len(texts))).astype(int)
    return [texts[number] for number in chosen]


def _key(export: ExportFolder, texts: list[Text], embed: bool) -> str:
    files = {path.name: file_digest(path) for path in sorted(export.path.glob("*.safetensors"))}
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    parts = [files, export.manifest.fingerprint, export.recipe.to_yaml(), digest, embed, __version__]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _compute(export: ExportFolder, texts: list[Text], embed: bool, folder: Path) -> None:
    model = trained_model.load(export, backend=None)  # nothing that depends on a measurement
    rows = [features.of_text(features.parts(text), model.tokenizer) for text in texts]
    answers: list[tuple[Any, float | None]] = []
    if not (model.head.writes_text or model.head.fills_masks):  # documents have no masks to be filled
        answers = [answer.observed() for answer in model.predict(texts)]
    result = of_rows(rows, answers)
    np.savez(folder / "numbers.npz", **result.numbers)  # type: ignore[arg-type]
    write_json(folder / "labels.json", result.labels)
    if embed:
        np.save(folder / "embeddings.npy", embeddings(model, texts), allow_pickle=False)
