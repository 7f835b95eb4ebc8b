"""What ``part.field=value`` means, and what is said when it means nothing."""

from __future__ import annotations

import pytest

from peftkit import Recipe
from peftkit.errors import RecipeError
from peftkit.schema.overrides import apply, parse


@pytest.fixture
def base():
    return Recipe.parse(
        {
            "name": "base",
            "model": {"source": "some/model", "revision": "abc"},
            "method": {"kind": "lora", "rank": 4, "alpha": 32},
            "data": {"source": "some/data", "revision": "def", "splits": {"test": "dev"}},
        }
    )


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("training.learning_rate=1e-3", "training.learning_rate", 1e-3),
        ("training.learning_rate=null", "training.learning_rate", None),
        ("training.epochs=0.5", "training.epochs", 0.5),
        ("training.evaluate_every=20", "training.evaluate_every", 20),
        ("training.evaluate_every=epoch", "training.evaluate_every", "epoch"),
        ("training.early_stopping.patience=2", "training.early_stopping.patience", 2),
        ("evaluation.metrics=[accuracy, f1]", "evaluation.metrics", ("accuracy", "f1")),
        ("data.labels=[no, yes]", "data.labels", ("no", "yes")),
        ("data.limit.train=8", "data.limit", {"train": 8}),
        ("data.limit=8", "data.limit", 8),
        ("data.splits.validation=held", "data.splits", {"test": "dev", "validation": "held"}),
        ("data.source=C:\\rows=1.csv", "data.source", "C:\\rows=1.csv"),
        ("data.augmentation.copies=2", "data.augmentation.copies", 2),
        ("tracking=[]", "tracking", ()),
        ("output_dir=/tmp/here", "output_dir", "/tmp/here"),
        ("method.rank=16", "method.rank", 16),
    ],
)
def test_an_override_sets_its_field(base, override, path, value):
    found = apply(base, [override])
    for step in path.split("."):
        found = getattr(found, step)
    assert found == value


def test_overrides_leave_the_recipe_they_start_from(base):
    before = base.model_dump()
    apply(base, ["training.epochs=9", "data.splits.train=all"])
    assert base.model_dump() == before


@pytest.mark.parametrize("swap", ["method.kind=frozen", "method=frozen", "method={kind: frozen}"])
def test_a_new_kind_swaps_the_part(base, swap):
    assert apply(base, [swap]).method.kind == "frozen"


def test_the_same_kind_keeps_the_fields(base):
    assert apply(base, ["method.kind=lora"]).method.rank == 4


@pytest.mark.parametrize("order", [1, -1])
def test_fields_of_a_new_kind_may_stand_on_either_side_of_the_swap(base, order):
    swapped = apply(base, ["method.kind=top_k", "method.k=1"][::order])
    assert swapped.method.kind == "top_k"
    assert swapped.method.k == 1


@pytest.mark.parametrize("order", [1, -1])
def test_a_new_source_drops_the_old_revision_but_not_a_new_one(base, order):
    assert apply(base, ["model.source=./here"]).model.revision is None
    assert apply(base, ["model.source=some/model"]).model.revision == "abc"
    both = apply(base, ["data.source=other/data", "data.revision=v2"][::order])
    assert (both.data.source, both.data.revision) == ("other/data", "v2")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("epochs=1", "did you mean 'training.epochs'?"),
        ("rank=1", "did you mean 'method.rank'?"),
        ("trainig.epochs=1", "did you mean 'training'?"),
        ("training.epoch=1", "did you mean 'epochs'?"),
        ("method.rnak=1", "did you mean 'rank'?"),
        ("training.epochs", "expected part.field=value"),
        ("=3", "expected part.field=value"),
        ("data.source=[a", "not a value that YAML can read"),
        ("training.epochs.x=1", "training.epochs"),
        ("method.kind=lor", "did you mean 'lora'?"),
        ("training.batch_size=-4", "greater than or equal to 1, found -4"),
        ("training=3", "training"),
    ],
)
def test_a_wrong_override_is_named_with_the_nearest_field(base, override, said):
    with pytest.raises(RecipeError) as caught:
        apply(base, [override])
    assert said in str(caught.value)
    assert override in str(caught.value)


def test_an_empty_value_is_the_empty_string():
    assert parse("data.text=") == (["data", "text"], "")
