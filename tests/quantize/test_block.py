"""One block: each group of linears sees what the packed ones before it give, and nothing else."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch

from quantize.sweep import linear_quantizer
from quantize.sweep.block import quantize_block
from quantize.sweep.hidden_states import SweepStates
from quantize.sweep.linear_quantizer import PackedBlock
from runtime.checkpoints.model_config import BIASED_LINEARS, BLOCK_LINEARS, BLOCK_NORMS, ModelConfig
from runtime.checkpoints.quantization_config import BLOCK_LINEAR_GROUPS
from runtime.common.errors import NonFiniteError
from runtime.conversations.rendering import RenderedConversation
from runtime.kernels.reference import dequantize_gptq
from runtime.modeling.linear import Tensors
from runtime.modeling.precision import BFLOAT16, FLOAT32, Precision
from runtime.modeling.qwen2 import Block
from tests.helpers.random_gradients import random_gradients
from tests.helpers.tiny import tiny_config, tiny_tensors
from tests.quantize.test_job import RECIPE

ARCHITECTURE = ModelConfig.from_config(
    tiny_config(layers=1, hidden=64, intermediate=160, heads=4, kv_heads=2, vocab=320, dtype=torch.bfloat16)
)
GPTQ = replace(RECIPE, group_size=32)


def make_rows(count: int, seed: int) -> list[RenderedConversation]:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 80, (count,), generator=draw).tolist()
    rows = [torch.randint(0, 300, (length,), generator=draw).tolist() for length in lengths]
    return [RenderedConversation(row, len(row) - 1) for row in rows]


def make_streams(precision: Precision = FLOAT32) -> SweepStates:
    """Eight calibration and four parity rows, embedded."""
    states = SweepStates(ARCHITECTURE, precision, make_rows(8, 0), make_rows(4, 1), token_budget=100)
    states.embed(tiny_tensors(ARCHITECTURE)["model.embed_tokens.weight"])
    return states


def block_tensors() -> Tensors:
    prefix = "model.layers.0."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tiny_tensors(ARCHITECTURE).items()
        if name.startswith(prefix)
    }


def quantize(states: SweepStates, recipe=GPTQ, on_linear=lambda *_: None) -> PackedBlock:
    tensors = block_tensors()
    quantizations = recipe.quantization().of_block(0)
    gradients = random_gradients(ARCHITECTURE, calibration_tokens(states)) if recipe.calibrated else None
    block, original = states.block(tensors), states.block(tensors)
    return quantize_block(block, original, states, 0, recipe, quantizations, on_linear, gradients)


def calibration_tokens(states: SweepStates) -> int:
    return sum(states.quantized.batches[index].tokens for index in states.calibration_batches)


METHODS = {
    "gptq": GPTQ,
    "gptq-8": replace(GPTQ, bits=8),
    "rtn": replace(GPTQ, method="rtn", calibrated=False),
    "nf4": replace(RECIPE, method="nf4", calibrated=False, group_size=-1),
    "int8": replace(RECIPE, method="int8", calibrated=False, bits=8, group_size=-1),
}


@pytest.mark.parametrize("precision", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_the_stream_is_what_a_reader_of_the_packed_block_computes(method, precision):
    recipe, states = METHODS[method], make_streams(precision)
    packed = quantize(states, recipe)
    reader = Block.from_tensors(
        ARCHITECTURE, packed.tensors, states.rotary, precision, recipe.quantization().of_block(0)
    )
    for index, batch in enumerate(states.quantized.batches):
        expected = reader(states.quantized.read(index), batch)
        got = states.quantized.read(index, next_buffer=True)
        assert (got - expected).abs().max() < 1e-5 * expected.std(), index


@pytest.mark.parametrize("method", METHODS)
def test_tensors_are_those_of_the_layout_and_the_rest_is_untouched(method):
    recipe, source = METHODS[method], block_tensors()
    packed = quantize(make_streams(), recipe)
    names = set(BLOCK_NORMS)
    for name in BLOCK_LINEARS:
        layout = recipe.quantization().linear_tensors(*ARCHITECTURE.linear_shape(name), bias=name in BIASED_LINEARS)
        names |= {f"{name}.{suffix}" for suffix in layout}
        for suffix, (dtype, shape) in layout.items():
            tensor = packed.tensors[f"{name}.{suffix}"]
            assert dtype in (None, tensor.dtype) and shape in (None, tuple(tensor.shape))
    assert set(packed.tensors) == names
    for name in (*BLOCK_NORMS, *(f"{name}.bias" for name in BIASED_LINEARS)):
        assert torch.equal(packed.tensors[name], source[name])
    assert list(packed.linears) == list(BLOCK_LINEARS)


# ---- what each stop sees --------------------------------------------------------------------------------


def plain_inputs(packed: Tensors, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    """What enters each group for one sequence hidden [T, H], in float64 with nothing shared, from packed weights."""
    heads, kv_heads, width = 4, 2, 16
    length = len(hidden)

    def weight(name: str) -> torch.Tensor:
        stored = {key.removeprefix(name + "."): value for key, value in packed.items() if key.startswith(name + ".")}
        return dequantize_gptq(stored, GPTQ.bits).double()

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * packed[name].double()

    def turned(x: torch.Tensor) -> torch.Tensor:
        angles = torch.arange(length).double()[:, None] / 10000 ** (torch.arange(0, width, 2).double() / width)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        first, second = x[..., : width // 2], x[..., width // 2 :]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    def project(letter: str, x: torch.Tensor, count: int) -> torch.Tensor:
        name = f"self_attn.{letter}_proj"
        return (x @ weight(name).T + packed[f"{name}.bias"].double()).view(length, count, width)

    hidden = hidden.double()
    x = norm("input_layernorm.weight", hidden)
    query, key, value = turned(project("q", x, heads)), turned(project("k", x, kv_heads)), project("v", x, kv_heads)
    context = torch.zeros(length, heads, width, dtype=torch.float64)
    for head in range(heads):
        shared = head * kv_heads // heads
        scores = query[:, head] @ key[:, shared].T / width**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        context[:, head] = scores.softmax(-1) @ value[:, shared]
    context = context.flatten(1)
    after = norm("post_attention_layernorm.weight", hidden + context @ weight("self_attn.o_proj").T)
    gate = after @ weight("mlp.gate_proj").T
    activation = gate * gate.sigmoid() * (after @ weight("mlp.up_proj").T)
    return dict(zip((group[0] for group in BLOCK_LINEAR_GROUPS), (x, context, after, activation), strict=True))


def test_each_group_has_the_hessian_of_what_the_packed_linears_before_it_give(monkeypatch):
    """True sequential, over calibration rows only, against a forward pass and a sum written out by hand."""
    seen = []
    real = linear_quantizer.factorise
    monkeypatch.setattr(
        linear_quantizer,
        "factorise",
        lambda matrix, *more: (seen.append(matrix.clone().double()), real(matrix, *more))[1],
    )
    states = make_streams()
    packed = quantize(states)
    gradients = random_gradients(ARCHITECTURE, calibration_tokens(states))
    expected, hidden_states = {}, states.quantized
    for index in states.calibration_batches:
        batch, hidden = hidden_states.batches[index], hidden_states.read(index)
        for ((start, end),) in batch.token_ranges:
            for group, x in plain_inputs(packed.tensors, hidden[start:end]).items():
                weights = gradients.token_weights([group], x.shape[1])[hidden_states.rows(index)][start:end].double()
                expected[group] = expected.get(group, 0) + x.T @ (weights[:, None] * x)
    assert len(seen) == len(expected) == 4
    for matrix, (group, sum_) in zip(seen, expected.items(), strict=True):
        wanted = sum_ / calibration_tokens(states)  # the weights have mean 1
        assert (matrix - wanted).norm() < 1e-5 * wanted.norm(), group


def test_linears_of_one_input_share_one_factor(monkeypatch):
    """q, k and v, then o, then gate and up, then down: four factorisations, seven solves, in data's order."""
    calls = []
    real_factorise, real_solve = linear_quantizer.factorise, linear_quantizer.solve
    monkeypatch.setattr(linear_quantizer, "factorise", lambda *a: (calls.append("factor"), real_factorise(*a))[1])
    monkeypatch.setattr(
        linear_quantizer, "solve", lambda w, *a, **k: (calls.append(tuple(w.shape)), real_solve(w, *a, **k))[1]
    )
    quantize(make_streams())
    expected = []
    for group in BLOCK_LINEAR_GROUPS:
        expected += ["factor", *(ARCHITECTURE.linear_shape(name) for name in group)]
    assert calls == expected


