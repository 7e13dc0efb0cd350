"""One block: each group of linears sees what the packed ones before it give, and nothing else."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch

from quantize import block as block_module
from quantize.block import PackedBlock, quantize_block, token_weights
from quantize.streams import Streams
from runtime.architecture import BIASED_LINEARS, BLOCK_LINEARS, BLOCK_NORMS, Architecture
from runtime.batching import pack
from runtime.chat import Rendered
from runtime.errors import NonFiniteError
from runtime.linear import Tensors
from runtime.numerics import BFLOAT16, FLOAT32, Numerics
from runtime.packing import dequantize_gptq
from runtime.quantization import BLOCK_LINEAR_GROUPS
from runtime.qwen2 import Block
from runtime.sweep import Stream
from tests.test_job import RECIPE
from tests.tiny import tiny_config, tiny_tensors

ARCHITECTURE = Architecture.from_config(
    tiny_config(layers=1, hidden=64, intermediate=160, heads=4, kv_heads=2, vocab=320, dtype=torch.bfloat16)
)
GPTQ = replace(RECIPE, group_size=32)


def make_rows(count: int, seed: int) -> list[Rendered]:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 80, (count,), generator=draw).tolist()
    rows = [torch.randint(0, 300, (length,), generator=draw).tolist() for length in lengths]
    return [Rendered(row, len(row) - 1) for row in rows]


def make_streams(numerics: Numerics = FLOAT32) -> Streams:
    """Eight calibration and four parity rows, embedded."""
    streams = Streams(ARCHITECTURE, numerics, make_rows(8, 0), make_rows(4, 1), token_budget=100)
    streams.embed(tiny_tensors(ARCHITECTURE)["model.embed_tokens.weight"])
    return streams


def block_tensors() -> Tensors:
    prefix = "model.layers.0."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tiny_tensors(ARCHITECTURE).items()
        if name.startswith(prefix)
    }


def quantize(streams: Streams, recipe=GPTQ, watch=lambda *_: None) -> PackedBlock:
    tensors = block_tensors()
    return quantize_block(streams.block(tensors), streams.block(tensors), streams, 0, recipe, watch)


METHODS = {
    "gptq": GPTQ,
    "gptq-8": replace(GPTQ, bits=8),
    "rtn": replace(GPTQ, method="rtn"),
    "nf4": replace(RECIPE, method="nf4", group_size=-1),
    "int8": replace(RECIPE, method="int8", bits=8, group_size=-1),
}


@pytest.mark.parametrize("numerics", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_the_stream_is_what_a_reader_of_the_packed_block_computes(method, numerics):
    recipe, streams = METHODS[method], make_streams(numerics)
    packed = quantize(streams, recipe)
    reader = Block.from_tensors(ARCHITECTURE, packed.tensors, streams.rotary, numerics, recipe.quantization())
    for index, batch in enumerate(streams.quantized.batches):
        expected = reader(streams.quantized.read(index), batch)
        got = streams.quantized.read(index, following=True)
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


@pytest.mark.parametrize("share", [0.0, 1 / 8])
def test_each_stop_has_the_hessian_of_what_the_packed_linears_before_it_give(monkeypatch, share):
    """True sequential, over calibration rows only, against a forward pass and a sum written out by hand."""
    seen = []
    real = block_module.factorise
    monkeypatch.setattr(
        block_module, "factorise", lambda matrix, *more: (seen.append(matrix.clone().double()), real(matrix, *more))[1]
    )
    streams = make_streams()
    packed = quantize(streams, replace(GPTQ, scored_share=share))
    expected, total = {}, 0.0
    stream = streams.quantized
    for index in streams.calibration_batches:
        batch, hidden = stream.batches[index], stream.read(index)
        for ((start, end),), scored in zip(batch.paths, batch.scored.tolist(), strict=True):
            weights = torch.ones(end - start, dtype=torch.float64)
            weights[scored - start] = max(1, share / (1 - share) * (scored - start))
            for group, x in plain_inputs(packed.tensors, hidden[start:end]).items():
                expected[group] = expected.get(group, 0) + x.T @ (weights[:, None] * x)
            total += weights.sum().item()
    assert len(seen) == len(expected) == 4
    for matrix, (group, sum_) in zip(seen, expected.items(), strict=True):
        wanted = sum_ / total
        assert (matrix - wanted).norm() < 1e-5 * wanted.norm(), group


def test_linears_of_one_input_share_one_factor(monkeypatch):
    """q, k and v, then o, then gate and up, then down: four factorisations, seven solves, in data's order."""
    calls = []
    real_factorise, real_solve = block_module.factorise, block_module.solve
    monkeypatch.setattr(block_module, "factorise", lambda *a: (calls.append("factor"), real_factorise(*a))[1])
    monkeypatch.setattr(block_module, "solve", lambda w, *a: (calls.append(tuple(w.shape)), real_solve(w, *a))[1])
    quantize(make_streams())
    expected = []
    for group in BLOCK_LINEAR_GROUPS:
        expected += ["factor", *(ARCHITECTURE.linear_shape(name) for name in group)]
    assert calls == expected


