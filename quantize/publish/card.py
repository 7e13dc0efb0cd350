"""The model card as it is published: the card beside the checkpoint, with what only its publisher knows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from quantize.report.model_card import CARD_FILE, THIS_DIRECTORY, base_model_id, evaluation_result
from runtime.checkpoints.checkpoint import Checkpoint
from runtime.common.errors import ConfigurationError
from runtime.common.json_object import read_json_object
from runtime.evaluation.metrics import Estimate
from runtime.evaluation.reference_scores import REFERENCE_SCORES_FILE, ReferenceScores


def published_card(
    checkpoint: Checkpoint,
    repository: str,
    *,
    base_model: str | None = None,
    licence: str | None = None,
    results: Sequence[EvalResult] = (),
) -> ModelCard:
    """Complete the card of a checkpoint for `repository`. What a user wrote into it stays.

    Args:
        base_model, licence: replace what the card states.
        results: of evaluations; they replace results of the same evaluation.

    Raises:
        ConfigurationError: the metadata of the card cannot be parsed.
    """
    card = _read_card(checkpoint)
    owner, _, name = repository.partition("/")
    data: Any = card.data  # ModelCardData; its fields are not declared
    data.base_model = base_model or data.base_model or _recorded_base_model(checkpoint)
    data.license = licence or data.license
    if data.base_model is None:
        data.pop("base_model_relation")
    else:
        data["base_model_relation"] = "quantized"
    data["quantized_by"] = data.get("quantized_by", owner)
    kept = [each for each in data.eval_results or [] if not any(each.is_equal_except_value(new) for new in results)]
    data.eval_results = [*kept, *results] or None
    data.model_name = name if data.eval_results else None
    card.text = card.text.replace(THIS_DIRECTORY, repository)
    return card


def missing_metadata(card: ModelCard) -> list[str]:
    """What the card should state and does not, each with its option."""
    missing = []
    data: Any = card.data
    if data.base_model is None:
        missing.append("the card names no base model: its hub id was not recorded; add --base-model OWNER/NAME")
    if data.license is None:
        missing.append("the card names no licence: the original's card was not at hand; add --license ID")
    return missing


def read_results(path: Path, checkpoint: Checkpoint) -> list[EvalResult]:
    """The results in a file of worldpm-evaluate: an accuracy for each section.

    Raises:
        KitError: the file has other content, or the results of another model.
    """
    content = read_json_object(path)
    sections, benchmark = content.get("sections"), content.get("benchmark")
    if not isinstance(sections, dict) or not isinstance(benchmark, str) or not all(map(_is_section, sections.values())):
        raise ConfigurationError(f"{path} has no `benchmark` with `sections`; give a result of worldpm-evaluate.")
    if content.get("fingerprint") != checkpoint.fingerprint():
        raise ConfigurationError(f"{path} has the results of another model; evaluate {checkpoint.name}.")
    figures = {name: Estimate.model_validate(_figures(each)) for name, each in sections.items()}
    return [
        evaluation_result(benchmark, benchmark, "accuracy", estimate, f"Accuracy, {name}", name)
        for name, estimate in figures.items()
        if estimate.value is not None
    ]


def _figures(section: dict[str, Any]) -> dict[str, Any]:
    return {name: section.get(key) for name, key in (("value", "accuracy"), ("low", "low"), ("high", "high"))}


def _is_section(section: Any) -> bool:
    return isinstance(section, dict) and all(
        each is None or (type(each) in (int, float) and math.isfinite(each)) for each in _figures(section).values()
    )


def _read_card(checkpoint: Checkpoint) -> ModelCard:
    path = checkpoint.directory / CARD_FILE
    text = path.read_text(encoding="utf-8") if path.is_file() else f"---\n{{}}\n---\n\n# {checkpoint.name}\n"
    try:
        return ModelCard(text)
    except Exception as error:  # of the card's parser, or of the YAML library under it
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"{path}: the metadata cannot be read ({reason}); correct it.") from error


def _recorded_base_model(checkpoint: Checkpoint) -> str | None:
    """The hub id of the original, from its name beside the reference scores."""
    if not (checkpoint.directory / REFERENCE_SCORES_FILE).is_file():
        return None
    return base_model_id(ReferenceScores.load(checkpoint.directory).model)
