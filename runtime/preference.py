"""What a difference of scores says about which of two responses is preferred."""

from __future__ import annotations

import math


def probability_preferred(margin: float) -> float:
    """P(the first is preferred) = sigmoid(margin): the Bradley-Terry reading of a first score less a second one."""
    return math.exp(min(margin, 0)) / (1 + math.exp(-abs(margin)))  # neither overflows
