"""Fit the score head to preference pairs, with a penalty on the score's sensitivity to rounding noise.

The score s(x) of features x minimizes -log sigmoid(s(chosen) - s(rejected)) (Bradley and Terry 1952). The penalty is on
how much rounding noise changes the score, not on the size of the weights. With d the measured changes of x under bf16
arithmetic and under 4-bit weights, and

    M = sum of weight * E[d d'] + ridge * I,        M = L L',        z = inv(L) (x - mean),

a linear score v.z has ||v||^2 = E[(its noise)^2], so ridge in z is the penalty. Weight decay in x would rely on
directions of small variance, in which rounding noise dominates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

NETWORKS, HIDDEN_UNITS = 4, 128
EPOCHS, PAIRS_PER_STEP, LEARNING_RATE, DROPOUT, UNIT_PENALTY = 6, 64, 1e-3, 0.5, 1.0
NOISE_RIDGE = 0.05  # of the features' mean variance
# The penalties shrink scores; with this factor sigmoid(margin) is a calibrated probability again.
SCORE_SCALE = 1.35


@dataclass(frozen=True)
class NoiseMetric:
    """The change of variables x -> z.

    Attributes:
        mean: [H], of all features.
        factor: L [H, H], lower triangular.
    """

    mean: torch.Tensor
    factor: torch.Tensor

    @classmethod
    def measure(cls, features: torch.Tensor, noises: list[tuple[float, torch.Tensor]]) -> NoiseMetric:
        """Build the metric from features [n, H] and (weight, changes of features [m, H]) of each kind of noise."""
        ridge = NOISE_RIDGE * features.double().var(0).mean()
        metric = ridge * torch.eye(features.shape[1], dtype=torch.float64)
        for weight, change in noises:
            metric += weight * change.double().T @ change.double() / len(change)
        return cls(features.double().mean(0), torch.linalg.cholesky(metric))

    def to_z(self, features: torch.Tensor) -> torch.Tensor:
        """Transform x [n, H] to z [n, H], fp32."""
        centred = (features.double() - self.mean).T
        return torch.linalg.solve_triangular(self.factor, centred, upper=False).T.float()

    def rows_to_x(self, rows: torch.Tensor) -> torch.Tensor:
        """Transform weights [k, H] on z to weights on x with the same products, up to a constant."""
        return torch.linalg.solve_triangular(self.factor.T, rows.double().T, upper=True).T.float()


def fit_linear(z_chosen: torch.Tensor, z_rejected: torch.Tensor) -> torch.Tensor:
    """Return v [H] that minimizes mean(softplus(-v.(chosen - rejected))) + ||v||^2, a convex problem."""
    difference = (z_chosen - z_rejected).double()
    v = torch.zeros(difference.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([v], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.softplus(-difference @ v).mean() + v.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return v.detach().float()


class Network:
    """s(z) = v.z + w.relu(U z + b): a linear score plus one hidden layer."""

    def __init__(self, v: torch.Tensor, generator: torch.Generator):
        """Start at the linear fit `v` [H], with random unit directions of norm ||v|| and zero output weights."""
        rows = torch.randn(HIDDEN_UNITS, len(v), generator=generator)
        self.v = v.clone().requires_grad_()
        self.u = (rows * v.norm() / len(v) ** 0.5).requires_grad_()
        self.b = torch.zeros(HIDDEN_UNITS, requires_grad=True)
        self.w = torch.zeros(HIDDEN_UNITS, requires_grad=True)

    def score(self, z: torch.Tensor, keep: torch.Tensor | float = 1.0) -> torch.Tensor:
        """Scores [n] of z [n, H]; `keep` [n, units] is the dropout mask."""
        return z @ self.v + (torch.relu(z @ self.u.T + self.b) * keep) @ self.w

    def penalty(self) -> torch.Tensor:
        """Noise variance of the linear part, plus an upper bound on that of the hidden layer."""
        return self.v.square().sum() + UNIT_PENALTY * (self.w[:, None] * self.u).square().sum()


def fit_network(z_chosen: torch.Tensor, z_rejected: torch.Tensor, v: torch.Tensor, seed: int) -> Network:
    """Train a `Network` from the linear fit `v` with Adam and a one-cycle learning rate."""
    generator = torch.Generator().manual_seed(seed)
    network = Network(v, generator)
    parameters = [network.v, network.u, network.b, network.w]
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    steps = EPOCHS * (len(z_chosen) // PAIRS_PER_STEP)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps + 1)
    for _ in range(EPOCHS):
        order = torch.randperm(len(z_chosen), generator=generator)
        for rows in order.split(PAIRS_PER_STEP)[: steps // EPOCHS]:
            both = torch.cat((z_chosen[rows], z_rejected[rows]))
            keep = (torch.rand(len(both), HIDDEN_UNITS, generator=generator) > DROPOUT) / (1 - DROPOUT)
            chosen, rejected = network.score(both, keep).chunk(2)
            loss = F.softplus(rejected - chosen).mean() + network.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network


@torch.no_grad()
def merge_networks(
    networks: list[Network], metric: NoiseMetric, features: torch.Tensor, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Merge the networks' mean score, times `SCORE_SCALE`, into one bf16 `Linear -> ReLU -> Linear`.

    The networks' hidden units are concatenated. The linear part is relu(v.z) - relu(-v.z), repeated to fill the layer.
    Each copy is rounded stochastically to bf16, so that the rounding errors average out. The output bias makes the mean
    score over `features` [n, H] zero.

    Returns:
        The head's four tensors by name.
    """
    share = SCORE_SCALE / len(networks)
    units = torch.cat([network.u for network in networks])
    linear_units = features.shape[1] - len(units)
    assert linear_units >= 2 and linear_units % 2 == 0
    v = torch.stack([network.v for network in networks]).mean(0)
    signs = torch.tensor([1.0, -1.0]).repeat(linear_units // 2)
    rows = torch.cat([metric.rows_to_x(units), signs[:, None] * metric.rows_to_x(v[None])])
    rows = stochastic_round(rows, torch.Generator().manual_seed(seed))
    bias = torch.cat([*(network.b for network in networks), torch.zeros(linear_units)])
    bias = bias.double() - rows.double() @ metric.mean
    outer = torch.cat([*(share * network.w for network in networks), signs * 2 * SCORE_SCALE / linear_units])
    head = {"score.0.weight": rows, "score.0.bias": bias.bfloat16(), "score.2.weight": outer[None].bfloat16()}
    head["score.2.bias"] = torch.zeros(1, dtype=torch.bfloat16)
    head["score.2.bias"] = -head_scores(head, features).mean()[None].bfloat16()
    return head


def stochastic_round(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Round to bf16, up or down at random, so that the expected value is unchanged."""
    bits = values.float().view(torch.int32)
    offset = torch.randint(1 << 16, bits.shape, generator=generator, dtype=torch.int32)
    return ((bits + offset) & ~0xFFFF).view(torch.float32).bfloat16()


def head_scores(head: dict[str, torch.Tensor], features: torch.Tensor) -> torch.Tensor:
    """Scores fp32 [n] of features [n, H], computed in the dtype of the features."""
    weights = {name: tensor.to(features.dtype) for name, tensor in head.items()}
    inner = F.linear(features, weights["score.0.weight"], weights["score.0.bias"]).relu()
    return F.linear(inner, weights["score.2.weight"], weights["score.2.bias"]).float().squeeze(-1)
