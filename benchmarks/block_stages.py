"""Time the stages of quantizing one block, without the forward passes, on random inputs and weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from quantize.solver.coordinate_descent import coordinate_descent
from quantize.solver.correction import TargetCorrection
from quantize.solver.factor import factorise
from quantize.solver.gptq import solve
from quantize.solver.hessian import Hessian
from quantize.solver.settings import GPTQSettings
from quantize.solver.solved_linear import SolvedLinear
from runtime.checkpoints.model_config import ModelConfig
from runtime.checkpoints.quantization_config import BLOCK_LINEAR_GROUPS
from runtime.modeling.linear import DenseLinear


def stage_seconds(
    model_config: ModelConfig,
    group_size: int,
    tokens: int,
    generator: torch.Generator,
    weight: Callable[[str], torch.Tensor],
    once: Callable[[Callable[[], Any]], float],
) -> dict[str, float]:
    """Seconds per stage for `tokens` calibration tokens, on the generator's device.

    Args:
        weight: returns the weight of a linear, given its name in the block.
        once: runs an action and returns its seconds.
    """
    device = generator.device
    stages = dict.fromkeys(("hessian", "correction", "factorise", "solve", "refine"), 0.0)
    settings = GPTQSettings(group_size=group_size)
    for group in BLOCK_LINEAR_GROUPS:
        in_features = model_config.linear_shape(group[0])[1]
        x = torch.randn(4096, in_features, device=device, generator=generator).bfloat16()
        hessian = Hessian(in_features, device)
        rounds = max(1, tokens // len(x))
        stages["hessian"] += once(lambda h=hessian, x=x, n=rounds: [h.add(x) for _ in range(n)])
        matrix = hessian.matrix()
        found: list[Any] = []
        hessian.free()
        stages["factorise"] += once(lambda m=matrix, f=found: f.append(factorise(m, settings)))
        del matrix
        linears = [DenseLinear(weight(name)) for name in group]
        correction, total = TargetCorrection(linears, in_features, device), hessian.weight
        stages["correction"] += once(lambda c=correction, x=x, n=rounds: [c.add(x, 0.9 * x) for _ in range(n)])
        targets: list[torch.Tensor] = []
        solved: list[SolvedLinear] = []
        factor = found[0]
        for linear in linears:
            stages["correction"] += once(
                lambda t=targets, c=correction, f=factor, each=linear, w=total: t.append(c.target(each, f, w))
            )
            stages["solve"] += once(lambda t=targets, f=factor, s=solved: s.append(solve(t[-1], f, settings)))
        given: list = []
        stages["refine"] += once(lambda f=factor, g=given: g.append(f.into_hessian()))
        for target, each in zip(targets, solved, strict=True):
            stages["refine"] += once(
                lambda t=target, s=each, f=factor, g=given: coordinate_descent(t, s, g[0], f, settings)
            )
    return stages
