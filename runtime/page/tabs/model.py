"""The Model tab: loaded models, their placement, and counts since startup."""

from __future__ import annotations

from typing import Any

import gradio as gr
import psutil

from runtime.api.service import ServedModel, Service
from runtime.common.process_memory import peak_memory
from runtime.common.terminal import format_size
from runtime.common.version import kit_version
from runtime.execution.placement_table import placement_rows
from runtime.page.components import UNQUEUED_EVENT, DeferredComponents, html_block
from runtime.page.markup import render_template


def model_tab(service: Service, tab: gr.Tab) -> DeferredComponents:
    """Build the tab in `tab`; its content is refreshed whenever it is opened."""
    models = html_block(elem_id="model-list", elem_classes="live")
    refresh = gr.Button("Refresh", size="sm", elem_classes="quiet", scale=0)
    refresh.click(lambda: show_models(service), None, models, **UNQUEUED_EVENT)
    tab.select(lambda: show_models(service), None, models, **UNQUEUED_EVENT)
    return DeferredComponents([models], lambda: [show_models(service)])


def show_models(service: Service) -> str:
    """HTML of all models and of the server process."""
    return render_template(
        "models",
        models=[describe_model(model) for model in service.models.values()],
        memory=format_size(psutil.Process().memory_info().rss),
        peak=format_size(peak_memory()),
        version=kit_version(),
    )


def describe_model(model: ServedModel) -> dict[str, Any]:
    """The facts about a model as (name, value) rows for the template."""
    checkpoint = model.variant.checkpoint
    model_config, quantization = checkpoint.model_config, checkpoint.quantization
    stored = quantization.bits_per_weight(model_config) if quantization else 8 * model_config.dtype.itemsize
    about = [
        ("checkpoint", str(checkpoint.directory)),
        ("weights", f"{model.variant.weights_description}, {stored:.4g} bits per weight"),
        ("shape", f"{model_config.num_hidden_layers} blocks, hidden {model_config.hidden_size:,}"),
        ("longest conversation", f"{model_config.max_position_embeddings:,} tokens"),
    ]
    if model.variant.stored_reference is not None:
        about.append(("quantized from", model.variant.stored_reference.model))
    if model.error_margin is not None:
        about.append(("parity error of a margin", f"{model.error_margin:.3f}"))
    plan = placement_rows(model.scorer.plan, model.scorer.renderer.rule)
    return {"name": model.name, "about": about, "plan": plan, "work": work_rows(model)}


def work_rows(model: ServedModel) -> list[tuple[str, str]]:
    """Counts since startup as (name, value) rows."""
    busy = model.busy_seconds
    rates = f"{model.tokens / busy:,.0f} tokens/s, {model.conversations / busy:,.1f} conversations/s" if busy else "–"
    return [
        ("conversations", f"{model.conversations:,}"),
        ("tokens", f"{model.tokens:,}"),
        ("scoring time", f"{busy:,.1f} s"),
        ("throughput", rates),
    ]
