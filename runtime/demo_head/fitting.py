"""A Bradley-Terry fit of the score head that rounding cannot move.

The reward model's score s(x) of features x is trained on preferences alone: minimise -log sigmoid(s(chosen) -
s(rejected)) (Bradley and Terry 1952). What is penalised is not the size of the weights but how far *rounding
noise* moves the score: with d the measured changes of x under bf16 arithmetic and under 4-bit weights, and

    M = sum of weight * E[d d'] + floor * I,        M = L L',        z = inv(L) (x - mean),

a linear score v.z has ||v||^2 = E[(its noise)^2]. So ridge in z is the penalty wanted, and weight decay in x
is not: it trusts directions of small variance, which rounding drowns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

NETWORKS, HIDDEN_UNITS = 4, 128
EPOCHS, PAIRS_A_STEP, LEARNING_RATE, DROPOUT, UNIT_PENALTY = 6, 64, 1e-3, 0.5, 1.0
FLOOR = 2e-3
# Penalties shrink scores towards each other; so much wider, sigmoid(margin) is the best probability again.
WIDEN = 1.35


@dataclass(frozen=True)
class NoiseMetric:
    """The change of variables x -> z. `mean` [H] is of all features, `factor` [H, H] is L."""

    mean: torch.Tensor
    factor: torch.Tensor

    @classmethod
    def measure(cls, features: torch.Tensor, noises: list[tuple[float, torch.Tensor]]) -> NoiseMetric:
        """`features` [n, H]; `noises` are weights and changes [m, H] of features."""
        metric = FLOOR * torch.eye(features.shape[1], dtype=torch.float64)
        for weight, change in noises:
            metric += weight * change.double().T @ change.double() / len(change)
        return cls(features.double().mean(0), torch.linalg.cholesky(metric))

    def to_z(self, features: torch.Tensor) -> torch.Tensor:
        """x [n, H] to z [n, H], fp32."""
        centred = (features.double() - self.mean).T
        return torch.linalg.solve_triangular(self.factor, centred, upper=False).T.float()

    def rows_to_x(self, rows: torch.Tensor) -> torch.Tensor:
        """Weights [k, H] on z to the weights on x that give the same products, up to a constant."""
        return torch.linalg.solve_triangular(self.factor.T, rows.double().T, upper=True).T.float()


def fit_linear(z_chosen: torch.Tensor, z_rejected: torch.Tensor) -> torch.Tensor:
    """v [H] that minimises mean(softplus(-v.(chosen - rejected))) + ||v||^2: convex, so the start is no matter."""
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
    """s(z) = v.z + w.relu(U z + b): linear, with a layer of units that bend it."""

    def __init__(self, v: torch.Tensor, generator: torch.Generator):
        """Start at the linear fit `v` [H], with units of its length in random directions and no say yet."""
        rows = torch.randn(HIDDEN_UNITS, len(v), generator=generator)
        self.v = v.clone().requires_grad_()
        self.u = (rows * v.norm() / len(v) ** 0.5).requires_grad_()
        self.b = torch.zeros(HIDDEN_UNITS, requires_grad=True)
        self.w = torch.zeros(HIDDEN_UNITS, requires_grad=True)

    def score(self, z: torch.Tensor, keep: torch.Tensor | float = 1.0) -> torch.Tensor:
        """z [n, H] to [n]; `keep` [n, units] multiplies the units (dropout)."""
        return z @ self.v + (torch.relu(z @ self.u.T + self.b) * keep) @ self.w

    def penalty(self) -> torch.Tensor:
        """The noise variance of the linear part, and a bound on that of the units."""
        return self.v.square().sum() + UNIT_PENALTY * (self.w[:, None] * self.u).square().sum()


def fit_network(z_chosen: torch.Tensor, z_rejected: torch.Tensor, v: torch.Tensor, seed: int) -> Network:
    """Train a `Network` from the linear fit `v` by Adam with a rising and falling rate."""
    generator = torch.Generator().manual_seed(seed)
    network = Network(v, generator)
    parameters = [network.v, network.u, network.b, network.w]
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    steps = EPOCHS * (len(z_chosen) // PAIRS_A_STEP)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps + 1)
    for _ in range(EPOCHS):
        order = torch.randperm(len(z_chosen), generator=generator)
        for rows in order.split(PAIRS_A_STEP)[: steps // EPOCHS]:
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
def fold(
    networks: list[Network], metric: NoiseMetric, features: torch.Tensor, seed: int = 0
) -> dict[str, torch.Tensor]:
    """The networks' mean score, widened, as one `Linear -> ReLU -> Linear` in bf16.

        Its mean over `features` [n, H] is 0.

    Units of the networks stand side by side. The linear part is a pair relu(v.z) - relu(-v.z), repeated to fill
        the layer with each copy rounded to bf16 by a different lot, so that their rounding errors average out.
    """
    share = WIDEN / len(networks)
    units = torch.cat([network.u for network in networks])
    spare = features.shape[1] - len(units)
    assert spare >= 2 and spare % 2 == 0
    v = torch.stack([network.v for network in networks]).mean(0)
    signs = torch.tensor([1.0, -1.0]).repeat(spare // 2)
    rows = torch.cat([metric.rows_to_x(units), signs[:, None] * metric.rows_to_x(v[None])])
    rows = round_by_lot(rows, torch.Generator().manual_seed(seed))
    bias = torch.cat([*(network.b for network in networks), torch.zeros(spare)])
    bias = bias.double() - rows.double() @ metric.mean
    outer = torch.cat([*(share * network.w for network in networks), signs * 2 * WIDEN / spare])
    head = {"score.0.weight": rows, "score.0.bias": bias.bfloat16(), "score.2.weight": outer[None].bfloat16()}
    head["score.2.bias"] = torch.zeros(1, dtype=torch.bfloat16)
    head["score.2.bias"] = -head_scores(head, features).mean()[None].bfloat16()
    return head


def round_by_lot(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """To bf16, up or down with the probability that makes it right on average."""
    bits = values.float().view(torch.int32)
    lot = torch.randint(1 << 16, bits.shape, generator=generator, dtype=torch.int32)
    return ((bits + lot) & ~0xFFFF).view(torch.float32).bfloat16()


def head_scores(head: dict[str, torch.Tensor], features: torch.Tensor) -> torch.Tensor:
    """Scores fp32 [n] of features [n, H], computed in the dtype of the features."""
    weights = {name: tensor.to(features.dtype) for name, tensor in head.items()}
    inner = F.linear(features, weights["score.0.weight"], weights["score.0.bias"]).relu()
    return F.linear(inner, weights["score.2.weight"], weights["score.2.bias"]).float().squeeze(-1)
