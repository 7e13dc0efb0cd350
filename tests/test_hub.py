from __future__ import annotations

import errno

import huggingface_hub
import pytest

from runtime.checkpoint import open_checkpoint, read_architecture
from runtime.errors import CheckpointError
from tests.damage import refusal


def test_a_hub_id_downloads_weights_and_json_only(tiny_checkpoint, monkeypatch):
    asked = {}

    def snapshot_download(model_id, *, allow_patterns, ignore_patterns):
        asked.update(model_id=model_id, allow=allow_patterns, ignore=ignore_patterns)
        return str(tiny_checkpoint)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    checkpoint = open_checkpoint("Qwen/WorldPM-72B")
    assert checkpoint.name == asked["model_id"] == "Qwen/WorldPM-72B"
    assert asked["allow"] == ["*.safetensors", "*.json", "merges.txt", "*.jinja", "parity_pairs.jsonl"]
    assert asked["ignore"] == ["*/*"]
    read_architecture("Qwen/WorldPM-72B")
    assert asked["allow"] == ["config.json"]


def hub_error(name):
    kind = getattr(huggingface_hub.errors, name)
    return kind.__new__(kind)  # its constructor wants a response of whichever network library is in use


@pytest.mark.parametrize(
    "error, named",
    [
        (lambda: hub_error("RepositoryNotFoundError"), "neither a directory here nor a model on the hub"),
        (lambda: hub_error("GatedRepoError"), "accept terms"),
        (
            lambda: ConnectionError("no route"),
            r"could not be downloaded \(ConnectionError: no route\).*name their directory",
        ),
        (lambda: TimeoutError(), r"could not be downloaded \(TimeoutError\)"),
    ],
)
def test_a_hub_id_that_cannot_be_fetched_says_the_way_out(monkeypatch, error, named):
    def snapshot_download(*_, **__):
        raise error()

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=f"^Qwen/WorldPM-72B .*{named}"):
        open_checkpoint("Qwen/WorldPM-72B")


def test_a_path_is_never_sent_to_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    for source in ("./out/model", "/no/such", "out", "a/b/c", "../up", tmp_path / "gone" / "model"):
        assert "does not exist" in refusal(source)


def test_a_full_disk_is_not_taken_for_a_lost_connection(monkeypatch):
    def snapshot_download(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "/cache/model.safetensors")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(OSError, match="No space left on device"):
        open_checkpoint("Qwen/WorldPM-72B")
