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
    assert names == {"cpu", "single_gpu", "multi_gpu", "multi_node", "fsdp2", "fsdp2_qlora"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_it_and_knows_every_key(path):
    config = load_config_from_file(str(path))
    options = {action.dest for action in launch_command_parser()._actions}
    for name in config.fsdp_config:
        assert name in options, f"accelerate launch has no option {name}"
    text = path.read_text()
    assert f"configs/accelerate/{path.name}" in text, "it opens with its command"
    assert yaml.safe_load(text)["mixed_precision"] == "no", "the recipe decides the precision"
    kind = str(config.distributed_type).rpartition(".")[2]
    assert kind == {"multi_gpu": "MULTI_GPU", "multi_node": "MULTI_GPU", "fsdp2": "FSDP", "fsdp2_qlora": "FSDP"}.get(
        path.stem, "NO"
    )


def test_a_key_that_accelerate_does_not_know_is_noticed(tmp_path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(CONFIGS[0].read_text() + "num_procesess: 2\n")
    with pytest.raises(ValueError, match="num_procesess"):
        load_config_from_file(str(wrong))


@pytest.mark.parametrize(
    ("kind", "version", "said"),
    [("DEEPSPEED", False, "DeepSpeed"), ("FSDP", False, "fsdp_version: 2"), ("MEGATRON_LM", False, "MEGATRON_LM")],
)
def test_what_the_loop_cannot_train_with_is_refused_before_any_work(kind, version, said):
    from types import SimpleNamespace

    from peftkit.errors import RecipeError
    from peftkit.training import sharding

    with pytest.raises(RecipeError, match=said):
        sharding.check(SimpleNamespace(distributed_type=SimpleNamespace(value=kind), is_fsdp2=version))
    sharding.check(SimpleNamespace(distributed_type=SimpleNamespace(value="FSDP"), is_fsdp2=True))
