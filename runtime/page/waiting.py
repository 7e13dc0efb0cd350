"""What of the page waits for the models, and how its events are run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from runtime.api.service import Service

# Nothing of one visitor waits for another's: events that score wait in the batcher's queue, which takes turns, rather
# than in gradio's, which would not. Nor are answers to come by gradio's stream of events: it is closed after each
# answer, and what is asked in that instant (a click, or the next of a chain) is answered into no stream, so is lost.
QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


@dataclass(frozen=True)
class Awaiting:
    """Components that are of use when the models are there.

    Attributes:
        updates: what they become then, one a component.
    """

    components: list[Any]
    updates: Callable[[], list[Any]]


def model_choice(service: Service) -> tuple[gr.Dropdown, Callable[[], Any]]:
    """A choice among the models, hidden where there is none, and how it is filled when they are there."""
    choice = gr.Dropdown(
        list(service.models),
        label="Model",
        visible=len(service.models) > 1,
        elem_classes="pick",
        scale=0,
        min_width=280,
    )

    def filled() -> Any:
        names = list(service.models)
        return gr.update(choices=names, value=names[0] if names else None, visible=len(names) > 1)

    return choice, filled
