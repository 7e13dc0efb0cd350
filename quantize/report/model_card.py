"""The model card of a packed checkpoint: its settings and its parity with the unquantized model."""

from __future__ import annotations

from quantize.job.recipe import Recipe
from runtime.evaluation.report import ParityReport
from runtime.evaluation.verdict import describe_quantization, summary_table, verdict

CARD_TEMPLATE = """\
---
base_model: {model}
pipeline_tag: text-classification
tags: [reward-model, worldpm, {method}]
---

# {model}, {description}

A reward model: a conversation in, one score out, read at the final `<|endoftext|>`. Made by worldpm-kit
{version} from the unquantized checkpoint in one sweep; the score head is not quantized.

```python
from runtime import Scorer
Scorer.from_pretrained("path/to/this/directory").score([[
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


def render_card(recipe: Recipe, model: str, description: str, report: ParityReport | None, kit: str) -> str:
    """Render the checkpoint's README.md. It has no timestamps, so that equal jobs write equal bytes."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in recipe.choices().items())
    return CARD_TEMPLATE.format(
        model=model,
        method=recipe.method,
        description=description,
        version=kit,
        settings=rows,
        parity=_parity(report) if report else "Not measured: there were no preference pairs to compare on.",
    )


def describe_variant(report: ParityReport | None, recipe: Recipe) -> str:
    """Short description, such as `GPTQ, 4 bits in groups of 128, 4.25 bits per weight`."""
    return describe_quantization(report.subject) if report else f"{recipe.method.upper()}, {recipe.bits:g} bits"


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
