"""Interrupt a run at a chosen call."""

from __future__ import annotations

from collections.abc import Callable

import pytest


def raise_at_call(
    patch: pytest.MonkeyPatch, owner: object, name: str, call: int, error: type[BaseException], after: bool = False
) -> None:
    """Let the `call`-th call of `owner.name` raise, before it does anything or `after` it did everything.

    A class, so that no reference to a raised error, and with it to the interrupted frames, outlives the run.
    """
    real: Callable = getattr(owner, name)
    calls = 0

    def wrapper(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call and not after:
            raise error
        result = real(*args, **kwargs)
        if calls == call:
            raise error
        return result

    patch.setattr(owner, name, wrapper)
