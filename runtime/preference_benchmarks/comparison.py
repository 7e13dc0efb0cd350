"""Compare a variant with the reference on the same rows: changed rows, and McNemar's exact test."""

from __future__ import annotations

from dataclasses import dataclass

from scipy import stats

from runtime.preference_benchmarks.accuracy import Accuracy, Section


@dataclass(frozen=True)
class Changes:
    """Rows whose outcome differs from the reference's.

    Attributes:
        better, worse: number of rows of which the variant wins a larger or a smaller share than the reference.
        p_value: of McNemar's exact test: the probability of a split of the changed rows at least as uneven, if both
            models were equally good.
    """

    better: int
    worse: int
    p_value: float

    @property
    def flips(self) -> int:
        """Number of changed rows."""
        return self.better + self.worse


def compare(variant: Accuracy, reference: Accuracy) -> dict[str, Changes]:
    """The changes by section."""
    return {name: _changes(section, reference.sections[name]) for name, section in variant.sections.items()}


def _changes(variant: Section, reference: Section) -> Changes:
    """Count rows, not comparisons, since those of one row are not independent."""
    differences = [share - reference.shares[index] for index, share in variant.shares.items()]
    better, worse = sum(each > 0 for each in differences), sum(each < 0 for each in differences)
    p_value = float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0
    return Changes(better, worse, p_value)
