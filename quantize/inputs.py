"""Everything a quantization reads before its work begins: the model, the conversations, the plan."""

from __future__ import annotations

import re
from argparse import Namespace
from dataclasses import dataclass

import torch

from calibration.conversations import Rows, load_rows
from calibration.sampling import Sample, sample
from quantize.plan import Load, Plan, fit_memory
from quantize.recipe import Recipe
from quantize.settings import usable_group_size
from runtime.architecture import BLOCK_LINEARS, Architecture
from runtime.batching import pack
from runtime.chat import Renderer
from runtime.checkpoint import Checkpoint, open_checkpoint, read_architecture
from runtime.devices import cuda_devices
from runtime.errors import PlanError
from runtime.numerics import matmul_dtype

CHARACTERS_A_TOKEN = 4.0  # of English under a Qwen tokenizer, for an estimate without one


@dataclass(frozen=True)
class Inputs:
    """What is quantized, with what, and what that costs.

    Attributes:
        notes: fallbacks taken so far, for the report.
    """

    checkpoint: Checkpoint
    rows: Rows
    sample: Sample
    recipe: Recipe
    plan: Plan
    notes: list[str]


def read_inputs(arguments: Namespace, model: str) -> Inputs:
    """Open the checkpoint, draw the rows, settle the recipe and plan the work.

    Raises:
        CheckpointError, ConversationError, PlanError: as their messages say.
    """
    rows = load_rows(arguments.calibration)  # before a checkpoint that may have to be fetched
    checkpoint = open_checkpoint(model)
    if checkpoint.quantization is not None:
        raise PlanError(
            f"{checkpoint.directory} is quantized already ({checkpoint.quantization.method}); name the 16-bit model."
        )
    architecture = checkpoint.architecture
    renderer = Renderer.from_directory(checkpoint.directory, architecture.max_position_embeddings)
    drawn = sample(
        rows,
        renderer,
        rows_wanted=arguments.rows,
        parity_pairs=arguments.parity_pairs,
        max_tokens=arguments.max_tokens,
        seed=arguments.seed,
    )
    recipe, notes = _make_recipe(arguments, architecture, checkpoint.fingerprint(), drawn.fingerprint())
    conversations = [row.rendered for row in drawn.calibration]
    compared = [rendered for pair in drawn.parity for rendered in (pair.chosen, pair.rejected)]
    batches = [pack(rows, recipe.token_budget) for rows in (conversations, compared)]
    calibration, parity = (sum(batch.tokens for batch in each) for each in batches)
    load = Load(calibration, parity, max(batch.tokens for each in batches for batch in each))
    plan = fit_memory(_make_plan(architecture, recipe, load), arguments.ram_budget)
    return Inputs(checkpoint, rows, drawn, recipe, plan, notes)


def plan_without_weights(arguments: Namespace, model: str) -> Plan:
    """The plan from a config alone; token counts are estimated from the conversations' characters."""
    _, architecture, _ = read_architecture(model)
    recipe, _ = _make_recipe(arguments, architecture, "", "")
    rows = load_rows(arguments.calibration)
    conversations = [row.messages for row in rows.conversations]
    conversations += [each for pair in rows.pairs for each in (pair.chosen_conversation, pair.rejected_conversation)]
    characters = sum(len(turn["content"]) for conversation in conversations for turn in conversation)
    mean = characters / len(conversations) / CHARACTERS_A_TOKEN + 20
    parity = int(mean * 2 * arguments.parity_pairs) if rows.pairs else 0
    load = Load(int(mean * arguments.rows), parity, recipe.token_budget, estimated=True)
    return _make_plan(architecture, recipe, load)


def _make_plan(architecture: Architecture, recipe: Recipe, load: Load) -> Plan:
    return Plan(
        architecture=architecture,
        quantization=recipe.quantization(),
        load=load,
        calibrated=recipe.calibrated,
        correction=recipe.calibrated and recipe.correction,
        refine_passes=recipe.refine_passes,
        matmul_bytes=4 if recipe.dtype == "float32" else 2,
        prefetch=True,
        device=recipe.device,
    )


def _make_recipe(
    arguments: Namespace, architecture: Architecture, model: str, conversations: str
) -> tuple[Recipe, list[str]]:
    device = _device(arguments.device, must_exist=not arguments.dry_run)
    widths = [architecture.linear_shape(name)[1] for name in BLOCK_LINEARS]
    group_size, note = usable_group_size(arguments.group_size, widths)
    stored_as_gptq = arguments.method in ("gptq", "rtn")
    recipe = Recipe(
        model=model,
        conversations=conversations,
        method=arguments.method,
        bits=arguments.bits,
        group_size=group_size if stored_as_gptq else -1,
        sym=not arguments.asymmetric,
        desc_act=arguments.desc_act,
        damp_percent=arguments.damp_percent,
        static_groups=not arguments.no_static_groups,
        activation_order=not arguments.no_activation_order,
        importance_scales=not arguments.no_importance_scales,
        refine_passes=arguments.refine_passes,
        scored_share=arguments.scored_share,
        correction=not arguments.no_correction,
        token_budget=arguments.token_budget,
        dtype=matmul_dtype(arguments.dtype, device),
        device=device,
        repair=not arguments.no_repair,
    )
    return recipe, [note] if note and stored_as_gptq else []


def _device(wanted: str, must_exist: bool) -> str:
    if wanted == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if wanted == "cpu":
        return wanted
    cuda = re.fullmatch(r"cuda(?::(\d+))?", wanted)
    if cuda is None:
        raise PlanError(f"--device is {wanted!r}; auto, cpu, or cuda:N was expected.")
    count = cuda_devices()
    index = int(cuda[1] or 0)
    if must_exist and index >= count:
        raise PlanError(
            f"--device {wanted}: this machine has {count} CUDA devices that torch can use; try --device cpu."
        )
    return f"cuda:{index}"
