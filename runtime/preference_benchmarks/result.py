"""The result of a variant on a benchmark, and its files in the shape that RewardBench publishes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.common.files import write_file_atomically
from runtime.common.version import kit_version
from runtime.evaluation.breakdowns import BenchmarkAccuracy, BenchmarkSection
from runtime.evaluation.metrics import round_significant
from runtime.evaluation.variant import Variant
from runtime.preference_benchmarks.accuracy import Accuracy
from runtime.preference_benchmarks.benchmark import Benchmark, JudgedRow
from runtime.preference_benchmarks.comparison import Changes, compare
from runtime.preference_benchmarks.published import published_accuracy


@dataclass(frozen=True)
class Result:
    """A variant on a benchmark.

    Attributes:
        published: accuracy by section that the WorldPM paper prints for the model; empty without one.
        reference: the result of the model that it is compared with, if any.
        changes: its changed rows by section; empty without a reference.
    """

    benchmark: Benchmark
    variant: Variant
    accuracy: Accuracy
    published: dict[str, float]
    reference: Result | None
    changes: dict[str, Changes]

    @classmethod
    def make(cls, benchmark: Benchmark, variant: Variant, accuracy: Accuracy, reference: Result | None) -> Result:
        """Look up the published numbers and compare with the result of the reference."""
        published = published_accuracy(variant.published_name, benchmark.name)
        changes = compare(accuracy, reference.accuracy) if reference else {}
        return cls(benchmark, variant, accuracy, published, reference, changes)

    def to_dict(self) -> dict[str, Any]:
        """The JSON: first the keys that RewardBench publishes, `extra_results` by subset, then the kit's own."""
        return {
            "accuracy": self.accuracy.overall,
            "num_prompts": self.accuracy.rows,
            "model": self.variant.source,
            "ref_model": None,
            "tokenizer": self.variant.source,
            "chat_template": "tokenizer",
            "extra_results": self.accuracy.groups,
            "benchmark": self.benchmark.name,
            "fingerprint": self.variant.checkpoint.fingerprint(),
            "kit_version": kit_version(),
            "rows_without_scores": len(self.accuracy.errors),
            "sections": {
                name: {
                    "accuracy": section.accuracy.value,
                    "low": section.accuracy.low and round_significant(section.accuracy.low),
                    "high": section.accuracy.high and round_significant(section.accuracy.high),
                    "rows": section.rows,
                    "published": self.published.get(name),
                }
                for name, section in self.accuracy.sections.items()
            },
            "reference": self.reference and self.reference.variant.label,
            "changes": {
                name: {
                    "flips": each.flips,
                    "better": each.better,
                    "worse": each.worse,
                    "p_value": round_significant(each.p_value),
                }
                for name, each in self.changes.items()
            },
        }

    def to_report(self) -> BenchmarkAccuracy:
        """The section of a parity report."""
        sections = []
        for name, section in self.accuracy.sections.items():
            compared: dict[str, Any] = {}
            if self.reference:
                change = self.changes[name]
                compared["reference_accuracy"] = self.reference.accuracy.sections[name].accuracy.value
                compared |= {"flips": change.flips, "p_value": round_significant(change.p_value)}
            found = BenchmarkSection(
                name=name,
                rows=section.rows,
                accuracy=section.accuracy,
                published=self.published.get(name),
                **compared,
            )
            sections.append(found)
        label = self.reference.variant.label if self.reference else ""
        return BenchmarkAccuracy(title=self.benchmark.title, reference=label, sections=sections)


def write_result(result: Result, rows: Sequence[JudgedRow], path: Path) -> list[Path]:
    """Write `path` (JSON) and, beside it, the scores of the rows as `..._outputs.jsonl`; return the paths."""
    outputs = path.with_name(f"{path.stem}_outputs.jsonl")
    lines = (json.dumps(_output(row), ensure_ascii=False) + "\n" for row in rows)
    write_file_atomically(outputs, "".join(lines))
    write_file_atomically(path, json.dumps(result.to_dict(), indent=2, ensure_ascii=False) + "\n")
    return [path, outputs]


def _output(row: JudgedRow) -> dict[str, Any]:
    """A line of the outputs: RewardBench's keys without the texts."""
    pair = len(row.chosen) == len(row.rejected) == 1
    groups = [outcome.group for outcome in row.outcomes]
    of = sum(outcome.of for outcome in row.outcomes)
    share = sum(outcome.won for outcome in row.outcomes) / of if of else None
    return {
        "id": row.id,
        "where": row.where,
        "subset": None if not groups else groups[-1] if len(groups) == 1 else groups[-1].rpartition("/")[0],
        "results": int(share) if share in (0, 1) else share,
        "scores_chosen": None if row.error else row.chosen[0] if pair else list(row.chosen),
        "scores_rejected": None if row.error else row.rejected[0] if pair else list(row.rejected),
        **({"error": row.error} if row.error else {}),
    }