@pytest.mark.parametrize("numerics", [FLOAT32, BFLOAT16])
def test_the_reference_leaves_the_block_as_if_alone(numerics):
    streams = make_streams(numerics)
    block, reference = streams.block(block_tensors()), streams.reference
    alone = [block(reference.read(number), batch) for number, batch in enumerate(reference.batches)]
    quantize(streams)
    for number, hidden in enumerate(alone):
        assert (reference.read(number, following=True) - hidden).abs().max() < 1e-5 * hidden.abs().max()


def test_no_inputs_stay_beside_the_factor(monkeypatch):
    seen = []

    class Watched(block_module.Correction):
        def add(self, x, reference, weights):
            super().add(x, reference, weights)
            seen.extend((weakref.ref(x), weakref.ref(reference)))

    def factorise(*arguments):
        assert seen and all(each() is None for each in seen)
        return real(*arguments)

    real = block_module.factorise
    monkeypatch.setattr(block_module, "Correction", Watched)
    monkeypatch.setattr(block_module, "factorise", factorise)
    quantize(make_streams())


def test_parity_rows_teach_nothing():
    """Another set of parity rows, the same packed block."""
    one = quantize(make_streams()).tensors
    streams = Streams(ARCHITECTURE, FLOAT32, make_rows(8, 0), make_rows(6, 99), token_budget=100)
    streams.embed(tiny_tensors(ARCHITECTURE)["model.embed_tokens.weight"])
    other = quantize(streams).tensors
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# ---- token weights --------------------------------------------------------------------------------------


def make_batch(lengths: list[int], scored: list[int] | None = None) -> Stream:
    """One batch of sequences; `scored` counts from each one's start."""
    places = scored or [length - 1 for length in lengths]
    rows = [Rendered([row] * length, place) for row, (length, place) in enumerate(zip(lengths, places, strict=True))]
    return Stream(pack(rows, sum(lengths)), 4)


@pytest.mark.parametrize("share", [1 / 32, 1 / 8, 0.5, 0.99])
def test_the_scored_token_has_its_share_of_what_it_and_all_before_it_weigh(share):
    lengths, scored = [200, 40, 1, 33, 2], [199, 17, 0, 32, 1]
    weights = token_weights(make_batch(lengths, scored), 0, share)
    assert weights is not None
    for part, place in zip(weights.split(lengths), scored, strict=True):
        others = torch.cat((part[:place], part[place + 1 :]))
        assert torch.equal(others, torch.ones_like(others))
        if share * (place + 1) > 1:
            assert part[place].item() == pytest.approx(share * part[: place + 1].sum().item(), rel=1e-5)


def test_tokens_in_common_count_once_and_each_end_for_itself():
    prompt = list(range(50))
    stream = Stream(pack([Rendered([*prompt, 60], 50), Rendered([*prompt, 70, 71, 72], 52)], 100), 4)
    weights = token_weights(stream, 0, 0.5)
    assert weights is not None and weights.tolist() == [1.0] * 50 + [50.0] + [1.0, 1.0, 52.0]


