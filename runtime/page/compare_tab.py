"""The tab that compares two responses."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import gradio as gr

from runtime.api.service import ServedModel, Service
from runtime.conversation import Message
from runtime.errors import ConversationError, KitError
from runtime.page.comparison import Row, compare, read_turns
from runtime.page.editor import Turn, add_turn, first_turns, make_editor, messages_of, turns_of
from runtime.page.examples import EXAMPLES
from runtime.page.markup import fill, html_block, notice
from runtime.page.prose import to_html
from runtime.page.waiting import QUICK, Awaiting
from runtime.preference import probability_preferred
from runtime.scored_pair import Scores

EDITED, ANSWERED = "() => worldpm.edited()", "() => worldpm.answered()"


@dataclass(frozen=True)
class Inputs:
    """What a comparison is made of, the turns apart, which come and go."""

    system: gr.Textbox
    response_a: gr.Textbox
    response_b: gr.Textbox
    turns: gr.JSON

    @property
    def all(self) -> list[Any]:
        return [self.turns, self.system, self.response_a, self.response_b]


def compare_tab(service: Service, page: gr.Blocks) -> Awaiting:
    """Lay it out, in `page`, which says when a link was opened."""
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
                info="The model was trained with an empty one.",
            )
        turns = gr.JSON(first_turns(), visible="hidden")  # no State, whose changes are told by the queue alone
        place = gr.Column(elem_classes="turns")
        add = gr.Button("Add a turn", size="sm", elem_classes="quiet add", scale=0)
        with gr.Row(elem_classes="responses", equal_height=True):
            boxes = [_response(name) for name in "AB"]
    panes = [pane for _, pane in boxes]
    inputs = Inputs(system, boxes[0][0], boxes[1][0], turns)
    with gr.Row(elem_classes="actions"):
        run = gr.Button("Compare", variant="primary", size="lg", elem_id="compare-run", interactive=False, scale=0)
        swap = gr.Button("Swap A and B", size="sm", elem_classes="quiet", scale=0)
        clear = gr.Button("Clear", size="sm", elem_classes="quiet", scale=0)
        link = gr.Button("Copy a link to this", size="sm", elem_classes="quiet", scale=0)
        html_block('<p class="hint">or press <kbd>Ctrl</kbd> <kbd>Enter</kbd></p>', elem_classes="hint-block")
    said = html_block(show_said(), elem_classes="said")
    result = html_block(elem_id="compare-result", elem_classes="live")
    _listen(service, inputs, place, add, run, link, result)
    _edit(inputs, view, panes, example, swap, clear)
    opened = gr.Textbox("", visible=False)
    page.load(open_link, opened, [*inputs.all, said], js="() => worldpm.opened()", **QUICK)
    return Awaiting([run], lambda: [gr.update(interactive=True)])


def _response(name: str) -> tuple[gr.Textbox, gr.HTML]:
    with gr.Column(elem_classes=["response", f"side-{name.lower()}"], min_width=280):
        box = gr.Textbox("", label=f"Response {name}", lines=7, max_lines=24, interactive=True, elem_classes="grow")
        pane = html_block(visible=False, elem_classes="pane", label=f"Response {name}")
    return box, pane


def _listen(
    service: Service, inputs: Inputs, place: gr.Column, add: gr.Button, run: gr.Button, link: gr.Button, result: gr.HTML
) -> None:
    def attach(turns: list[Turn], boxes: list[gr.Textbox]) -> None:
        async def comparison(system: str, a: str, b: str, *texts: str) -> str:
            return await show_comparison(service, system, messages_of(turns, texts), (a, b))

        texts = [inputs.system, inputs.response_a, inputs.response_b, *boxes]
        run.click(comparison, texts, result, js="(...texts) => worldpm.asked(texts)", **QUICK).then(None, js=ANSWERED)
        add.click(lambda *texts: add_turn(turns, texts), boxes, inputs.turns, **QUICK).then(None, js=EDITED)
        roles = json.dumps([turn["role"] for turn in turns])
        link.click(None, texts, js=f"(...texts) => worldpm.share({roles}, texts)")

    with place:
        make_editor(inputs.turns, attach)


def _edit(
    inputs: Inputs, view: gr.Checkbox, panes: list[gr.HTML], example: gr.Dropdown, swap: gr.Button, clear: gr.Button
) -> None:
    """What changes the inputs other than typing, after which the responses' other view is made anew."""
    texts = [inputs.response_a, inputs.response_b]

    def preview(shown: bool, *responses: str) -> list[Any]:
        boxes = [gr.update(visible=not shown) for _ in responses]
        prose = [
            gr.update(visible=shown, value=fill("prose", name=name, text=text, html=to_html(text)) if shown else "")
            for name, text in zip("AB", responses, strict=True)
        ]
        return [*boxes, *prose]

    def choose(name: str | None) -> list[Any]:
        found = EXAMPLES.get(name or "")
        if found is None:
            return [gr.skip()] * 4
        return [turns_of(found.turns), "", found.response_a, found.response_b]

    view.change(preview, [view, *texts], [*texts, *panes], **QUICK)
    swap.click(None, texts, texts, js="(a, b) => [b, a]").then(None, js=EDITED).then(
        preview, [view, *texts], [*texts, *panes], **QUICK
    )
    example.input(choose, example, inputs.all, **QUICK).then(None, js=EDITED).then(
        preview, [view, *texts], [*texts, *panes], **QUICK
    )
    clear.click(lambda: [first_turns(), "", "", "", None], None, [*inputs.all, example], **QUICK).then(
        None, js=EDITED
    ).then(preview, [view, *texts], [*texts, *panes], **QUICK)


