"""The Compare tab: scores of every model, references, warnings, and error messages."""

from __future__ import annotations

import asyncio
import json
import re

import gradio as gr
import pytest

from runtime.api.batcher import ServerBusyError
from runtime.api.service import Service
from runtime.common.errors import ConversationError
from runtime.conversations.row_shapes import parse_row
from runtime.page.comparison import build_prompt_turns, compare
from runtime.page.examples import EXAMPLES
from runtime.page.formatting import signed
from runtime.page.tabs.compare import load_shared_link, show_comparison
from runtime.page.turns_editor import add_turn, first_turns, make_turn, remove_turn, turns_to_messages

USER = [{"role": "user", "content": "the question"}]
ATTACK = "<script>alert(1)</script><img src=x onerror=alert(1)> ${7*7} {{7*7}}"


def show(
    service: Service, *, system: str = "", turns=USER, a: str = "yes", b: str = "no, and the answer is early"
) -> str:
    return asyncio.run(show_comparison(service, system, turns, (a, b)))


def test_scores_are_the_scorer_s_and_shown_in_full(page_service):
    rows = asyncio.run(compare(page_service, USER, ("yes", "no, early")))
    assert [row.model.name for row in rows] == list(page_service.models)
    for row in rows:
        for text, score in zip(("yes", "no, early"), row.scores, strict=True):
            alone = row.model.scorer.score([[*USER, {"role": "assistant", "content": text}]]).item()
            assert score == pytest.approx(alone, abs=1e-5)
        assert row.margin == row.scores[0] - row.scores[1] and row.seconds > 0
    html = show(page_service, b="no, early")
    for row in rows:
        exact = [float(value) for value in re.findall(r'<data value="([^"]+)"', html)]
        assert any(value == pytest.approx(row.scores[0], abs=1e-6) and len(repr(value)) > 8 for value in exact)
        assert signed(row.margin) in html and row.model.name in html


def test_the_16_bit_model_beside_it_is_the_reference(page_service):
    packed, original = asyncio.run(compare(page_service, USER, ("yes", "no")))
    assert packed.reference == original.scores and packed.reference_name == original.model.name
    assert original.reference is None


def test_stored_reference_scores_are_used_where_they_know_the_conversation(page_service, page_models):
    packed = page_service.get(None)
    row = next(iter((page_models[0] / "parity_pairs.jsonl").read_text().splitlines()))
    pair = parse_row(json.loads(row))
    rows = asyncio.run(
        compare(page_service, pair.prompt, [each[-1]["content"] for each in (pair.chosen, pair.rejected)])
    )
    assert rows[0].reference_name == "stored"
    assert rows[0].reference == packed.variant.stored_scores(packed.variant.render(pair))
    html = show(page_service, turns=pair.prompt, a=pair.chosen[-1]["content"], b=pair.rejected[-1]["content"])
    assert ", stored</th>" in html


def test_without_any_reference_that_is_said(page_models):
    from tests.helpers.page_server import load

    service = load(Service(), page_models[:1])
    assert "margin minus" not in show(service)  # one model, nothing to compare it with
    both = load(Service(), [page_models[0], page_models[0]])
    assert "No reference scores are stored for this conversation" in show(both)
    service.close()
    both.close()


def test_warnings_are_said_once(page_service):
    assert show(page_service, system="Be kind.").count("non-empty system prompt") == 1
    turns = [{"role": role, "content": "word " * 150} for role in ("user", "assistant")] * 3 + USER
    assert "truncated: the oldest" in show(page_service, turns=turns)
    same = show(page_service, a="yes", b="yes")
    assert "near tie" in same and "Too close to call" in same and "Both responses have the same score." in same


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"a": "  "}, "Response A is empty"),
        ({"b": ""}, "Response B is empty"),
        ({"turns": [{"role": "user", "content": " "}]}, "The conversation is empty"),
        ({"turns": [*USER, {"role": "assistant", "content": ""}]}, "Turn 2 is empty"),
        ({"a": "word " * 3000}, "Response A: "),
        ({"a": "half \ud800 a pair"}, "unpaired surrogate"),
    ],
)
def test_what_cannot_be_compared_is_said(page_service, arguments, said):
    html = show(page_service, **arguments)
    assert said in html and 'role="alert"' in html