@pytest.mark.parametrize("precision", [FLOAT32, BFLOAT16])
def test_the_reference_leaves_the_block_as_if_alone(precision):
    states = make_streams(precision)
    block, reference = states.block(block_tensors()), states.reference
    alone = [block(reference.read(number), batch) for number, batch in enumerate(reference.batches)]
    quantize(states)
    for number, hidden in enumerate(alone):
        assert (reference.read(number, next_buffer=True) - hidden).abs().max() < 1e-5 * hidden.abs().max()


def test_no_inputs_stay_beside_the_factor(monkeypatch):
    seen = []

    class Watched(linear_quantizer.TargetCorrection):
        def add(self, x, reference, weights):
            super().add(x, reference, weights)
            seen.extend((weakref.ref(x), weakref.ref(reference)))

    def factorise(*arguments):
        assert seen and all(each() is None for each in seen)
        return real(*arguments)

    real = linear_quantizer.factorise
    monkeypatch.setattr(linear_quantizer, "TargetCorrection", Watched)
    monkeypatch.setattr(linear_quantizer, "factorise", factorise)
    quantize(make_streams())


def test_parity_rows_teach_nothing():
    """Another set of parity rows, the same packed block."""
    one = quantize(make_streams()).tensors
    states = SweepStates(ARCHITECTURE, FLOAT32, make_rows(8, 0), make_rows(6, 99), token_budget=100)
    states.embed(tiny_tensors(ARCHITECTURE)["model.embed_tokens.weight"])
    other = quantize(states).tensors
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# ---- figures and faults ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rtn", "nf4", "int8"])
def test_figures_of_rounding_are_of_the_weights(method):
    recipe, source = METHODS[method], block_tensors()
    states = make_streams()
    packed = quantize(states, recipe)
    reader = Block.from_tensors(ARCHITECTURE, packed.tensors, states.rotary, FLOAT32, recipe.quantization().of_block(0))
    for name, metrics in packed.linears.items():
        weight = source[f"{name}.weight"].double()
        error = (reader.linears[name].weight(torch.float32).double() - weight).square().mean()
        relative = (error / weight.square().mean()).item()
        assert metrics.relative_loss == pytest.approx(relative, rel=1e-4)
        assert metrics.sqnr_db == pytest.approx(-10 * torch.tensor(relative).log10().item(), rel=1e-4)
        assert (metrics.damp, metrics.dead_columns) == (0.0, 0)


