"""Every method on an encoder and a decoder, over whole, NF4 and INT8 weights: trains, changes only its own parameters,
and is loaded again by plain peft; merged where it can be, with equal outputs."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from peftkit.errors import UserError
from peftkit.export.folder import open_export
from peftkit.export.formats.merged import Merged
from tests import tiny
from tests.methods import every_method
from tests.methods.every_method import EXAMPLES, QUANTIZATIONS, Cell

AUTO = {
    "encoder": AutoModelForSequenceClassification,
    "decoder": AutoModelForCausalLM,
    "decoder-classifier": AutoModelForSequenceClassification,
}
CELLS = [
    Cell(example, model, quantization)
    for example in EXAMPLES
    for model in EXAMPLES[example].models
    for quantization in QUANTIZATIONS
    # a classifier on a decoder is the decoder's layers under the encoder's head: one method shows how they are held
    if model != "decoder-classifier" or quantization is None or example == "lora"
    # LoftQ over whole weights is refused when the base's configuration is read
    if example != "lora-loftq" or quantization is not None
]


def refusal(cell: Cell) -> str | None:
    """Why the cell's recipe is refused; None where it is not."""
    try:
        cell.recipe("nowhere")
    except UserError as error:
        return str(error)
    return None


WORKING = [cell for cell in CELLS if refusal(cell) is None]


def marked(cells: list[Cell]) -> list[Any]:
    """The cells; over quantized weights only every third belongs to the quick tests, another one in each kind."""
    order = {kind: [cell for cell in cells if cell.quantization == kind] for kind in QUANTIZATIONS if kind}
    late = {cell for number, some in enumerate(order.values()) for cell in some if some.index(cell) % 3 != number}
    return [pytest.param(cell, marks=pytest.mark.slow if cell in late else (), id=str(cell)) for cell in cells]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("bases")
    llama = tiny.tiny_llama(place / "llama")
    return {"encoder": tiny.tiny_bert(place / "bert"), "decoder": llama, "decoder-classifier": llama}


@pytest.fixture(scope="module")
def made(folders):
    """Trains a cell once, whoever asks first."""
    return functools.cache(lambda cell: every_method.train(cell, folders[cell.model]))


@pytest.fixture(scope="module")
def saved(made, tmp_path_factory):
    place = tmp_path_factory.mktemp("adapters")
    return functools.cache(lambda cell: every_method.save(made(cell), place / str(cell)))


@pytest.mark.parametrize("cell", marked(WORKING))
def test_it_learns_and_nothing_else_changes(cell, made):
    found = made(cell)
    assert found.losses[-1] < found.losses[0]
    trained = {name for name, p in found.loaded.model.named_parameters() if p.requires_grad}
    assert trained == found.declared
    unmoved = found.declared - found.changed
    assert found.changed <= found.declared
    # AdaLoRA prunes some singular values, which start at 0, in whole layers
    assert not unmoved or (cell.example == "adalora" and all("lora_E" in name for name in unmoved))


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "all"])
def test_plain_peft_gives_the_same_logits_from_what_was_saved(every, saved, tmp_path):
    """One fresh process loads all adapters."""
    chosen = WORKING if every else [cell.values[0] for cell in marked(WORKING) if not cell.marks]
    kept = {str(cell): saved(cell) for cell in chosen}
    found = every_method.reload(kept, tmp_path)
    wrong = {}
    for name, one in kept.items():
        difference = float((found[name] - one["logits"]).abs().max() / one["logits"].std())
        if not difference < 1e-4:
            wrong[name] = difference
    assert not wrong


@pytest.mark.parametrize("cell", [cell for cell in WORKING if cell.quantization is None], ids=str)
def test_merged_it_is_the_same_model_without_the_method(cell, made, saved, tmp_path):
    kept, method = saved(cell), made(cell).recipe.method
    if method.unmergeable_reason():
        with pytest.raises(UserError, match=r"export\.merge"):
            cell.recipe("nowhere", export={"merge": True})
        return
    (tmp_path / "merged").mkdir()
    Merged().write(open_export(kept["job"]["folder"]), tmp_path / "merged", tolerance=None)
    model = AUTO[cell.model].from_pretrained(tmp_path / "merged")
    plain = {type(module).__module__.split(".")[0] for module in model.modules()}
    assert "peft" not in plain
    with torch.no_grad():
        logits = model.eval()(**kept["batch"]).logits
    logits = logits if cell.model != "decoder" else logits[kept["batch"]["attention_mask"].bool()]
    torch.testing.assert_close(logits, kept["logits"], rtol=1e-3, atol=1e-3 * float(kept["logits"].std()))
