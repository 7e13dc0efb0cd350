from __future__ import annotations

import errno
import shutil

import huggingface_hub
import pytest

from runtime.checkpoints.checkpoint import open_checkpoint, read_config
from runtime.common.errors import CheckpointError
from tests.helpers.damage import refusal


def test_a_hub_id_downloads_weights_and_json_only(tiny_checkpoint, monkeypatch):
    requested = {}

    def snapshot_download(model_id, *, repo_type, revision, allow_patterns, ignore_patterns):
        requested.update(model_id=model_id, revision=revision, allow=allow_patterns, ignore=ignore_patterns)
        return str(tiny_checkpoint)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    checkpoint = open_checkpoint("Qwen/WorldPM-72B")
    assert checkpoint.name == requested["model_id"] == "Qwen/WorldPM-72B"
    assert requested["allow"] == ["*.safetensors", "*.json", "merges.txt", "*.jinja", "parity_pairs.jsonl", "README.md"]
    assert requested["ignore"] == ["*/*"]
    assert requested["revision"] is None
    read_config("Qwen/WorldPM-72B@v1.0")
    assert requested["allow"] == ["config.json"]
    assert (requested["model_id"], requested["revision"]) == ("Qwen/WorldPM-72B", "v1.0")


def hub_error(name):
    kind = getattr(huggingface_hub.errors, name)
    return kind.__new__(kind)  # the constructor needs a response of the network library


@pytest.mark.parametrize(
    "error, named",
    [
        (lambda: hub_error("RepositoryNotFoundError"), "neither a local directory nor a model on the hub"),
        (lambda: hub_error("GatedRepoError"), "accept terms"),
        (lambda: hub_error("RevisionNotFoundError"), "has no revision v9; name a branch, a tag"),
        (
            lambda: ConnectionError("no route"),
            r"could not be downloaded \(ConnectionError: no route\).*name their directory",
        ),
        (lambda: TimeoutError(), r"could not be downloaded \(TimeoutError\)"),
    ],
)
def test_a_failed_download_names_the_remedy(monkeypatch, error, named):
    def snapshot_download(*_, **__):
        raise error()

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=f"^Qwen/WorldPM-72B .*{named}"):
        open_checkpoint("Qwen/WorldPM-72B@v9")


def test_a_path_is_never_looked_up_on_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("requested the hub"))
    for source in (
        "./out/model",
        "/no/such",
        "out",
        "a/b/c",
        "../up",
        "a/b@",
        "a@b",
        "a@b/c",
        tmp_path / "gone" / "model",
    ):
        assert "does not exist" in refusal(source)


def test_a_full_disk_is_not_reported_as_a_network_error(monkeypatch):
    def snapshot_download(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "/cache/model.safetensors")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(OSError, match="No space left on device"):
        open_checkpoint("Qwen/WorldPM-72B")


def test_a_directory_whose_name_has_an_at_sign_is_a_directory(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("requested the hub"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_checkpoint, tmp_path / "owner" / "model@v1")
    checkpoint = open_checkpoint("owner/model@v1")
    assert (checkpoint.name, checkpoint.commit) == ("model@v1", None)
