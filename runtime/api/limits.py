"""How much one client may ask for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Of one request.

    Attributes:
        body_bytes: of its body, before it is parsed.
        conversations: to be scored.
        tokens: of all of them together; what they share is counted for each.
        turns: of one conversation.
        body_seconds: in which the body must have arrived.
    """

    body_bytes: int = 4 << 20
    conversations: int = 256
    tokens: int = 131_072
    turns: int = 1_000
    body_seconds: float = 30.0