def test_nothing_lost_has_no_ratio():
    """A weight that is all zeros comes back exactly, and infinity is no JSON."""
    states, tensors = make_streams(), block_tensors()
    for name in BLOCK_LINEARS:
        tensors[f"{name}.weight"] = torch.zeros_like(tensors[f"{name}.weight"])
    block, original = states.block(tensors), states.block(tensors)
    packed = quantize_block(
        block, original, states, 0, METHODS["int8"], METHODS["int8"].quantization().of_block(0), print
    )
    assert {(each.relative_loss, each.sqnr_db) for each in packed.linears.values()} == {(0.0, None)}


def test_whoever_watches_is_told_of_every_linear_and_the_loss_before():
    told = []
    packed = quantize(make_streams(), on_linear=lambda name, loss: told.append((name, loss)))
    last = None
    for group in BLOCK_LINEAR_GROUPS:
        assert told.pop(0) == (group[0], last)  # its Hessian
        for name in group:
            assert told.pop(0) == (name, last)
            last = packed.linears[name].relative_loss
    assert not told


def test_every_stage_takes_its_seconds():
    packed = quantize(make_streams())
    assert set(packed.seconds) == {"inputs", "hessian", "correct", "factorise", "solve", "pack"}
    assert all(seconds > 0 for seconds in packed.seconds.values())


@pytest.mark.parametrize("rows", ["calibration", "parity"])
@pytest.mark.parametrize("of", ["reference", "quantized"])
def test_an_activation_that_is_no_number_is_named_by_block_and_row(monkeypatch, rows, of):
    states, tensors = make_streams(), block_tensors()
    block, original = states.block(tensors), states.block(tensors)
    lengths = [batch.tokens for batch in states.quantized.batches]
    candidates = states.calibration_batches if rows == "calibration" else states.parity_batches
    batch = next(batch for batch in candidates if lengths.count(lengths[batch]) == 1)
    tokens, row = lengths[batch], states.quantized.batches[batch].row_of_token(0)
    faulty, real = {"reference": original, "quantized": block}[of], Block.after_mlp

    def after_mlp(self: Block, hidden: torch.Tensor, activation: torch.Tensor) -> torch.Tensor:
        result = real(self, hidden, activation)
        if self is faulty and len(result) == tokens:
            result[0, 3] = torch.nan
        return result

    monkeypatch.setattr(Block, "after_mlp", after_mlp)
    with pytest.raises(NonFiniteError, match=rf"block 0, {of}: a non-finite activation in conversation {row};"):
        gradients = random_gradients(ARCHITECTURE, calibration_tokens(states))
        quantize_block(block, original, states, 0, GPTQ, GPTQ.quantization().of_block(0), print, gradients)
