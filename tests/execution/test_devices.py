"""Device names, memory limits, and the errors for invalid ones."""

from __future__ import annotations

import pytest

from runtime.common.errors import ConfigurationError
from runtime.common.terminal import GIB
from runtime.execution.devices import Device, find_devices, parse_memory


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda name: ((10 if name == "cuda:0" else 20) * GIB, 99 * GIB))


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (None, {}),
        ("cuda:0=20GiB", {"cuda:0": 20 * GIB}),
        ("cuda=20GiB, cpu=1.5GB", {"cuda:0": 20 * GIB, "cpu": 1_500_000_000}),
        ({"cpu:1": "512KiB", "cpu": 123}, {"cpu:1": 512 << 10, "cpu": 123}),
    ],
)
def test_sizes(memory, expected):
    assert parse_memory(memory) == expected


@pytest.mark.parametrize("memory", ["cuda:0", "cpu=", "cpu=much", "cpu=-1GiB", "cpu=0GiB", "cpu=1TiBs", {"cpu": 0}])
def test_invalid_sizes_are_refused(memory):
    with pytest.raises(ConfigurationError, match="sizes such as cuda:0=20GiB"):
        parse_memory(memory)


def test_auto_is_the_cpu_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = find_devices("auto", {"cpu": "3GiB"})
    assert found.selected == (Device("cpu", 3 * GIB),) and found.kind == "cpu" and not found.use_all


def test_auto_is_the_gpu_with_most_memory_first(two_gpus):
    found = find_devices("auto")
    assert [device.name for device in found.selected] == ["cuda:1", "cuda:0"] and not found.use_all
    assert found.selected[0].budget == int(0.9 * 20 * GIB)
    assert find_devices("auto", "cuda:0=30GiB").selected[0] == Device("cuda:0", 30 * GIB)


@pytest.mark.parametrize("names", ["cuda:1,cuda:0", ["cuda:1", "cuda:0"], ["cuda:1", "cuda"], "cuda:1, cuda"])
def test_named_devices_are_all_used_in_their_order(two_gpus, names):
    found = find_devices(names)
    assert [device.name for device in found.selected] == ["cuda:1", "cuda:0"] and found.use_all


def test_simulated_devices_compute_on_the_cpu():
    found = find_devices("cpu:0,cpu:1", "cpu:0=1GiB,cpu:1=2GiB,cpu=3GiB")
    assert [str(device.torch_device) for device in found.selected] == ["cpu", "cpu"]
    assert [device.budget for device in (*found.selected, found.host)] == [GIB, 2 * GIB, 3 * GIB]
    assert not any(device.is_host for device in found.selected) and found.host.is_host


@pytest.mark.parametrize(
    ("names", "memory", "message"),
    [
        ("tpu", None, "devices has 'tpu'; auto, cpu, cuda:N, or several separated by commas were expected"),
        ("cuda:one", None, "devices has 'cuda:one'"),
        ("", None, "devices has ''"),
        ("cuda:2", None, "cuda:2: this machine has 2 CUDA devices that torch can use; try cpu"),
        ("cuda:0,cuda:0", None, "name each device once"),
        ("cuda:0,cpu", None, "Name the GPUs alone"),
        ("cpu,cpu:1", None, "cpu is all of the CPU"),
        ("cuda:0", "cuda:1=1GiB", "memory is given for cuda:1, which is not among the devices cuda:0"),
    ],
)
def test_invalid_devices_are_refused(two_gpus, names, memory, message):
    with pytest.raises(ConfigurationError, match=message):
        find_devices(names, memory)


def test_a_gpu_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigurationError, match="cuda:0: this machine has 0 CUDA devices"):
        find_devices("cuda:0")
