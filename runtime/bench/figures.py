"""Speed figures computed from measured times, as JSON values and as a table."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from runtime.checkpoints.model_config import ModelConfig
from runtime.common.terminal import format_size


@dataclass(frozen=True)
class Timing:
    """Counts and times of one benchmark run.

    Attributes:
        conversations: per round.
        rendered_tokens: per round, with shared prefixes counted for each conversation.
        computed_tokens: per round, with shared prefixes counted once.
        rounds: seconds per round.
        matmul_rate: FLOP/s of a large matrix product on the same devices.
        load: seconds to load the model.
        first_score: seconds to load the model and score one conversation.
        memory: peak memory of the process, in bytes.
        gpu_memory: peak memory of tensors, in bytes, by device.
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
        """Seconds of the median round."""
        return statistics.median(self.rounds)

    def rate(self, model_config: ModelConfig) -> float:
        """FLOP/s of the linears in the median round."""
        return model_config.linear_flops(self.computed_tokens, self.conversations) / self.seconds

    def metrics(self, model_config: ModelConfig) -> dict[str, object]:
        """All figures by name, in seconds, bytes and FLOP/s."""
        rate = self.rate(model_config)
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

    def table(self, model_config: ModelConfig, peak_of: str) -> list[tuple[str, str]]:
        """Rows (name, value), the first being the header.

        Args:
            peak_of: dtype and device of the matmul rate, such as `bfloat16 on cuda:0`.
        """
        rate, span = self.rate(model_config), f"{min(self.rounds):.2f} to {max(self.rounds):.2f} s"
        gpus = "".join(f"; {format_size(size)} on {device}" for device, size in self.gpu_memory.items())
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
            ("peak memory", f"{format_size(self.memory)}{gpus}"),
        ]
