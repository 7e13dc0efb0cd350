"""The kit's version, said in one place for reports and cards."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def kit_version() -> str:
    """The installed version, or `source` in a tree that was never installed."""
    try:
        return version("worldpm-kit")
    except PackageNotFoundError:
        return "source"
