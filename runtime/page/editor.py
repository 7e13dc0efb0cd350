"""The conversation before the response: a system prompt and any number of turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import gradio as gr

from runtime.conversation import Message
from runtime.page.waiting import QUICK

Turn = dict[str, Any]
"""`{"id": unlike any other's, "role": as a message's, "content": text, "focus": whether to begin typing there}`."""

_ids = count()


def make_turn(role: str, content: str = "", *, focus: bool = False) -> Turn:
    """A turn with an id of its own."""
    return {"id": next(_ids), "role": role, "content": content, "focus": focus}


def first_turns() -> list[Turn]:
    """A conversation that is yet to be written."""
    return [make_turn("user")]


def with_texts(turns: Sequence[Turn], texts: Sequence[str]) -> list[Turn]:
    """The turns as they stand in the page."""
    return [{**turn, "content": text, "focus": False} for turn, text in zip(turns, texts, strict=True)]


def add_turn(turns: Sequence[Turn], texts: Sequence[str]) -> list[Turn]:
    """One more at the end, by whoever did not speak last."""
    role = "assistant" if turns and turns[-1]["role"] == "user" else "user"
    return [*with_texts(turns, texts), make_turn(role, focus=True)]


def remove_turn(turns: Sequence[Turn], texts: Sequence[str], id: int) -> list[Turn]:
    """All but one; the last that is left stays, and is emptied."""
    return [turn for turn in with_texts(turns, texts) if turn["id"] != id] or first_turns()


def messages_of(turns: Sequence[Turn], texts: Sequence[str]) -> list[Message]:
    """What the renderer takes."""
    return [{"role": turn["role"], "content": text} for turn, text in zip(turns, texts, strict=True)]


def turns_of(messages: Sequence[Message]) -> list[Turn]:
    """Turns of some messages, of which a system prompt is none."""
    return [make_turn(each["role"], each["content"]) for each in messages if each["role"] != "system"] or first_turns()


def make_editor(turns: gr.JSON, listen: Callable[[list[Turn], list[gr.Textbox]], None]) -> None:
    """Text boxes for the turns that a component holds.

    `listen` is called with the turns and their boxes whenever these are made anew, to attach the events that need
    their texts.
    """

    @gr.render(inputs=[turns], queue=False, show_progress="hidden")
    def boxes(current: list[Turn]) -> None:
        shown = []
        removals = []
        for number, turn in enumerate(current, 1):
            with gr.Row(elem_classes="turn", key=f"row-{turn['id']}"):
                shown.append(
                    gr.Textbox(
                        value=turn["content"],
                        label=f"Turn {number}, {turn['role']}",
                        lines=2,
                        max_lines=14,
                        interactive=True,
                        autofocus=turn["focus"],
                        placeholder="What the user asks" if number == 1 else "",
                        key=f"turn-{turn['id']}",
                        scale=1,
                    )
                )
                removals.append(
                    gr.Button(
                        f"Remove turn {number}",
                        size="sm",
                        elem_classes="quiet remove",
                        scale=0,
                        min_width=40,
                        visible=len(current) > 1,
                    )
                )
        for turn, button in zip(current, removals, strict=True):
            button.click(
                lambda *texts, id=turn["id"], kept=current: remove_turn(kept, texts, id),
                shown,
                turns,
                **QUICK,
            )
        listen(current, shown)
