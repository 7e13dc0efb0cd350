"""Version of the installed package, for reports and model cards."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def kit_version() -> str:
    """Return the installed version, or `source` in a tree that is not installed."""
    try:
        return version("worldpm-kit")
    except PackageNotFoundError:
        return "source"
