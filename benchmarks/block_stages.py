"""Seconds of every stage of quantizing one block but for the two streams, on random inputs and weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from quantize.correction import Correction
from quantize.factor import factorise
from quantize.gptq import SolvedLinear, solve
from quantize.hessian import Hessian
from quantize.refine import refine
from quantize.settings import GPTQSettings
from runtime.architecture import Architecture
from runtime.linear import DenseLinear
from runtime.quantization import BLOCK_LINEAR_GROUPS


def stage_seconds(
    architecture: Architecture,
    group_size: int,
    tokens: int,
    generator: torch.Generator,
    weight: Callable[[str], torch.Tensor],
    once: Callable[[Callable[[], Any]], float],
) -> dict[str, float]:
    """By stage, with so many calibration tokens, on the generator's device.

    Args:
        weight: the weight of a linear by its name in the block.
        once: seconds that an action takes.
    """
    device = generator.device
    stages = dict.fromkeys(("hessian", "correction", "factorise", "solve", "refine"), 0.0)
    settings = GPTQSettings(group_size=group_size)
    for group in BLOCK_LINEAR_GROUPS:
        in_features = architecture.linear_shape(group[0])[1]
        x = torch.randn(4096, in_features, device=device, generator=generator).bfloat16()
        hessian = Hessian(in_features, device)
        rounds = max(1, tokens // len(x))
        stages["hessian"] += once(lambda h=hessian, x=x, n=rounds: [h.add(x) for _ in range(n)])
        matrix = hessian.matrix()
        found: list[Any] = []
        hessian.finish()
        stages["factorise"] += once(lambda m=matrix, f=found: f.append(factorise(m, settings)))
        del matrix
        linears = [DenseLinear(weight(name)) for name in group]
        correction, total = Correction(linears, in_features, device), hessian.weight
        stages["correction"] += once(lambda c=correction, x=x, n=rounds: [c.add(x, 0.9 * x) for _ in range(n)])
        targets: list[torch.Tensor] = []
        solved: list[SolvedLinear] = []
        factor = found[0]
        for linear in linears:
            stages["correction"] += once(
                lambda t=targets, c=correction, f=factor, each=linear, w=total: t.append(c.target(each, f, w))
            )
            stages["solve"] += once(lambda t=targets, f=factor, s=solved: s.append(solve(t[-1], f, settings)))
        stages["refine"] += once(factor.into_hessian)
        for target, each in zip(targets, solved, strict=True):
            stages["refine"] += once(lambda t=target, s=each, f=factor: refine(t, s, f.upper, f, settings))
    return stages
