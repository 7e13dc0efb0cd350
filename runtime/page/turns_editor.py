"""Editor for the turns of the conversation before the response."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import gradio as gr

from runtime.conversations.conversation import ChatMessage
from runtime.page.components import UNQUEUED_EVENT

EditorTurn = dict[str, Any]
"""`{"id": unique int, "role": "user" or "assistant", "content": text, "focus": whether its box takes the focus}`."""

_ids = count()


def make_turn(role: str, content: str = "", *, focus: bool = False) -> EditorTurn:
    """Make a turn with a new id."""
    return {"id": next(_ids), "role": role, "content": content, "focus": focus}


def first_turns() -> list[EditorTurn]:
    """The turns of an empty conversation: one blank user turn."""
    return [make_turn("user")]


def with_texts(turns: Sequence[EditorTurn], texts: Sequence[str]) -> list[EditorTurn]:
    """The turns with the texts currently in their boxes, and without focus."""
    return [{**turn, "content": text, "focus": False} for turn, text in zip(turns, texts, strict=True)]


def add_turn(turns: Sequence[EditorTurn], texts: Sequence[str]) -> list[EditorTurn]:
    """Append a blank turn of the other role and focus it."""
    role = "assistant" if turns and turns[-1]["role"] == "user" else "user"
    return [*with_texts(turns, texts), make_turn(role, focus=True)]


def remove_turn(turns: Sequence[EditorTurn], texts: Sequence[str], id: int) -> list[EditorTurn]:
    """Remove the turn with that id; removing the only turn leaves a blank one."""
    return [turn for turn in with_texts(turns, texts) if turn["id"] != id] or first_turns()


def turns_to_messages(turns: Sequence[EditorTurn], texts: Sequence[str]) -> list[ChatMessage]:
    """Convert the turns to chat messages."""
    return [{"role": turn["role"], "content": text} for turn, text in zip(turns, texts, strict=True)]


def messages_to_turns(messages: Sequence[ChatMessage]) -> list[EditorTurn]:
    """Convert chat messages to turns, without the system prompt."""
    return [make_turn(each["role"], each["content"]) for each in messages if each["role"] != "system"] or first_turns()


def make_editor(turns: gr.JSON, listen: Callable[[list[EditorTurn], list[gr.Textbox]], None]) -> None:
    """Show a text box for each turn in the value of `turns`.

    Args:
        listen: called with the turns and their boxes whenever the boxes are rebuilt, to attach the events that read
            the boxes.
    """

    @gr.render(inputs=[turns], queue=False, show_progress="hidden")
    def show(current: list[EditorTurn]) -> None:
        boxes = []
        removals = []
        for number, turn in enumerate(current, 1):
            with gr.Row(elem_classes="turn", key=f"row-{turn['id']}"):
                boxes.append(
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
                lambda *texts, id=turn["id"], turns=current: remove_turn(turns, texts, id),
                boxes,
                turns,
                **UNQUEUED_EVENT,
            )
        listen(current, boxes)
