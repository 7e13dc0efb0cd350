"""Read and validate the inputs of a quantization before it starts: checkpoint, conversations, recipe and plan."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch

from calibration.sampling import ConversationRenderer, Sample, sample
from calibration.sources import LoadedRows, load_rows
from quantize.job.gradient_plan import GradientPlan
from quantize.job.options import TOKENS_PER_INPUT, QuantizeOptions
from quantize.job.plan import QuantizationPlan, TokenCounts, widest_input
from quantize.job.recipe import Recipe
from quantize.job.resources import fit_memory
from quantize.job.token_estimate import TokenEstimator
from quantize.job.tokenizer_check import tokenizer_note
from quantize.solver.settings import usable_group_size
from runtime.checkpoints.checkpoint import Checkpoint, open_checkpoint, read_config
from runtime.checkpoints.model_config import BLOCK_LINEARS, ModelConfig
from runtime.checkpoints.quantization_config import NF4_BLOCKSIZE
from runtime.common.errors import ConfigurationError
from runtime.conversations.scoring_rule import ScoringRule
from runtime.execution.devices import cuda_device_count
from runtime.execution.precision_choice import resolve_dtype
from runtime.modeling.packed_batch import pack_batches


@dataclass(frozen=True)
class JobInputs:
    """The validated inputs of a quantization.

    Attributes:
        variant: whose errors tell which linears get more bits, or None.
        rule: which token is scored.
        notes: fallbacks, for the report.
    """

    checkpoint: Checkpoint
    variant: Checkpoint | None
    rows: LoadedRows
    sample: Sample
    recipe: Recipe
    plan: QuantizationPlan
    rule: ScoringRule
    notes: list[str]


def read_inputs(options: QuantizeOptions) -> JobInputs:
    """Open the checkpoint, select the rows, and make the recipe and the plan.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or not a reward model.
        ConversationError: the conversations cannot be read or rendered, or there are too few of them.
        ConfigurationError: the model is already quantized, an option is invalid, or the plan does not fit the machine.
    """
    rows = load_rows(options.calibration, options.row_options)  # before the checkpoint, which may have to be downloaded
    checkpoint = open_checkpoint(options.source)
    if checkpoint.quantization is not None:
        raise ConfigurationError(
            f"{checkpoint.directory} is already quantized ({checkpoint.quantization.method}); give the 16-bit model."
        )
    model_config = checkpoint.model_config
    renderer = checkpoint.renderer()
    selected = _sample(rows, renderer, options, model_config)
    variant = _open_variant(options.errors_of, checkpoint)
    recipe, notes = _make_recipe(options, model_config, checkpoint.fingerprint(), selected.fingerprint(), variant)
    plan = _make_plan(model_config, recipe, _count_tokens(selected, recipe.token_budget))
    if note := tokenizer_note(checkpoint.directory, selected.calibration, renderer.rule):
        notes.append(note)
    notes += checkpoint.notes
    plan = fit_memory(plan, options.ram_budget)
    return JobInputs(checkpoint, variant, rows, selected, recipe, plan, renderer.rule, notes)


def plan_from_config(options: QuantizeOptions) -> QuantizationPlan:
    """Make the plan from the model's config and the conversations. Token counts are estimated from characters.

    Raises:
        CheckpointError, ConversationError, ConfigurationError: as `read_inputs`.
    """
    _, model_config, _ = read_config(options.source)
    recipe, _ = _make_recipe(options, model_config, "", "")
    estimator = TokenEstimator(model_config.max_position_embeddings)
    selected = _sample(load_rows(options.calibration, options.row_options), estimator, options, model_config)
    token_counts = replace(_count_tokens(selected, recipe.token_budget), estimated=True)
    return _make_plan(model_config, recipe, token_counts)


def _open_variant(source: str | None, checkpoint: Checkpoint) -> Checkpoint | None:
    if source is None:
        return None
    variant = open_checkpoint(source)
    quantization = variant.quantization
    uniform = quantization is not None and quantization.bits == 4 and not quantization.overrides
    if not uniform or variant.model_config != checkpoint.model_config:
        raise ConfigurationError(
            f"--errors-of: {variant.directory} is no variant of {checkpoint.name} with 4 bits for every linear."
        )
    return variant


def _sample(
    rows: LoadedRows, renderer: ConversationRenderer, options: QuantizeOptions, model_config: ModelConfig
) -> Sample:
    return sample(
        rows,
        renderer,
        rows_wanted=options.rows,
        tokens_wanted=TOKENS_PER_INPUT * widest_input(model_config),
        parity_pairs=options.parity_pairs_wanted,
        exact_pairs=options.parity_pairs is not None,
        max_tokens=options.max_tokens,
        seed=options.seed,
    )


def _count_tokens(selected: Sample, token_budget: int) -> TokenCounts:
    """Count tokens after packing, which stores a prefix shared within a batch once."""
    conversations = [row.rendered for row in selected.calibration]
    compared = [rendered for pair in selected.parity for rendered in (pair.chosen, pair.rejected)]
    batches = [pack_batches(rows, token_budget) for rows in (conversations, compared)]
    calibration, parity = (sum(batch.tokens for batch in each) for each in batches)
    return TokenCounts(calibration, parity, max(batch.tokens for each in batches for batch in each))


def _make_plan(model_config: ModelConfig, recipe: Recipe, token_counts: TokenCounts) -> QuantizationPlan:
    matmul_bytes = 4 if recipe.dtype == "float32" else 2
    counted = (token_counts.calibration_tokens, token_counts.longest_batch, matmul_bytes)
    return QuantizationPlan(
        model_config=model_config,
        quantization=recipe.quantization(),
        bits=recipe.bits,
        token_counts=token_counts,
        matmul_bytes=matmul_bytes,
        prefetch=True,
        device=recipe.device,
        gradients=GradientPlan(model_config, *counted, mixed=recipe.mixed) if recipe.calibrated else None,
    )


def _make_recipe(
    options: QuantizeOptions,
    model_config: ModelConfig,
    model: str,
    conversations: str,
    variant: Checkpoint | None = None,
) -> tuple[Recipe, list[str]]:
    """Make the recipe and the notes on its fallbacks; `model` and `conversations` are fingerprints."""
    device = _device(options.device, must_exist=not options.dry_run)
    widths = [model_config.linear_shape(name)[1] for name in BLOCK_LINEARS]
    group_size, note = usable_group_size(options.group_size, widths)
    stored_as_gptq = options.method in ("gptq", "rtn")
    in_blocks = not any(width % NF4_BLOCKSIZE for width in widths)
    calibrated = options.method == "gptq" or (options.method == "nf4" and options.rows != 0 and in_blocks)
    if options.method == "nf4" and not in_blocks:
        note = f"a width is not a multiple of {NF4_BLOCKSIZE}, so NF4 is not calibrated."
    recipe = Recipe(
        model=model,
        conversations=conversations,
        method=options.method,
        calibrated=calibrated,
        bits=options.bits,
        errors_of=variant.fingerprint() if variant else "",
        group_size=group_size if stored_as_gptq else -1,
        sym=options.sym,
        desc_act=options.desc_act,
        damp_percent=options.damp_percent,
        activation_order=options.activation_order,
        importance_scales=options.importance_scales,
        token_budget=options.token_budget,
        dtype=resolve_dtype(options.dtype, device),
        device=device,
        repair=options.recalibration,
    )
    return recipe, [note] if note and (stored_as_gptq or not in_blocks) else []


def _device(requested: str, must_exist: bool) -> str:
    """Return `cpu` or `cuda:N`. With `must_exist`, raise ConfigurationError if the machine has no such device."""
    if requested == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if requested == "cpu":
        return requested
    cuda = re.fullmatch(r"cuda(?::(\d+))?", requested)
    if cuda is None:
        raise ConfigurationError(f"--device is {requested!r}; it must be auto, cpu or cuda:N.")
    count = cuda_device_count()
    index = int(cuda[1] or 0)
    if must_exist and index >= count:
        raise ConfigurationError(
            f"--device {requested}: this machine has {count} CUDA devices that torch can use; try --device cpu."
        )
    return f"cuda:{index}"
