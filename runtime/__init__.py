"""Score conversations with WorldPM reward models, 16-bit or quantized.

>>> from runtime import Scorer
>>> scorer = Scorer.from_pretrained("demo")
>>> scorer.compare("Tips for better sleep?", "Keep a regular bedtime.", "idk lol").probability_a
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.scorer import Comparison, Scorer

__all__ = ["Comparison", "Scorer"]


def __getattr__(name: str) -> Any:
    """Import the scorer on first access, so that light modules such as `runtime.common` import without torch."""
    if name in __all__:
        from runtime import scorer

        return getattr(scorer, name)
    raise AttributeError(f"module 'runtime' has no attribute {name!r}")
