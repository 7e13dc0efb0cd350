"""The model card of a packed checkpoint: metadata for the hub, settings, and parity with the unquantized model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from quantize.job.recipe import Recipe
from runtime.checkpoints.checkpoint import Checkpoint
from runtime.common.hub import HubId
from runtime.evaluation.golden import match_name
from runtime.evaluation.metrics import Estimate
from runtime.evaluation.report import ParityReport
from runtime.evaluation.verdict import describe_quantization, summary_table, verdict

CARD_FILE = "README.md"
LONGEST_CARD = 1 << 20
"""Bytes of a card that is read."""

THIS_DIRECTORY = "path/to/this/directory"
"""Stands in the card's example until the model is published."""

CARD_TEMPLATE = """\
---
{metadata}
---

# {model}, {description}

A reward model: a conversation in, one score out, read at {scored_at}. Made by worldpm-kit
{version} from the unquantized checkpoint in one sweep; the score head is not quantized.

```python
from runtime import Scorer
Scorer.from_pretrained("{directory}").score([[
    {{"role": "user", "content": "Tips for better sleep?"}},
    {{"role": "assistant", "content": "Keep a regular bedtime and put screens away an hour before."}},
]])
```

## How it was made

| setting | value |
|---|---|
{settings}

## Parity with the unquantized model

{parity}
"""

# (field of ParityMetrics, metric type, name) of the figures in the card's metadata
_METRICS = (
    ("agreement", "pair_agreement", "Pair agreement with the unquantized model"),
    ("chosen_accuracy", "accuracy", "Accuracy"),
    ("spearman", "spearmanr", "Spearman rank correlation with the unquantized model's scores"),
    ("mean_shift", "mean_absolute_shift", "Mean absolute shift, in standard deviations of the unquantized scores"),
)


def render_card(
    recipe: Recipe,
    source: Checkpoint,
    description: str,
    scored_at: str,
    report: ParityReport | None,
    kit: str,
) -> str:
    """Render the checkpoint's README.md. It has no timestamps, so that equal jobs write equal bytes.

    Args:
        source: the unquantized checkpoint; its licence is taken from its card, if it has one.
        scored_at: describes the scored token, see `ScoringRule.description`.
    """
    settings = recipe.choices() | ({"base model": f"{source.name}, commit {source.commit}"} if source.commit else {})
    results = parity_results(report) if report else []
    base_model = base_model_id(source.name)
    metadata = ModelCardData(
        base_model=base_model,
        base_model_relation="quantized" if base_model else None,
        pipeline_tag="text-classification",
        tags=["reward-model", "worldpm", recipe.method],
        model_name=f"{source.name}, {description}" if results else None,
        eval_results=results or None,
        **read_licence(source.directory),
    )
    return CARD_TEMPLATE.format(
        metadata=metadata.to_yaml(),
        directory=THIS_DIRECTORY,
        model=source.name,
        description=description,
        scored_at=scored_at,
        version=kit,
        settings="\n".join(f"| {name} | {value} |" for name, value in settings.items()),
        parity=_parity(report) if report else "Not measured: there were no preference pairs to compare on.",
    )


def describe_variant(report: ParityReport | None, recipe: Recipe) -> str:
    """Short description, such as `GPTQ, 4 bits in groups of 128, 4.25 bits per weight`."""
    return describe_quantization(report.subject) if report else f"{recipe.method.upper()}, {recipe.bits:g} bits"


def base_model_id(name: str) -> str | None:
    """The hub id of a model: a hub id without its revision, or that of a WorldPM model by the name of its directory."""
    if hub_id := HubId.parse(name):
        return hub_id.name
    return match_name(name)


def parity_results(report: ParityReport) -> list[EvalResult]:
    """The parity figures as the hub's metadata has evaluation results; undefined figures are left out."""
    pairs = report.figures.pairs
    return [
        evaluation_result(
            "preference-pairs", f"{pairs} held-out preference pairs", metric, getattr(report.figures, field), title
        )
        for field, metric, title in _METRICS
        if getattr(report.figures, field).value is not None
    ]


def evaluation_result(
    dataset: str, dataset_title: str, metric: str, estimate: Estimate, title: str, section: str | None = None
) -> EvalResult:
    """A figure with its 95 % interval as the hub's metadata has evaluation results."""
    interval = None if estimate.low is None else {"low_95": _rounded(estimate.low), "high_95": _rounded(estimate.high)}
    return EvalResult(
        task_type="text-classification",
        task_name="Reward modelling",
        dataset_type=dataset,
        dataset_name=dataset_title,
        dataset_config=section,
        metric_type=metric,
        metric_name=title,
        metric_value=_rounded(estimate.value),
        metric_args=interval,
    )


def read_licence(directory: Path) -> dict[str, Any]:
    """The licence in the metadata of the card in `directory`; empty if there is no card that states one."""
    try:
        with open(directory / CARD_FILE, encoding="utf-8") as file:
            stated = ModelCard(file.read(LONGEST_CARD), ignore_metadata_errors=True).data
    except Exception:  # of the system, of the card's parser, or of the YAML library under it
        return {}
    keys = ("license", "license_name", "license_link")
    return {key: stated.get(key) for key in keys if isinstance(stated.get(key), str)}


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _parity(report: ParityReport) -> str:
    header, *rows = summary_table(report)
    table = [header, ("---",) * len(header), *rows]
    lines = [f"| {' | '.join(row)} |" for row in table]
    judged = verdict(report)
    notes = [f"- {note}" for note in report.notes]
    subject = report.subject
    intro = (
        f"Against {subject.model} ({subject.reference_dtype}) on {report.figures.pairs} preference pairs whose "
        f"prompts were not calibrated on. {' '.join(judged.sentences)}"
    )
    return "\n".join([intro, "", *lines, *([""] if notes else []), *notes, "", "`parity.html` has the whole report."])
