"""Every method's planned parameters and bytes beside those of the model that a run builds, tensor by tensor."""

from __future__ import annotations

import pytest

from peftkit.models import dtypes
from peftkit.models.loading import build
from peftkit.models.meta_model import build_meta_model
from peftkit.models.tokenizer import load_tokenizer
from peftkit.planning.memory import persistent_memory
from peftkit.planning.trace import fake_tensor_mode
from tests import tiny
from tests.methods.every_method import EXAMPLES, INFOS, Cell

CELLS = [
    Cell(name, model, None)
    for name, example in EXAMPLES.items()
    for model in example.models[:1]
    if name != "lora-loftq"  # stands on NF4 alone
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    llama = tiny.tiny_llama(folder / "llama")
    return {"encoder": tiny.tiny_bert(folder / "bert"), "decoder": llama, "decoder-classifier": llama}


def both(cell, bases):
    """The planned model and the real one."""
    recipe, info = cell.recipe(bases[cell.model]), INFOS[cell.model]
    tokenizer = load_tokenizer(recipe.model)
    real = build(recipe, info, tokenizer).model
    with fake_tensor_mode():
        planned = build_meta_model(recipe, info, tokenizer, dtypes.dtype_for(recipe.model)).model
        return planned, real, persistent_memory(planned, "adamw")


def table(model):
    return {name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in model.named_parameters()}


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_planned_parameters_are_those_that_are_built(cell, bases):
    planned, real, _ = both(cell, bases)
    assert table(planned) == table(real)


QUANTIZED = [
    *(
        (name, kind)
        for name in ("lora", "ia3", "bottleneck-houlsby", "bottleneck-parallel")
        for kind in ("nf4", "int8")
    ),
]


@pytest.mark.parametrize(("name", "quantization"), QUANTIZED)
def test_planned_bytes_over_quantized_weights_are_those_that_are_held(name, quantization, bases):
    planned, real, held = both(Cell(name, "decoder", quantization), bases)
    trained = sum(p.numel() * 4 for p in real.parameters() if p.requires_grad)
    assert held.trained == trained
    frozen = [p for p in real.parameters() if not p.requires_grad]
    assert held.frozen == pytest.approx(sum(p.numel() * p.element_size() for p in (*frozen, *real.buffers())), abs=64)
    assert held.constants == pytest.approx(tiny.scale_bytes(real), rel=0.01)
    assert planned is not real
    assert table(planned) == table(real)
