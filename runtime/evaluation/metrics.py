"""Metrics between two sets of scores, each with a 95% confidence interval.

The bootstrap resamples pairs, because the two conversations of a pair share a prompt and are not independent. A
resample is a row of weights: how often each pair was drawn. Every metric is computed from weights, so 1,000 resamples
take a few matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from scipy import stats

Array = NDArray[np.float64]

BOOTSTRAP_RESAMPLES = 1000
CONFIDENCE = 0.95
MIN_PAIRS_FOR_BOOTSTRAP = 10  # with fewer pairs, percentile intervals are too narrow
MAX_SCORES_FOR_KENDALL_INTERVAL = 2000  # the interval takes two [scores, scores] matrices of signs
MAX_WEIGHTS_PER_BATCH = 4_000_000


class Estimate(BaseModel):
    """A value and its 95% confidence interval; None if undefined (too few scores, or all equal)."""

    model_config = ConfigDict(frozen=True)

    value: float | None
    low: float | None = None
    high: float | None = None


class ParityMetrics(BaseModel):
    """Metrics of candidate scores against reference scores.

    Shifts are candidate minus reference, in standard deviations of the reference scores.

    Attributes:
        flips: number of pairs whose preferred response changes.
        agreement: share of pairs with the same preferred response, or a tie in both.
        flip_rate: share of pairs with opposite preferred responses.
        chosen_accuracy: share of pairs whose chosen response gets the higher candidate score.
        spearman, kendall, pearson: over the scores of all conversations; `kendall` is tau-b.
        mean_shift, max_shift: mean and largest absolute shift.
        signed_shift: mean shift with its sign.
        slope, offset: least-squares fit candidate = slope * reference + offset; `offset` is in score units.
        shift_after_affine: mean absolute shift after the least-squares fit of reference on candidate.
    """

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


def measure_metrics(reference: Array, candidate: Array, seed: int = 0) -> ParityMetrics:
    """Compare two sets of scores of the same pairs.

    Proportions have Wilson score intervals, which are valid near 0 and 100%. The other metrics, except `max_shift`,
    have percentile bootstrap intervals (Efron and Tibshirani 1993, chapter 13).

    Args:
        reference: [pairs, 2], as (chosen, rejected).
        candidate: [pairs, 2], as (chosen, rejected).
        seed: of the bootstrap.
    """
    before, after = np.sign(margins(reference)), np.sign(margins(candidate))
    pairs, flips = len(before), int(np.sum(before * after < 0))
    return ParityMetrics(
        pairs=pairs,
        flips=flips,
        agreement=proportion(int(np.sum(before == after)), pairs),
        flip_rate=proportion(flips, pairs),
        chosen_accuracy=proportion(int(np.sum(after > 0)), pairs),
        max_shift=Estimate(
            value=round_significant(
                float(_divide_or_nan(np.abs(candidate - reference).max(), standard_deviation(reference)))
            )
        ),
        **_bootstrap_metrics(reference, candidate, seed),
    )


def margins(scores: Array) -> Array:
    """Chosen minus rejected score, [pairs], of scores [pairs, 2]."""
    return scores[:, 0] - scores[:, 1]


def proportion(successes: int, of: int) -> Estimate:
    """The share `successes / of` with its 95% Wilson score interval (Wilson 1927)."""
    low, high = wilson_interval(successes / of, of)
    return Estimate(value=round_significant(successes / of), low=round_significant(low), high=round_significant(high))


def wilson_interval(share: float, of: float) -> tuple[float, float]:
    """The 95% Wilson score interval (Wilson 1927) of a share of a number of trials, which need not be whole."""
    z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
    center = share + z * z / (2 * of)
    width = z * math.sqrt(max(share * (1 - share), 0) / of + (z / (2 * of)) ** 2)
    scale = 1 + z * z / of
    return max((center - width) / scale, 0.0), min((center + width) / scale, 1.0)


def round_significant(value: float | np.floating) -> float | None:
    """Round to six significant digits, which hides last-bit differences between runs; None if not finite."""
    if not np.isfinite(value):
        return None
    return float(f"{round(float(value), 9):.6g}") + 0.0  # + 0.0 turns -0.0 into 0.0


def _bootstrap_metrics(reference: Array, candidate: Array, seed: int) -> dict[str, Estimate]:
    """All metrics except proportions and the maximum, with bootstrap intervals."""
    pairs = len(reference)
    x, y = reference.ravel(), candidate.ravel()
    point_estimates = _weighted_metrics(x, y, np.ones((1, pairs)))
    point_estimates["kendall"] = np.array([stats.kendalltau(x, y, variant="b").statistic])
    if pairs < 2:  # a line through two points fits exactly
        point_estimates |= {
            name: np.array([np.nan]) for name in point_estimates if name not in ("mean_shift", "signed_shift")
        }
    bootstrap_values: dict[str, list[Array]] = {name: [] for name in point_estimates}
    if pairs >= MIN_PAIRS_FOR_BOOTSTRAP:
        for weights in _bootstrap_weights(pairs, seed):
            for name, values in _weighted_metrics(x, y, weights).items():
                bootstrap_values[name].append(values)
    return {name: _estimate(values[0], bootstrap_values[name]) for name, values in point_estimates.items()}


def _estimate(value: float, bootstrap_values: list[Array]) -> Estimate:
    drawn = np.concatenate(bootstrap_values) if bootstrap_values else np.empty(0)
    drawn = drawn[np.isfinite(drawn)]
    if not np.isfinite(value) or not len(drawn):
        return Estimate(value=round_significant(value))
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(value=round_significant(value), low=round_significant(low), high=round_significant(high))


def _bootstrap_weights(pairs: int, seed: int) -> Iterator[Array]:
    """Yield weights [batch, pairs] for `BOOTSTRAP_RESAMPLES` resamples in total, in batches of bounded size."""
    generator = np.random.default_rng(seed)
    resamples_per_batch = max(1, MAX_WEIGHTS_PER_BATCH // pairs)
    for start in range(0, BOOTSTRAP_RESAMPLES, resamples_per_batch):
        rows = min(resamples_per_batch, BOOTSTRAP_RESAMPLES - start)
        drawn = generator.integers(pairs, size=(rows, pairs)) + pairs * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * pairs).reshape(rows, pairs).astype(np.float64)


def _weighted_metrics(reference: Array, candidate: Array, pair_weights: Array) -> dict[str, Array]:
    """Metrics [resamples] of scores [2 * pairs], weighted by `pair_weights` [resamples, pairs]."""
    weights = np.repeat(pair_weights, 2, axis=1)
    weights /= weights.sum(axis=1, keepdims=True)
    x, y = _centred(reference), _centred(candidate)
    mean_x, mean_y = weights @ x, weights @ y
    var_x, var_y, cov = _moments(x, y, weights, mean_x, mean_y)
    std = np.sqrt(var_x)
    slope = _divide_or_nan(cov, var_x)
    inverse_slope = np.nan_to_num(_divide_or_nan(cov, var_y))  # least squares, reference on candidate
    residuals = np.abs(inverse_slope[:, None] * (y - mean_y[:, None]) - (x - mean_x[:, None]))
    metrics = {
        "mean_shift": _divide_or_nan(weights @ np.abs(candidate - reference), std),
        "signed_shift": _divide_or_nan(weights @ (candidate - reference), std),
        "slope": slope,
        "offset": mean_y + candidate.mean() - slope * (mean_x + reference.mean()),
        "shift_after_affine": _divide_or_nan(np.sum(weights * residuals, axis=1), std),
        "pearson": _correlation(var_x, var_y, cov),
        "spearman": _spearman(reference, candidate, weights),
    }
    if len(reference) <= MAX_SCORES_FOR_KENDALL_INTERVAL and len(pair_weights) > 1:
        metrics["kendall"] = _kendall(reference, candidate, np.repeat(pair_weights, 2, axis=1))
    return metrics


def standard_deviation(scores: Array) -> float:
    """Population standard deviation; exactly 0 for equal scores."""
    return float(scores.std()) if np.ptp(scores) > 0 else 0.0


def _centred(values: Array) -> Array:
    return values - values.mean() if np.ptp(values) > 0 else np.zeros_like(values)


def _moments(x: Array, y: Array, weights: Array, mean_x: Array, mean_y: Array) -> tuple[Array, Array, Array]:
    """Weighted variances and covariance [resamples] of `x` and `y` [scores], both centred before resampling.

    A variance at the level of rounding error is set to 0, so that ratios become NaN instead of huge.
    """
    var_x, var_y = weights @ x**2 - mean_x**2, weights @ y**2 - mean_y**2
    var_x = np.where(var_x > 1e-14 * np.mean(x**2), var_x, 0)
    var_y = np.where(var_y > 1e-14 * np.mean(y**2), var_y, 0)
    return var_x, var_y, weights @ (x * y) - mean_x * mean_y


def _correlation(var_x: Array, var_y: Array, cov: Array) -> Array:
    return np.clip(_divide_or_nan(cov, np.sqrt(var_x) * np.sqrt(var_y)), -1, 1)


def _spearman(x: Array, y: Array, weights: Array) -> Array:
    rank_x, rank_y = _midranks(x, weights), _midranks(y, weights)
    rank_x -= np.sum(weights * rank_x, axis=1, keepdims=True)
    rank_y -= np.sum(weights * rank_y, axis=1, keepdims=True)
    variances = [np.sum(weights * rank**2, axis=1) for rank in (rank_x, rank_y)]
    var_x, var_y = (np.where(var > 1e-14, var, 0) for var in variances)  # equal values leave a rounding error
    return _correlation(var_x, var_y, np.sum(weights * rank_x * rank_y, axis=1))


def _midranks(values: Array, weights: Array) -> Array:
    """Weighted ranks [resamples, scores] as fractions of the total weight; ties get their mean rank."""
    _, value_indices, counts = np.unique(values, return_inverse=True, return_counts=True)
    order = np.argsort(values, kind="stable")
    starts = np.cumsum(counts) - counts
    shares = np.add.reduceat(weights[:, order], starts, axis=1)
    ranks: Array = np.cumsum(shares, axis=1) - shares / 2
    return ranks[:, value_indices]


def _kendall(x: Array, y: Array, counts: Array) -> Array:
    """Kendall's tau-b [resamples] from how often each score was drawn, `counts` [resamples, scores].

    With S_x and S_y the matrices of signs of all score differences and c the counts of one resample, concordant minus
    discordant is c' (S_x * S_y) c, and the number of untied score pairs is c' |S| c. The matrix products are integers
    below 2**24, which float32 represents exactly.
    """
    signs_x = np.sign(x[:, None] - x).astype(np.float32)
    signs_y = np.sign(y[:, None] - y).astype(np.float32)
    counts_float32 = counts.astype(np.float32)

    def quadratic_form(matrix: NDArray[np.float32]) -> Array:
        return np.einsum("bi,bi->b", counts_float32 @ matrix, counts)

    untied = quadratic_form(np.abs(signs_x)) * quadratic_form(np.abs(signs_y))
    return _divide_or_nan(quadratic_form(signs_x * signs_y), np.sqrt(untied))


def _divide_or_nan(numerator: Array | float, denominator: Array | float) -> Array:
    """`numerator / denominator`; NaN, without a warning, where the denominator is not positive."""
    denominator = np.asarray(denominator, dtype=np.float64)
    positive = denominator > 0
    quotient: Array = np.where(positive, np.asarray(numerator) / np.where(positive, denominator, 1), np.nan)
    return quotient
