"""The tab that says what is loaded, where, and how much it has done."""

from __future__ import annotations

from typing import Any

import gradio as gr
import psutil

from runtime.api.service import ServedModel, Service
from runtime.memory import peak_memory
from runtime.page.markup import fill, html_block
from runtime.page.waiting import QUICK, Awaiting
from runtime.placement_table import placement_rows
from runtime.sizes import show_size
from runtime.version import kit_version


def model_tab(service: Service, tab: gr.Tab) -> Awaiting:
    """Lay it out in `tab`, which is brought up to date whenever it is opened."""
    models = html_block(elem_id="model-list", elem_classes="live")
    refresh = gr.Button("Bring up to date", size="sm", elem_classes="quiet", scale=0)
    refresh.click(lambda: show_models(service), None, models, **QUICK)
    tab.select(lambda: show_models(service), None, models, **QUICK)
    return Awaiting([models], lambda: [show_models(service)])


def show_models(service: Service) -> str:
    """HTML of all models, and of the process that holds them."""
    return fill(
        "models",
        models=[describe_model(model) for model in service.models.values()],
        memory=show_size(psutil.Process().memory_info().rss),
        peak=show_size(peak_memory()),
        version=kit_version(),
    )


def describe_model(model: ServedModel) -> dict[str, Any]:
    """What there is to say of one, in words."""
    checkpoint = model.variant.checkpoint
    architecture, quantization = checkpoint.architecture, checkpoint.quantization
    stored = quantization.bits_per_weight(architecture) if quantization else 8 * architecture.dtype.itemsize
    about = [
        ("checkpoint", str(checkpoint.directory)),
        ("weights", f"{model.variant.weights}, {stored:.4g} bits a weight"),
        ("shape", f"{architecture.num_hidden_layers} blocks, hidden {architecture.hidden_size:,}"),
        ("longest conversation", f"{architecture.max_position_embeddings:,} tokens"),
    ]
    if model.variant.stored is not None:
        about.append(("made from", model.variant.stored.model))
    if model.error_margin is not None:
        about.append(("parity error of a margin", f"{model.error_margin:.3f}"))
    return {"name": model.name, "about": about, "plan": placement_rows(model.scorer.plan), "work": work_rows(model)}


def work_rows(model: ServedModel) -> list[tuple[str, str]]:
    """(name, value) of what was done since the start."""
    busy = model.busy_seconds
    rates = f"{model.tokens / busy:,.0f} tokens/s, {model.conversations / busy:,.1f} conversations/s" if busy else "–"
    return [
        ("conversations", f"{model.conversations:,}"),
        ("tokens", f"{model.tokens:,}"),
        ("busy", f"{busy:,.1f} s"),
        ("throughput", rates),
    ]