def test_a_row_so_short_that_the_share_would_take_weight_away_keeps_it():
    weights = token_weights(make_batch([20]), 0, 1 / 32)
    assert weights is not None and torch.equal(weights, torch.ones(20))


def test_no_share_is_no_weights():
    assert token_weights(make_batch([20, 30]), 0, 0.0) is None


# ---- figures and faults ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rtn", "nf4", "int8"])
def test_figures_of_rounding_are_of_the_weights(method):
    recipe, source = METHODS[method], block_tensors()
    streams = make_streams()
    packed = quantize(streams, recipe)
    reader = Block.from_tensors(ARCHITECTURE, packed.tensors, streams.rotary, FLOAT32, recipe.quantization())
    for name, figures in packed.linears.items():
        weight = source[f"{name}.weight"].double()
        error = (reader.linears[name].weight(torch.float32).double() - weight).square().mean()
        relative = (error / weight.square().mean()).item()
        assert figures.relative_loss == pytest.approx(relative, rel=1e-4)
        assert figures.sqnr_db == pytest.approx(-10 * torch.tensor(relative).log10().item(), rel=1e-4)
        assert (figures.damp, figures.dead_columns) == (0.0, 0)


def test_nothing_lost_has_no_ratio():
    """A weight that is all zeros comes back exactly, and infinity is no JSON."""
    streams, tensors = make_streams(), block_tensors()
    for name in BLOCK_LINEARS:
        tensors[f"{name}.weight"] = torch.zeros_like(tensors[f"{name}.weight"])
    block, original = streams.block(tensors), streams.block(tensors)
    packed = quantize_block(block, original, streams, 0, METHODS["int8"], print)
    assert {(each.relative_loss, each.sqnr_db) for each in packed.linears.values()} == {(0.0, None)}


def test_whoever_watches_is_told_of_every_linear_and_the_loss_before():
    told = []
    packed = quantize(make_streams(), watch=lambda name, loss: told.append((name, loss)))
    last = None
    for group in BLOCK_LINEAR_GROUPS:
        refined = {name: packed.linears[name].relative_loss for name in group}
        begun, first, *rest = [told.pop(0) for _ in range(1 + 2 * len(group))]
        assert begun == first == (group[0], last)
        assert [name for name, _ in rest] == [*group[1:], *group]
        assert all(loss > refined[name] for name, (_, loss) in zip(group, rest, strict=False))  # solved, not refined
        assert [loss for _, loss in rest[len(group) :]] == [refined[name] for name in group[:-1]]
        last = refined[group[-1]]
    assert not told


def test_every_stage_takes_its_seconds():
    packed = quantize(make_streams())
    assert set(packed.seconds) == {"inputs", "hessian", "factorise", "solve", "refine", "pack"}
    assert all(seconds > 0 for seconds in packed.seconds.values())


@pytest.mark.parametrize("rows", ["calibration", "parity"])
@pytest.mark.parametrize("of", ["reference", "quantized"])
def test_an_activation_that_is_no_number_is_named_by_block_and_row(monkeypatch, rows, of):
    streams, tensors = make_streams(), block_tensors()
    block, original = streams.block(tensors), streams.block(tensors)
    lengths = [batch.tokens for batch in streams.quantized.batches]
    candidates = streams.calibration_batches if rows == "calibration" else streams.parity_batches
    batch = next(batch for batch in candidates if lengths.count(lengths[batch]) == 1)
    tokens, row = lengths[batch], streams.quantized.batches[batch].row_at(0)
    faulty, real = {"reference": original, "quantized": block}[of], Block.after_mlp

    def after_mlp(self: Block, hidden: torch.Tensor, activation: torch.Tensor) -> torch.Tensor:
        result = real(self, hidden, activation)
        if self is faulty and len(result) == tokens:
            result[0, 3] = torch.nan
        return result

    monkeypatch.setattr(Block, "after_mlp", after_mlp)
    with pytest.raises(NonFiniteError, match=rf"block 0, {of}: a non-finite activation in conversation {row};"):
        quantize_block(block, original, streams, 0, GPTQ, print)
