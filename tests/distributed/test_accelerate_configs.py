"""The configs for `accelerate launch` are read by Accelerate itself, which knows every key of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "accelerate").glob("*.yaml"))


def test_every_setup_has_its_config():
    names = {path.stem for path in CONFIGS}
    assert names == {"cpu", "single_gpu", "multi_gpu", "multi_node", "fsdp2", "fsdp2_qlora", "zero2", "zero3"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_it_and_knows_every_key(path):
    config = load_config_from_file(str(path))
    options = {action.dest for action in launch_command_parser()._actions}
    for name in [*config.fsdp_config, *config.deepspeed_config]:
        assert name in options, f"accelerate launch has no option {name}"
    text = path.read_text()
    assert f"configs/accelerate/{path.name}" in text, "it opens with its command"
    assert yaml.safe_load(text)["mixed_precision"] == "no", "the recipe decides the precision"
    kind = str(config.distributed_type).rpartition(".")[2]
    family = path.stem.partition("_")[0].rstrip("23")
    assert kind == {"multi": "MULTI_GPU", "fsdp": "FSDP", "zero": "DEEPSPEED"}.get(family, "NO")


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_is_set_up_as_the_loop_takes_it(monkeypatch, small_recipe, stage):
    """Through Accelerate's own launcher and plugin, whose values the loop checks."""
    from types import SimpleNamespace

    from accelerate.utils import DeepSpeedPlugin
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    from peftkit.distributed import zero

    config = load_config_from_file(str(next(path for path in CONFIGS if path.stem == f"zero{stage}")))
    given = launch_command_parser().parse_args(["--use_deepspeed", "--num_processes", "2", "train.py"])
    for name, value in config.deepspeed_config.items():
        setattr(given, name, value)
    given.gradient_accumulation_steps = given.gradient_accumulation_steps or 1
    given.deepspeed_fields_from_accelerate_config = ""
    given.num_machines, given.machine_rank = config.num_machines, config.machine_rank
    given.mixed_precision, given.gpu_ids, given.main_process_port = "no", "all", 29500
    _, environment = prepare_deepspeed_cmd_env(given)
    for name in [name for name in environment if name.startswith("ACCELERATE_")]:
        monkeypatch.setenv(name, environment[name])
    assert zero.is_requested()
    plugin = DeepSpeedPlugin()
    assert plugin.zero_stage == stage
    zero.check(SimpleNamespace(deepspeed_plugin=plugin), small_recipe)


def test_a_key_that_accelerate_does_not_know_is_noticed(tmp_path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(CONFIGS[0].read_text() + "num_procesess: 2\n")
    with pytest.raises(ValueError, match="num_procesess"):
        load_config_from_file(str(wrong))


@pytest.mark.parametrize(
    ("kind", "version", "said"), [("FSDP", False, "fsdp_version: 2"), ("MEGATRON_LM", False, "MEGATRON_LM")]
)
def test_what_the_loop_cannot_train_with_is_refused_before_any_work(small_recipe, kind, version, said):
    from types import SimpleNamespace

    from peftkit.distributed import sharding
    from peftkit.errors import RecipeError

    with pytest.raises(RecipeError, match=said):
        sharding.check(SimpleNamespace(distributed_type=SimpleNamespace(value=kind), is_fsdp2=version), small_recipe)
    sharding.check(SimpleNamespace(distributed_type=SimpleNamespace(value="FSDP"), is_fsdp2=True), small_recipe)
