"""How closely one set of scores follows another: every figure of a parity report, with its interval.

Pairs are the unit of resampling, since the two conversations of a pair share a prompt. All resamples are
computed at once: a resample is a row of weights saying how often each pair was drawn, and each figure is a
weighted one, so that 1,000 resamples cost a few matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from scipy import stats

Array = NDArray[np.float64]

RESAMPLES = 1000
CONFIDENCE = 0.95
FEWEST_PAIRS_TO_RESAMPLE = 10  # below it a percentile interval is narrower than the truth
MOST_SCORES_FOR_KENDALL = 2000  # its interval needs a scores x scores matrix of signs
WEIGHTS_AT_ONCE = 4_000_000


class Estimate(BaseModel):
    """A value and its 95% interval; None where the scores cannot tell (too few, or all equal)."""

    model_config = ConfigDict(frozen=True)

    value: float | None
    low: float | None = None
    high: float | None = None


class Figures(BaseModel):
    """Candidate scores against reference scores. Shifts are in standard deviations of the latter."""

    model_config = ConfigDict(frozen=True)

    pairs: int
    flips: int
    agreement: Estimate
    flip_rate: Estimate
    chosen_accuracy: Estimate
    spearman: Estimate
    kendall: Estimate
    pearson: Estimate
    mean_shift: Estimate
    max_shift: Estimate
    signed_shift: Estimate
    slope: Estimate
    offset: Estimate
    shift_after_affine: Estimate


def measure_figures(reference: Array, candidate: Array, seed: int = 0) -> Figures:
    """Compare two sets of scores of the same pairs, both shaped [pairs, 2] as (chosen, rejected).

    Proportions carry Wilson intervals, which stay honest at 100%; the rest carry percentile bootstrap
    intervals (Efron and Tibshirani 1993, chapter 13) over pairs drawn with `seed`.
    """
    before, after = np.sign(margins(reference)), np.sign(margins(candidate))
    pairs, flips = len(before), int(np.sum(before * after < 0))
    return Figures(
        pairs=pairs,
        flips=flips,
        agreement=proportion(int(np.sum(before == after)), pairs),
        flip_rate=proportion(flips, pairs),
        chosen_accuracy=proportion(int(np.sum(after > 0)), pairs),
        max_shift=Estimate(value=tidy(float(_ratio(np.abs(candidate - reference).max(), spread(reference))))),
        **_resampled(reference, candidate, seed),
    )


def margins(scores: Array) -> Array:
    """Chosen minus rejected, [pairs]."""
    return scores[:, 0] - scores[:, 1]


def proportion(hits: int, of: int) -> Estimate:
    """`hits` out of `of` with its Wilson score interval (Wilson 1927)."""
    interval = stats.binomtest(hits, of).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(value=tidy(hits / of), low=tidy(interval.low), high=tidy(interval.high))


def tidy(value: float | np.floating) -> float | None:
    """Six significant digits, so that a last-bit difference between runs cannot show; None if not finite."""
    if not np.isfinite(value):
        return None
    return float(f"{round(float(value), 9):.6g}") + 0.0  # + 0.0 turns -0.0 into 0.0


def _resampled(reference: Array, candidate: Array, seed: int) -> dict[str, Estimate]:
    """Every figure that is not a plain proportion or a maximum."""
    pairs = len(reference)
    x, y = reference.ravel(), candidate.ravel()
    whole = _weighted_figures(x, y, np.ones((1, pairs)))
    whole["kendall"] = np.array([stats.kendalltau(x, y, variant="b").statistic])
    if pairs < 2:  # two scores always lie on a line
        whole |= {name: np.array([np.nan]) for name in whole if name not in ("mean_shift", "signed_shift")}
    draws: dict[str, list[Array]] = {name: [] for name in whole}
    if pairs >= FEWEST_PAIRS_TO_RESAMPLE:
        for weights in _resamples(pairs, seed):
            for name, values in _weighted_figures(x, y, weights).items():
                draws[name].append(values)
    return {name: _estimate(values[0], draws[name]) for name, values in whole.items()}


def _estimate(value: float, draws: list[Array]) -> Estimate:
    drawn = np.concatenate(draws) if draws else np.empty(0)
    drawn = drawn[np.isfinite(drawn)]
    if not np.isfinite(value) or not len(drawn):
        return Estimate(value=tidy(value))
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(value=tidy(value), low=tidy(low), high=tidy(high))


def _resamples(pairs: int, seed: int) -> Iterator[Array]:
    """Weights [some, pairs] of `RESAMPLES` resamples in all, in pieces of bounded size."""
    generator = np.random.default_rng(seed)
    at_once = max(1, WEIGHTS_AT_ONCE // pairs)
    for start in range(0, RESAMPLES, at_once):
        rows = min(at_once, RESAMPLES - start)
        drawn = generator.integers(pairs, size=(rows, pairs)) + pairs * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * pairs).reshape(rows, pairs).astype(np.float64)


def _weighted_figures(reference: Array, candidate: Array, pair_weights: Array) -> dict[str, Array]:
    """Figures [resamples] of scores [2 * pairs] under weights [resamples, pairs]."""
    weights = np.repeat(pair_weights, 2, axis=1)
    weights /= weights.sum(axis=1, keepdims=True)
    x, y = _centred(reference), _centred(candidate)
    mean_x, mean_y = weights @ x, weights @ y
    var_x, var_y, cov = _moments(x, y, weights, mean_x, mean_y)
    std = np.sqrt(var_x)
    slope = _ratio(cov, var_x)
    back = np.nan_to_num(_ratio(cov, var_y))  # slope of the best line from candidate to reference
    left = np.abs(back[:, None] * (y - mean_y[:, None]) - (x - mean_x[:, None]))
    figures = {
        "mean_shift": _ratio(weights @ np.abs(candidate - reference), std),
        "signed_shift": _ratio(weights @ (candidate - reference), std),
        "slope": slope,
        "offset": mean_y + candidate.mean() - slope * (mean_x + reference.mean()),
        "shift_after_affine": _ratio(np.sum(weights * left, axis=1), std),
        "pearson": _correlation(var_x, var_y, cov),
        "spearman": _spearman(reference, candidate, weights),
    }
    if len(reference) <= MOST_SCORES_FOR_KENDALL and len(pair_weights) > 1:
        figures["kendall"] = _kendall(reference, candidate, np.repeat(pair_weights, 2, axis=1))
    return figures


def spread(scores: Array) -> float:
    """Standard deviation, exactly zero for equal scores."""
    return float(scores.std()) if np.ptp(scores) > 0 else 0.0


def _centred(values: Array) -> Array:
    return values - values.mean() if np.ptp(values) > 0 else np.zeros_like(values)


def _moments(x: Array, y: Array, weights: Array, mean_x: Array, mean_y: Array) -> tuple[Array, Array, Array]:
    """Variances and covariance [resamples] of `x`, `y` [scores], which are centred but for resampling.

    A variance that is only rounding error is set to nothing, lest a later division blow it up.
    """
    var_x, var_y = weights @ x**2 - mean_x**2, weights @ y**2 - mean_y**2
    var_x = np.where(var_x > 1e-14 * np.mean(x**2), var_x, 0)
    var_y = np.where(var_y > 1e-14 * np.mean(y**2), var_y, 0)
    return var_x, var_y, weights @ (x * y) - mean_x * mean_y


def _correlation(var_x: Array, var_y: Array, cov: Array) -> Array:
    return np.clip(_ratio(cov, np.sqrt(var_x) * np.sqrt(var_y)), -1, 1)


def _spearman(x: Array, y: Array, weights: Array) -> Array:
    rank_x, rank_y = _midranks(x, weights), _midranks(y, weights)
    rank_x -= np.sum(weights * rank_x, axis=1, keepdims=True)
    rank_y -= np.sum(weights * rank_y, axis=1, keepdims=True)
    variances = [np.sum(weights * rank**2, axis=1) for rank in (rank_x, rank_y)]
    var_x, var_y = (np.where(var > 1e-14, var, 0) for var in variances)  # a constant leaves a rounding error
    return _correlation(var_x, var_y, np.sum(weights * rank_x * rank_y, axis=1))


def _midranks(values: Array, weights: Array) -> Array:
    """Rank [resamples, scores] of each value as a share of all, ties sharing the middle of their ranks."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    order = np.argsort(values, kind="stable")
    starts = np.cumsum(counts) - counts
    shares = np.add.reduceat(weights[:, order], starts, axis=1)
    ranks: Array = np.cumsum(shares, axis=1) - shares / 2
    return ranks[:, places]


def _kendall(x: Array, y: Array, counts: Array) -> Array:
    """Tau-b [resamples]: with s_x and s_y the signs of all differences and c the counts of a resample,
    concordant less discordant is c' (s_x s_y) c, and untied pairs of either side are c' |s| c.

    Whole numbers below 2**24, so float32 is exact.
    """
    signs_x = np.sign(x[:, None] - x).astype(np.float32)
    signs_y = np.sign(y[:, None] - y).astype(np.float32)
    narrow = counts.astype(np.float32)

    def quadratic(matrix: NDArray[np.float32]) -> Array:
        return np.einsum("bi,bi->b", narrow @ matrix, counts)

    untied = quadratic(np.abs(signs_x)) * quadratic(np.abs(signs_y))
    return _ratio(quadratic(signs_x * signs_y), np.sqrt(untied))


def _ratio(above: Array | float, below: Array | float) -> Array:
    """Division that answers NaN, silently, where there is nothing to divide by."""
    below = np.asarray(below, dtype=np.float64)
    quotient: Array = np.where(below > 0, np.asarray(above) / np.where(below > 0, below, 1), np.nan)
    return quotient