async def show_comparison(service: Service, system: str, turns: list[Message], responses: tuple[str, str]) -> str:
    """HTML of a comparison, or of what stands in its way."""
    try:
        service.get(None)
        rows = await compare(service, read_turns(system, turns), responses)
        if all(row.scores is None for row in rows):
            raise KitError(rows[0].fault)
    except KitError as fault:
        return notice(fault)
    warnings = list(dict.fromkeys(text for row in rows if row.scores for text in row.warnings))
    return fill(
        "comparison",
        rows=rows,
        warnings=warnings,
        references=_references(rows),
        bits=bits,
        probability=probability_preferred,
    )


def bits(model: ServedModel) -> str:
    """Bits a weight."""
    checkpoint = model.variant.checkpoint
    quantization = checkpoint.quantization
    if quantization is None:
        return str(8 * checkpoint.architecture.dtype.itemsize)
    return f"{quantization.bits_per_weight(checkpoint.architecture):.2f}"


def _references(rows: list[Row]) -> list[tuple[str, Scores]]:
    """Stored scores of the original models, each once; a loaded one has a row of its own."""
    found: dict[str, Scores] = {}
    for row in rows:
        if row.reference is not None and row.reference_name == "stored" and row.model.variant.stored is not None:
            found.setdefault(f"{row.model.variant.stored.model}, stored", row.reference)
    return list(found.items())


def show_said(text: str = "") -> str:
    """HTML of one of our sentences on what was done; the script writes to it too."""
    return f'<p role="status" id="compare-said">{text}</p>'


def open_link(text: str) -> list[Any]:
    """The inputs that a link holds: turns, system prompt, A and B; and what is said, if it is no such link."""
    try:
        shared = json.loads(text) if text else None
        if shared is None:
            return [gr.skip()] * 5
        messages = [{"role": turn["role"], "content": turn["content"]} for turn in shared["turns"]]
        texts = [shared["system"], shared["a"], shared["b"], *(each["content"] for each in messages)]
        roles = {each["role"] for each in messages}
        if not all(isinstance(each, str) for each in texts) or roles - {"user", "assistant"}:
            raise ConversationError("a turn is neither the user's nor the assistant's text")
    except (ValueError, KeyError, TypeError, RecursionError, KitError):
        return [*[gr.skip()] * 4, show_said("The link’s inputs cannot be read; ask for it again.")]
    return [turns_of(messages), shared["system"], shared["a"], shared["b"], gr.skip()]
