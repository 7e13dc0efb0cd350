"""What stops a sweep that is under way: full disks, failing reads, numbers that are none. All of it resumes."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from quantize.arguments import parse
from quantize.job.inputs import read_inputs
from quantize.sweep.hidden_states import SweepStates
from runtime.checkpoints.checkpoint import open_checkpoint
from runtime.checkpoints.safetensors_file import TensorInfo
from runtime.common.errors import NonFiniteError
from runtime.execution.block_loading import check_finite_tensors
from tests.helpers.tiny_job import arguments, digests, quantize, write_job_model, write_pairs

pytestmark = pytest.mark.slow  # each test runs a quantization twice

LAYERS = 4
# These tests are about the loop over blocks; the backward sweep before it has its own.
SMALL = ("--rows", "8", "--parity-pairs", "6", "--method", "rtn")
GO_ON = "Finished blocks are kept; run the same command with --resume."


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory with `model` and `pairs.jsonl`; not to be changed."""
    place = tmp_path_factory.mktemp("sweep")
    write_job_model(place / "model", layers=LAYERS)
    write_pairs(place / "pairs.jsonl", words=12)
    return place


@pytest.fixture(scope="module")
def undisturbed(place) -> dict[str, str]:
    """What a run without trouble writes, but for the model's name."""
    assert quantize(place / "model", place / "pairs.jsonl", place / "undisturbed", *SMALL) == 0
    return digests(place / "undisturbed")


@pytest.fixture
def model(place, tmp_path) -> Path:
    """A copy of the model that a test may damage."""
    return shutil.copytree(place / "model", tmp_path / "model")


def finished_blocks(output: Path) -> int:
    state = output / "job" / "job.json"
    return len(json.loads(state.read_text())["blocks"]) if state.exists() else 0


def after_block(monkeypatch: pytest.MonkeyPatch, block: int, act: Callable[[], object]) -> None:
    """Call `act` when `block` blocks are done, once."""
    real = SweepStates.swap_buffers

    def swap_buffers(self: SweepStates) -> None:
        real(self)
        if self.reference.finished_blocks == block:
            act()

    monkeypatch.setattr(SweepStates, "swap_buffers", swap_buffers)


