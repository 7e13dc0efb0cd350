"""The Compare tab: scores two responses to one conversation with every model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import gradio as gr

from runtime.api.service import Service
from runtime.common.errors import ConversationError, KitError
from runtime.conversations.conversation import ChatMessage
from runtime.evaluation.scored_pair import Scores
from runtime.page.comparison import ModelComparison, build_prompt_turns, compare
from runtime.page.components import UNQUEUED_EVENT, DeferredComponents, html_block
from runtime.page.examples import EXAMPLES
from runtime.page.formatting import bits_per_weight
from runtime.page.markup import markdown_to_html, notice, render_template
from runtime.page.turns_editor import (
    EditorTurn,
    add_turn,
    first_turns,
    make_editor,
    messages_to_turns,
    turns_to_messages,
)
from runtime.scorer import probability_preferred

ON_EDITED_JS, ON_ANSWERED_JS = "() => worldpm.edited()", "() => worldpm.answered()"


@dataclass(frozen=True)
class ComparisonInputs:
    """The input components. The text boxes of the turns are not among them, since they are rebuilt with the turns."""

    system: gr.Textbox
    response_a: gr.Textbox
    response_b: gr.Textbox
    turns: gr.JSON

    @property
    def all(self) -> list[Any]:
        return [self.turns, self.system, self.response_a, self.response_b]


def compare_tab(service: Service, page: gr.Blocks) -> DeferredComponents:
    """Build the tab; the load event of `page` fills it from a shared link."""
    with gr.Column(elem_id="compare-inputs", elem_classes="inputs"):
        with gr.Row(elem_classes="toolbar"):
            example = gr.Dropdown(
                list(EXAMPLES), value=None, label="Start from an example", elem_classes="pick", scale=0, min_width=280
            )
            view = gr.Checkbox(label="Show responses as Markdown", elem_classes="view", scale=0)
        with gr.Accordion("System prompt", open=False, elem_classes="system"):
            system = gr.Textbox(
                "",
                label="System prompt",
                lines=2,
                max_lines=8,
                interactive=True,
                info="WorldPM was trained with an empty system prompt.",
            )
        turns = gr.JSON(first_turns(), visible="hidden")  # not gr.State, whose change events need the queue
        turns_column = gr.Column(elem_classes="turns")
        add = gr.Button("Add a turn", size="sm", elem_classes="quiet add", scale=0)
        with gr.Row(elem_classes="responses", equal_height=True):
            boxes = [_response_box(name) for name in "AB"]
    panes = [pane for _, pane in boxes]
    inputs = ComparisonInputs(system, boxes[0][0], boxes[1][0], turns)
    with gr.Row(elem_classes="actions"):
        run = gr.Button("Compare", variant="primary", size="lg", elem_id="compare-run", interactive=False, scale=0)
        swap = gr.Button("Swap A and B", size="sm", elem_classes="quiet", scale=0)
        clear = gr.Button("Clear", size="sm", elem_classes="quiet", scale=0)
        link = gr.Button("Copy link", size="sm", elem_classes="quiet", scale=0)
        html_block('<p class="hint">or press <kbd>Ctrl</kbd> <kbd>Enter</kbd></p>', elem_classes="hint-block")
    status = html_block(show_status(), elem_classes="status-line")
    result = html_block(elem_id="compare-result", elem_classes="live")
    _attach_events(service, inputs, turns_column, add, run, link, result)
    _attach_edits(inputs, view, panes, example, swap, clear)
    opened = gr.Textbox("", visible=False)
    page.load(load_shared_link, opened, [*inputs.all, status], js="() => worldpm.opened()", **UNQUEUED_EVENT)
    return DeferredComponents([run], lambda: [gr.update(interactive=True)])


def _response_box(name: str) -> tuple[gr.Textbox, gr.HTML]:
    with gr.Column(elem_classes=["response", f"side-{name.lower()}"], min_width=280):
        box = gr.Textbox("", label=f"Response {name}", lines=7, max_lines=24, interactive=True, elem_classes="grow")
        pane = html_block(visible=False, elem_classes="pane", label=f"Response {name}")
    return box, pane


def _attach_events(
    service: Service,
    inputs: ComparisonInputs,
    turns_column: gr.Column,
    add: gr.Button,
    run: gr.Button,
    link: gr.Button,
    result: gr.HTML,
) -> None:
    def attach(turns: list[EditorTurn], boxes: list[gr.Textbox]) -> None:
        async def comparison(system: str, a: str, b: str, *texts: str) -> str:
            return await show_comparison(service, system, turns_to_messages(turns, texts), (a, b))

        texts = [inputs.system, inputs.response_a, inputs.response_b, *boxes]
        run.click(comparison, texts, result, js="(...texts) => worldpm.submitted(texts)", **UNQUEUED_EVENT).then(
            None, js=ON_ANSWERED_JS
        )
        add.click(lambda *texts: add_turn(turns, texts), boxes, inputs.turns, **UNQUEUED_EVENT).then(
            None, js=ON_EDITED_JS
        )
        roles = json.dumps([turn["role"] for turn in turns])
        link.click(None, texts, js=f"(...texts) => worldpm.share({roles}, texts)")

    with turns_column:
        make_editor(inputs.turns, attach)


def _attach_edits(
    inputs: ComparisonInputs,
    view: gr.Checkbox,
    panes: list[gr.HTML],
    example: gr.Dropdown,
    swap: gr.Button,
    clear: gr.Button,
) -> None:
    """Attach the controls that change the inputs, after which the Markdown view is rendered again."""
    texts = [inputs.response_a, inputs.response_b]

    def preview(shown: bool, *responses: str) -> list[Any]:
        boxes = [gr.update(visible=not shown) for _ in responses]
        panes = [
            gr.update(
                visible=shown,
                value=render_template("prose", name=name, text=text, html=markdown_to_html(text)) if shown else "",
            )
            for name, text in zip("AB", responses, strict=True)
        ]
        return [*boxes, *panes]

    def choose(name: str | None) -> list[Any]:
        example = EXAMPLES.get(name or "")
        if example is None:
            return [gr.skip()] * 4
        return [messages_to_turns(example.turns), "", example.response_a, example.response_b]

    view.change(preview, [view, *texts], [*texts, *panes], **UNQUEUED_EVENT)
    swap.click(None, texts, texts, js="(a, b) => [b, a]").then(None, js=ON_EDITED_JS).then(
        preview, [view, *texts], [*texts, *panes], **UNQUEUED_EVENT
    )
    example.input(choose, example, inputs.all, **UNQUEUED_EVENT).then(None, js=ON_EDITED_JS).then(
        preview, [view, *texts], [*texts, *panes], **UNQUEUED_EVENT
    )
    clear.click(lambda: [first_turns(), "", "", "", None], None, [*inputs.all, example], **UNQUEUED_EVENT).then(
        None, js=ON_EDITED_JS
    ).then(preview, [view, *texts], [*texts, *panes], **UNQUEUED_EVENT)


async def show_comparison(service: Service, system: str, turns: list[ChatMessage], responses: tuple[str, str]) -> str:
    """HTML of a comparison, or of the error."""
    try:
        service.get(None)
        rows = await compare(service, build_prompt_turns(system, turns), responses)
        if all(row.scores is None for row in rows):
            raise KitError(rows[0].error)
    except KitError as error:
        return notice(error)
    warnings = list(dict.fromkeys(text for row in rows if row.scores for text in row.warnings))
    return render_template(
        "comparison",
        rows=rows,
        warnings=warnings,
        references=_references(rows),
        bits_per_weight=bits_per_weight,
        probability=probability_preferred,
    )


def _references(rows: list[ModelComparison]) -> list[tuple[str, Scores]]:
    """Stored scores of the original models, one per model; loaded originals already have a row."""
    found: dict[str, Scores] = {}
    for row in rows:
        stored = row.model.variant.stored_reference
        if row.reference is not None and row.reference_name == "stored" and stored is not None:
            found.setdefault(f"{stored.model}, stored", row.reference)
    return list(found.items())


def show_status(text: str = "") -> str:
    """HTML of the status line, which the script writes to as well. `text` is not escaped."""
    return f'<p role="status" id="compare-status">{text}</p>'


def load_shared_link(text: str) -> list[Any]:
    """Read the inputs from the JSON text of a shared link: turns, system prompt, A, B, and the status line."""
    try:
        shared = json.loads(text) if text else None
        if shared is None:
            return [gr.skip()] * 5
        messages = [{"role": turn["role"], "content": turn["content"]} for turn in shared["turns"]]
        texts = [shared["system"], shared["a"], shared["b"], *(each["content"] for each in messages)]
        roles = {each["role"] for each in messages}
        if not all(isinstance(each, str) for each in texts) or roles - {"user", "assistant"}:
            raise ConversationError("a role or a text has the wrong type")
    except (ValueError, KeyError, TypeError, RecursionError, KitError):
        return [*[gr.skip()] * 4, show_status("The link cannot be read; ask its sender for a new one.")]
    return [messages_to_turns(messages), shared["system"], shared["a"], shared["b"], gr.skip()]
