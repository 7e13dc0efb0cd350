"""Time the stages of quantizing one block, without the forward passes, on random inputs and weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from quantize.solver.factor import factorise
from quantize.solver.gptq import solve
from quantize.solver.hessian import Hessian
from quantize.solver.output_factor import OutputFactor
from quantize.solver.output_moment import RANK
from quantize.solver.settings import GPTQSettings
from runtime.checkpoints.model_config import ModelConfig
from runtime.checkpoints.quantization_config import BLOCK_LINEAR_GROUPS


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
    stages = dict.fromkeys(("hessian", "factorise", "output factor", "solve"), 0.0)
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
        for name in group:
            target, outputs = weight(name).float(), []
            vectors = torch.randn(len(target), RANK, device=device, generator=generator)
            stages["output factor"] += once(
                lambda v=vectors, o=outputs: o.append(OutputFactor.from_low_rank(v, v.square().sum(1)))
            )
            stages["solve"] += once(lambda t=target, f=found, o=outputs: solve(t, f[0], settings, outputs=o[0]))
    return stages