# ---- full disk ------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """A function that mounts a file system of so many bytes, or changes its size, and gives its directory."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def size(count: int) -> Path:
        options = f"{'remount,' if disk.is_mount() else ''}size={count}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a file system is not permitted here")
        return disk

    yield size
    if disk.is_mount():
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize(
    ("room", "least", "most"),
    [("half the streams", 0, 0), ("the streams and two blocks", 1, 3)],
)
def test_a_full_disk_stops_with_its_name_and_resumes_when_there_is_room(
    place, undisturbed, small_disk, capfd, monkeypatch, room, least, most
):
    given = arguments(place / "model", place / "pairs.jsonl", Path("unused"), *SMALL)
    states = read_inputs(parse(given)).plan.hidden_state_bytes
    disk = small_disk(states // 2 if room.startswith("half") else states + 400_000)
    monkeypatch.setattr("quantize.run.check_disk", lambda *_: None)  # somebody else filled it meanwhile
    assert quantize(place / "model", place / "pairs.jsonl", disk / "out", *SMALL) == 2
    said = capfd.readouterr().err
    assert said.splitlines()[-1].startswith(f"error: {disk / 'out'}")
    assert f": no space left on device; free some space on {disk}, or use another disk. " in said.splitlines()[-1]
    assert said.rstrip().endswith(GO_ON) and "Traceback" not in said
    assert least <= finished_blocks(disk / "out") <= most
    assert not list(disk.rglob("*.partial"))
    small_disk(64 << 20)
    assert quantize(place / "model", place / "pairs.jsonl", disk / "out", *SMALL, "--resume") == 0
    assert digests(disk / "out") == undisturbed


def test_too_small_a_disk_is_refused_before_the_work(place, small_disk, capfd):
    disk = small_disk(1 << 19)
    assert quantize(place / "model", place / "pairs.jsonl", disk / "out", *SMALL) == 2
    assert re.search(rf"{disk / 'out'} has \d+\.\d KiB free, but \d+\.\d MiB will be written", capfd.readouterr().err)
    small_disk(64 << 20)
    assert quantize(place / "model", place / "pairs.jsonl", disk / "out", *SMALL, "--resume") == 0


def test_on_resuming_the_disk_needs_room_for_the_rest_alone(place, small_disk, monkeypatch):
    """With everything but the last block on it, the disk has no room for a whole job any more."""
    given = arguments(place / "model", place / "pairs.jsonl", Path("unused"), *SMALL)
    plan = read_inputs(parse(given)).plan
    disk = small_disk(int(1.3 * (plan.hidden_state_bytes + plan.disk_written)))
    with pytest.MonkeyPatch.context() as patch:
        after_block(patch, LAYERS - 1, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        assert quantize(place / "model", place / "pairs.jsonl", disk / "out", *SMALL) == 130
    assert shutil.disk_usage(disk).free < plan.hidden_state_bytes + plan.disk_written
    assert quantize(place / "model", place / "pairs.jsonl", disk / "out", *SMALL, "--resume") == 0


# ---- the source -----------------------------------------------------------------------------------------


def test_a_source_cut_short_under_way_is_named_and_resumes_when_it_is_whole(place, undisturbed, model, tmp_path, capfd):
    tensor = "model.layers.3.mlp.down_proj.weight"
    shard = open_checkpoint(model).tensors[tensor].file
    whole = shard.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        after_block(patch, 1, lambda: os.truncate(shard, open_checkpoint(model).tensors[tensor].offset + 100))
        assert quantize(model, place / "pairs.jsonl", tmp_path / "out", *SMALL) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert f"{shard}: {tensor} ends after 100 of" in last and last.endswith(GO_ON)
    assert finished_blocks(tmp_path / "out") == 3
    shard.write_bytes(whole)
    assert quantize(model, place / "pairs.jsonl", tmp_path / "out", *SMALL, "--resume") == 0
    assert digests(tmp_path / "out") == undisturbed


def test_a_failing_disk_is_named_and_resumes_when_it_reads_again(place, undisturbed, tmp_path, capfd):
    """EIO on the first tensor of block 2, read ahead while block 1 is at work."""

    stored = open_checkpoint(place / "model").tensors["model.layers.2.input_layernorm.weight"]

    class FailingFile:
        def __init__(self, *arguments: object) -> None:
            self.file = open(*arguments)  # type: ignore[call-overload]  # noqa: SIM115

        def __enter__(self) -> FailingFile:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

        def readinto(self, buffer: memoryview) -> int:
            if self.file.tell() == stored.offset and Path(self.file.name) == stored.file:
                raise OSError(errno.EIO, "Input/output error")
            return self.file.readinto(buffer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtime.checkpoints.safetensors_file.open", FailingFile, raising=False)
        assert quantize(place / "model", place / "pairs.jsonl", tmp_path / "out", *SMALL) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert f"{stored.file}: model.layers.2.input_layernorm.weight cannot be read: Input/output error" in last
    assert last.endswith(GO_ON) and finished_blocks(tmp_path / "out") == 2
    assert quantize(place / "model", place / "pairs.jsonl", tmp_path / "out", *SMALL, "--resume") == 0
    assert digests(tmp_path / "out") == undisturbed


# ---- numbers that are none ------------------------------------------------------------------------------


def plant(stored: TensorInfo, place: int, value: float) -> bytes:
    """Overwrite one bf16 number of a tensor in its file; what was there."""
    with open(stored.file, "r+b") as file:
        file.seek(stored.offset + 2 * place)
        before = file.read(2)
        file.seek(stored.offset + 2 * place)
        file.write(torch.tensor([value], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())
    return before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_damaged_weight_is_named_and_the_blocks_before_it_are_kept(place, undisturbed, model, tmp_path, capfd, value):
    stored = open_checkpoint(model).tensors["model.layers.2.mlp.up_proj.weight"]
    plant(stored, 777, value)
    assert quantize(model, place / "pairs.jsonl", tmp_path / "out", *SMALL) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert "model.layers.2.mlp.up_proj.weight has 1 non-finite values" in last and last.endswith(GO_ON)
    assert finished_blocks(tmp_path / "out") == 2
    shutil.copyfile(place / "model" / stored.file.name, stored.file)
    assert quantize(model, place / "pairs.jsonl", tmp_path / "out", *SMALL, "--resume") == 0
    assert digests(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_damage_outside_the_blocks_is_named_before_the_first_of_them(place, model, tmp_path, capfd, name):
    plant(open_checkpoint(model).tensors[name], 5, float("nan"))
    assert quantize(model, place / "pairs.jsonl", tmp_path / "out", *SMALL) == 2
    assert f"error: {name} has 1 non-finite values" in capfd.readouterr().err
    assert finished_blocks(tmp_path / "out") == 0


@pytest.mark.parametrize(("method", "finished"), [("gptq", 0), ("rtn", 1)])
def test_an_activation_that_overflows_is_named_by_its_block(place, model, tmp_path, capfd, method, finished):
    """Finite weights whose products are not."""
    tensors = open_checkpoint(model).tensors
    for place_in_row in range(128):
        plant(tensors["model.layers.1.self_attn.v_proj.weight"], place_in_row, 3e38)
    assert quantize(model, place / "pairs.jsonl", tmp_path / "out", *SMALL, "--method", method) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert "block 1, reference: a non-finite activation in conversation" in last and last.endswith(GO_ON)
    assert finished_blocks(tmp_path / "out") == finished


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_number_anywhere_is_found(dtype, value):
    tensor = torch.full((300, 7), torch.finfo(dtype).max, dtype=dtype)  # a sum of these would overflow
    check_finite_tensors({"weight": tensor})
    for where in (0, 1234, 2099):
        damaged = tensor.clone()
        damaged.view(-1)[where] = value
        with pytest.raises(NonFiniteError, match=r"model\.layers\.7\.weight has 1 non-finite"):
            check_finite_tensors({"fine": tensor, "weight": damaged}, "model.layers.7.")
