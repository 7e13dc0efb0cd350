"""How fast something was scored, from what was timed: figures for programs, and a table for people."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from runtime.architecture import Architecture
from runtime.sizes import show_size


@dataclass(frozen=True)
class Timing:
    """What was counted and timed.

    Attributes:
        conversations, rendered_tokens: of one round, each conversation whole.
        computed_tokens: of one round, what conversations share counted once.
        rounds: seconds of each.
        matmul_rate: floating-point operations a second of a large matrix product on the same devices.
        load: seconds until the model could score.
        first_score: seconds until it had scored one conversation, loading included.
        memory: peak bytes of the process.
        gpu_memory: peak bytes of tensors, by device.
    """

    conversations: int
    rendered_tokens: int
    computed_tokens: int
    rounds: list[float]
    matmul_rate: float
    load: float
    first_score: float
    memory: int
    gpu_memory: dict[str, int]

    @property
    def seconds(self) -> float:
        """Of the median round."""
        return statistics.median(self.rounds)

    def rate(self, architecture: Architecture) -> float:
        """Floating-point operations a second of the linears, of the median round."""
        return architecture.linear_work(self.computed_tokens, self.conversations) / self.seconds

    def figures(self, architecture: Architecture) -> dict[str, object]:
        """Every figure, by name, in seconds, bytes and floating-point operations a second."""
        rate = self.rate(architecture)
        return {
            "conversations": self.conversations,
            "rendered_tokens": self.rendered_tokens,
            "computed_tokens": self.computed_tokens,
            "seconds": [round(each, 4) for each in self.rounds],
            "tokens_per_second": round(self.computed_tokens / self.seconds, 2),
            "rendered_tokens_per_second": round(self.rendered_tokens / self.seconds, 2),
            "conversations_per_second": round(self.conversations / self.seconds, 3),
            "flops": round(rate),
            "matmul_flops": round(self.matmul_rate),
            "matmul_share": round(rate / self.matmul_rate, 4),
            "load_seconds": round(self.load, 3),
            "first_score_seconds": round(self.first_score, 3),
            "peak_memory": self.memory,
            "gpu_peak_memory": self.gpu_memory,
        }

    def table(self, architecture: Architecture, peak_of: str) -> list[tuple[str, str]]:
        """Rows of (name, value), the first being the header; `peak_of` says what dtype was multiplied where."""
        rate, span = self.rate(architecture), f"{min(self.rounds):.2f} to {max(self.rounds):.2f} s"
        gpus = "".join(f"; {show_size(size)} on {device}" for device, size in self.gpu_memory.items())
        return [
            ("figure", "value"),
            ("conversations", f"{self.conversations:,}, {self.conversations / self.seconds:,.2f}/s"),
            ("tokens", f"{self.computed_tokens:,} computed, {self.computed_tokens / self.seconds:,.0f} tokens/s"),
            ("as rendered", f"{self.rendered_tokens:,}, {self.rendered_tokens / self.seconds:,.0f} tokens/s"),
            ("products", f"{rate / 1e12:.3g} TFLOP/s"),
            ("share of peak", f"{rate / self.matmul_rate:.1%} of {self.matmul_rate / 1e12:.3g} TFLOP/s, {peak_of}"),
            (
                "a round",
                f"{self.seconds:.2f} s, the median of {len(self.rounds)} from {span}",
            ),
            ("load", f"{self.load:.2f} s"),
            ("first score", f"{self.first_score:.2f} s"),
            ("peak memory", f"{show_size(self.memory)}{gpus}"),
        ]
