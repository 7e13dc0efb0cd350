"""The measured matmul rate, and the devices in use."""

from __future__ import annotations

import torch

from runtime.execution.devices import matmul_rate, used_devices


def test_the_rate_is_plausible():
    assert 1e8 < matmul_rate(torch.float32, "cpu", seconds=0.01) < 1e14


def test_devices_are_those_that_hold_something(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda index: [0, 7, 9][index])
    assert used_devices() == ["cuda:1", "cuda:2"]
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda _: 0)
    assert used_devices() == ["cpu"]
