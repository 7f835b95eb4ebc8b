"""Named things: found by importing a package, refused when taken, suggested when nearly right."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint

import pytest

from peftkit import registry as module
from peftkit.errors import RecipeError
from peftkit.registry import Registry
from peftkit.schema.registries import METHODS, TASKS


def one():
    """A thing."""


def other():
    """Another thing."""


def test_a_registered_item_is_found_by_name_and_unknown_names_suggest_the_nearest():
    things = Registry("thing")
    assert things.register("one")(one) is one
    things.register("other")(other)
    assert things.get("one") is one
    assert (things.names(), "one" in things, "two" in things, list(things)) == (
        ["one", "other"],
        True,
        False,
        ["one", "other"],
    )
    with pytest.raises(RecipeError, match=r"unknown thing 'othr': did you mean 'other'\?"):
        things.get("othr")


def test_a_taken_name_is_refused_and_both_places_are_named():
    things = Registry("thing")
    things.register("one")(one)
    things.register("one")(one)  # the same item again, as when a file is imported twice
    with pytest.raises(RecipeError, match=r"thing 'one' is registered twice: one in .*test_registry.*other in"):
        things.register("one")(other)


def test_modules_of_the_package_register_themselves_when_first_asked(tmp_path, monkeypatch):
    (tmp_path / "plugins_here").mkdir()
    (tmp_path / "plugins_here" / "__init__.py").write_text("from peftkit.registry import Registry\n", encoding="utf-8")
    code = "from tests.test_registry import LATE\n\n@LATE.register('late')\ndef late():\n    return 1\n"
    (tmp_path / "plugins_here" / "late.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "tests.test_registry", sys.modules[__name__])
    assert "plugins_here.late" not in sys.modules
    assert LATE.get("late")() == 1


LATE: Registry = Registry("late thing", package="plugins_here")


def test_an_installed_distribution_adds_items_through_entry_points(monkeypatch):
    point = EntryPoint(name="added", value=f"{__name__}:other", group="some.group")
    monkeypatch.setattr(module, "entry_points", lambda group: [point] if group == "some.group" else [])
    assert Registry("thing", group="some.group").get("added") is other


def test_the_built_in_methods_and_tasks_are_there_under_their_kind():
    assert {"lora", "frozen", "top_k", "full"} <= set(METHODS)
    assert "classification" in TASKS
    for registry in (METHODS, TASKS):
        for name in registry:
            assert registry.get(name).model_fields["kind"].default == name
            assert registry.get(name).__doc__


def test_errors_reach_other_processes_as_they_were_raised():
    import pickle

    from peftkit.errors import DataError, Interrupted

    stopped = pickle.loads(pickle.dumps(Interrupted("stopped by SIGTERM", 15)))
    assert (str(stopped), stopped.exit_code) == ("stopped by SIGTERM", 143)
    wrong = pickle.loads(pickle.dumps(DataError("expected text", file="a.csv", line=3, column="text")))
    assert (wrong.line, str(wrong)) == (3, "a.csv, line 3, column 'text': expected text")


@pytest.mark.parametrize(("old", "new"), [("begin", "on_train_begin"), ("after_step", "on_step_end")])
def test_a_method_of_another_package_that_overrides_a_renamed_member_is_refused(old, new):
    from peftkit.schema.method import Method

    with pytest.raises(TypeError, match=rf"Theirs\.{old}: peftkit calls this '{new}' now"):
        type("Theirs", (Method,), {old: lambda self, *given: None})
