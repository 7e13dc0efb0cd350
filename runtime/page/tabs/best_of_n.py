"""The Best of N tab: ranks responses to one prompt."""

from __future__ import annotations

import time
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from runtime.api.service import Service
from runtime.common.errors import ConversationError, KitError, printable
from runtime.page.batch_job import UPLOAD_SUFFIXES
from runtime.page.comparison import build_prompt_turns
from runtime.page.components import UNQUEUED_EVENT, DeferredComponents, html_block, model_dropdown
from runtime.page.markup import notice, render_template
from runtime.page.ranking import (
    SEPARATOR,
    bar_axis,
    join_responses,
    rank_responses,
    read_pasted,
    read_responses,
    split_responses,
)


def best_of_n_tab(service: Service) -> DeferredComponents:
    """Build the tab."""
    with gr.Column(elem_id="best-inputs", elem_classes="inputs"):
        model, update_models = model_dropdown(service)
        prompt = gr.Textbox("", label="Prompt", lines=3, max_lines=14, placeholder="What the user asks")
        with gr.Row(elem_classes="best", equal_height=True):
            pasted = gr.Textbox(
                "",
                label="Responses",
                info=f"Separate responses with a line {SEPARATOR}, or paste rows as JSON",
                lines=11,
                max_lines=30,
                scale=3,
                min_width=280,
            )
            upload = gr.File(
                label="Or upload a file",
                file_types=list(UPLOAD_SUFFIXES),
                height=170,
                scale=1,
                min_width=240,
                elem_classes="upload",
            )
    with gr.Row(elem_classes="actions"):
        run = gr.Button("Rank", variant="primary", size="lg", elem_id="best-run", interactive=False, scale=0)
        clear = gr.Button("Clear", size="sm", elem_classes="quiet", scale=0)
    result = html_block(elem_id="best-result", elem_classes="live")

    async def ranking(name: str | None, prompt: str, pasted: str) -> str:
        return await show_ranking(service, name, prompt, pasted)

    on_submit_js, on_result_js = "(...texts) => worldpm.submitted(texts, 'best')", "() => worldpm.answered('best')"
    run.click(ranking, [model, prompt, pasted], result, js=on_submit_js, **UNQUEUED_EVENT).then(None, js=on_result_js)
    upload.upload(take_upload, [upload, prompt], [prompt, pasted, result], **UNQUEUED_EVENT)
    clear.click(lambda: ["", "", None, ""], None, [prompt, pasted, upload, result], **UNQUEUED_EVENT)
    return DeferredComponents([run, model], lambda: [gr.update(interactive=True), update_models()])


async def show_ranking(service: Service, name: str | None, prompt: str, pasted: str) -> str:
    """HTML of a ranking, or of the error."""
    start = time.perf_counter()
    try:
        model = service.get(name)
        rows = read_pasted(pasted)
        if rows and rows.prompt and prompt.strip() not in ("", rows.prompt.strip()):
            raise ConversationError("The pasted rows have another prompt than the one above; remove one of them.")
        turns = build_prompt_turns("", [{"role": "user", "content": (rows and rows.prompt) or prompt}])
        ranked = await rank_responses(model, turns, rows.responses if rows else split_responses(pasted))
    except KitError as error:
        return notice(error)
    seconds = time.perf_counter() - start
    ranking = render_template("ranking", model=model, ranked=ranked, axis=bar_axis(ranked), seconds=seconds)
    return ranking + show_note(rows.note if rows else "")


def take_upload(path: str | None, prompt: str) -> list[Any]:
    """Fill prompt and responses from an uploaded file, to be checked by the visitor before scoring."""
    try:
        rows = read_responses(Path(path or ""))
        return [rows.prompt or prompt, join_responses(rows.responses), show_note(rows.note)]
    except KitError as error:
        return [gr.skip(), gr.skip(), notice(error)]


def show_note(text: str) -> str:
    """HTML of a remark on how rows were read."""
    return f'<p class="legend user-text" role="status">{escape(printable(text))}</p>' if text else ""