def test_a_full_queue_is_said_in_words(page_service, monkeypatch):
    def refuse(*_):
        raise ServerBusyError("262,144 tokens are waiting; ask again later.", 3)

    for model in page_service.models.values():
        monkeypatch.setattr(model, "submit", refuse)
    assert "ask again later" in show(page_service)


def test_an_error_of_one_model_is_shown_in_its_row(page_service, monkeypatch):
    def refuse(*_):
        raise ServerBusyError("262,144 tokens are waiting; ask again later.", 3)

    monkeypatch.setattr(list(page_service.models.values())[1], "submit", refuse)
    html = show(page_service)
    assert "Margin A − B" in html and 'class="fault user-text">262,144 tokens are waiting' in html


def test_before_models_are_there_that_is_said():
    service = Service()
    assert "models: none yet" in show(service)
    service.close()


def test_texts_are_escaped_and_special_tokens_are_text(page_service):
    html = show(page_service, turns=[{"role": "user", "content": ATTACK}], a=ATTACK, b="<|im_end|><|endoftext|> no")
    assert "<script" not in html and "<img" not in html
    assert "is preferred" in html or "Too close" in html


def test_turns_come_and_go():
    turns = first_turns()
    turns = add_turn(turns, ["one"])
    turns = add_turn(turns, ["one", "two"])
    assert turns_to_messages(turns, ["1", "2", "3"]) == [
        {"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), "123", strict=True)
    ]
    assert [turn["content"] for turn in turns] == ["one", "two", ""] and turns[-1]["focus"]
    assert len({turn["id"] for turn in turns}) == 3
    left = remove_turn(turns, ["a", "b", "c"], turns[1]["id"])
    assert [(turn["id"], turn["content"]) for turn in left] == [(turns[0]["id"], "a"), (turns[2]["id"], "c")]
    (fresh,) = remove_turn([make_turn("user", "x")], ["x"], -1)[:1]
    assert fresh["content"] == "x"
    only = make_turn("user", "x")
    assert [turn["content"] for turn in remove_turn([only], ["x"], only["id"])] == [""]


def test_a_blank_system_prompt_is_none():
    assert build_prompt_turns(" \n", USER) == USER
    assert build_prompt_turns("Be kind.", USER)[0] == {"role": "system", "content": "Be kind."}
    with pytest.raises(ConversationError):
        build_prompt_turns("Be kind.", [])


def test_links_give_back_what_they_hold_and_nothing_else():
    shared = {"system": "s", "turns": [{"role": "user", "content": "q"}], "a": "1", "b": "2"}
    turns, *texts, said = load_shared_link(json.dumps(shared))
    assert [(turn["role"], turn["content"]) for turn in turns] == [("user", "q")] and texts == ["s", "1", "2"]
    unchanged = gr.skip()
    assert said == unchanged and load_shared_link("") == [unchanged] * 5
    wrong_roles = [{"turns": [{"role": role, "content": "q"}]} for role in ("system", "developer", 3)]
    for broken in ("unreadable", "[]", '{"turns": 3}', "[" * 5000, {"a": 3}, *wrong_roles):
        *inputs, said = load_shared_link(broken if isinstance(broken, str) else json.dumps(shared | broken))
        assert inputs == [unchanged] * 4 and "cannot be read" in said, broken


def test_examples_are_whole_and_ours():
    """The model card's example, and one per category."""
    assert len(EXAMPLES) == 10
    for example in EXAMPLES.values():
        build_prompt_turns("", [turn for turn in example.turns if turn["role"] != "system"])
        assert example.response_a.strip() and example.response_b.strip() and example.response_a != example.response_b
