"""Gradio parts that several tabs share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from runtime.api.service import Service

# Options of all short events, which bypass gradio's queue for two reasons. Scoring already waits in the batcher's
# queue, which serves visitors in turn; gradio's queue would make one visitor wait for another. And gradio closes its
# event stream after each answer, which loses the answer to an event sent at that moment (a click, or the next of a
# chain).
UNQUEUED_EVENT: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


@dataclass(frozen=True)
class DeferredComponents:
    """Components that are updated once the models are loaded.

    Attributes:
        updates: returns one update per component.
    """

    components: list[Any]
    updates: Callable[[], list[Any]]


def html_block(value: str = "", **arguments: Any) -> gr.HTML:
    """Make a container for HTML from `render_template`, styled by `style.css` only."""
    return gr.HTML(value, apply_default_css=False, js_on_load=None, **arguments)


def model_dropdown(service: Service) -> tuple[gr.Dropdown, Callable[[], Any]]:
    """Make a dropdown of the models, hidden if there is at most one, and the function that returns its update."""
    dropdown = gr.Dropdown(
        list(service.models),
        label="Model",
        visible=len(service.models) > 1,
        elem_classes="pick",
        scale=0,
        min_width=280,
    )

    def update() -> Any:
        names = list(service.models)
        return gr.update(choices=names, value=names[0] if names else None, visible=len(names) > 1)

    return dropdown, update
