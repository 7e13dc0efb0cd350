"""The Best of N tab: reading, ranking and refusing responses."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.batch.row import ranks_of
from runtime.common.errors import ConversationError
from runtime.page.ranking import (
    MAX_RESPONSES,
    ReadResponses,
    bar_axis,
    join_responses,
    rank_responses,
    read_pasted,
    read_responses,
    split_responses,
)
from runtime.page.tabs.best_of_n import show_ranking, take_upload

PROMPT = [{"role": "user", "content": "the question"}]


@given(st.lists(st.text(alphabet="ab= \n-#", min_size=1).filter(lambda text: text.strip()), min_size=1, max_size=6))
def test_joined_responses_split_into_the_same(responses):
    try:
        joined = join_responses(responses)
    except ConversationError:
        assert any(line.strip() == "===" for response in responses for line in response.split("\n"))
        return
    assert split_responses(joined) == [response.strip("\n") for response in responses]


def test_blocks_are_told_apart_by_their_line_alone():
    assert split_responses("one\n---\nmore\r\n===\r\n\n  two ====\n === \n\n===\n") == ["one\n---\nmore", "  two ===="]


def turns(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": f"the {role}'s"} for role in roles]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", json.dumps({"prompt": "Q", "responses": ["one", "two"]})),
        ("a.jsonl", '{"prompt": "Q", "response": "one"}\n{"response": "two"}\n'),
        ("a.csv", "prompt,response\nQ,one\nQ,two\n"),
        ("a.json", json.dumps([{"prompt": [{"role": "user", "content": "Q"}], "responses": ["one", "two"]}])),
    ],
)
def test_files_of_responses(tmp_path, name, text):
    found = read_responses(write(tmp_path / name, text))
    assert (found.prompt, found.responses) == ("Q", ["one", "two"])
    pasted = None if name.endswith(".csv") else read_pasted(text)
    assert pasted is None or (pasted.prompt, pasted.responses) == ("Q", ["one", "two"])


def test_rows_of_other_formats_are_read_and_said(tmp_path):
    nectar = {
        "prompt": "\n\nHuman: Q\n\nAssistant: ",
        "answers": [{"answer": "one", "rank": 2}, {"answer": "two", "rank": 1}],
    }
    found = read_responses(write(tmp_path / "a.jsonl", json.dumps(nectar)))
    assert found == ReadResponses("Q", ["one", "two"], "a.jsonl:1: the format is nectar")
    pair = {"prompt": "Q", "chosen": "one", "rejected": "two"}
    assert read_pasted(json.dumps(pair)) == ReadResponses("Q", ["one", "two"], "row 1: the format is pair")
    assert read_responses(write(tmp_path / "a.jsonl", json.dumps({"responses": ["one", "two"]}))).prompt == ""
    assert read_pasted('["one", "two"]') == ReadResponses("", ["one", "two"], "")


@pytest.mark.parametrize(
    "text", ["one\n===\ntwo", '{"answer": 42}', '{"a": 1}\n===\n{"b": 2}', "[1, 2]", "{broken", "[]", "["]
)
def test_responses_that_are_no_rows_are_text(text):
    assert read_pasted(text) is None


def test_pasted_structure_is_read_as_in_rows(page_service):
    score = page_service.get(None).scorer.score([[*PROMPT, {"role": "assistant", "content": "yes"}]]).item()
    for prompt, pasted in (
        ("the question", "yes\n===\nno"),
        ("<|im_start|>user\nthe question<|im_end|>\n<|im_start|>assistant\n", "yes\n===\nno"),
        (json.dumps(PROMPT), '["yes", "no"]'),
        ("", json.dumps({"prompt": "the question", "responses": ["yes", "no"]})),
    ):
        shown = asyncio.run(show_ranking(page_service, None, prompt, pasted))
        assert f'value="{score}"' in shown, shown


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "\n", "has no response"),
        ("a.jsonl", "{}\n", "the row has no keys"),
        ("a.jsonl", "3\n", "the row is a number"),
        ("a.jsonl", '{"responses": [3]}\n', r"responses\[0\] is a number 3"),
        ("a.jsonl", "PK\x03\x04", "not JSON"),
        ("a.exe", "x", "has no supported suffix"),
        ("a.jsonl", '{"messages": []}\n', "a.jsonl:1: messages is an empty list"),
        ("a.jsonl", '{"messages": null}\n', "the row has no keys"),
        ("a.jsonl", json.dumps({"messages": turns("system", "user", "assistant")}), "a.jsonl:1: the prompt is a con"),
        ("a.jsonl", json.dumps({"messages": turns("user", "assistant") * 2}), "score the file in the Batch tab"),
        ("a.jsonl", json.dumps({"prompt": turns("system"), "response": "one"}), "no turn is the user's"),
        ("a.csv", "prompt,response\nQ,one\nP,two\n", "a.csv:3: the prompt differs .* in the Batch tab"),
        (
            "a.jsonl",
            '{"prompt": "Q", "response": "one"}\n{"prompt": "P", "response": "two"}\n',
            "a.jsonl:2: the prompt",
        ),
    ],
)
def test_other_files_are_refused(tmp_path, name, text, message):
    with pytest.raises(ConversationError, match=message):
        read_responses(write(tmp_path / name, text))


def test_an_upload_fills_the_fields_or_says_why_not(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps({"prompt": "Q", "responses": ["one", "two"]}))
    prompt, responses, note = take_upload(str(path), "before")
    assert (prompt, responses) == ("Q", "one\n\n===\n\ntwo") and "a.jsonl:1: the format is responses" in note
    path = write(tmp_path / "a.jsonl", json.dumps({"prompt": "Q", "responses": ["one\n===\nmore", "two"]}))
    assert "contains a line ===" in take_upload(str(path), "")[2]


def test_ranks_and_scores_are_the_scorer_s(page_service):
    model = page_service.get(None)
    responses = ["yes", "the answer is no", "yes", "a thing and another thing"]
    ranked = asyncio.run(rank_responses(model, PROMPT, responses))
    alone = [model.scorer.score([[*PROMPT, {"role": "assistant", "content": text}]]).item() for text in responses]
    by_number = sorted(ranked, key=lambda each: each.number)
    assert [each.score for each in by_number] == pytest.approx(alone, abs=1e-5)
    assert [each.rank for each in by_number] == ranks_of([each.score for each in by_number])
    assert [each.rank for each in ranked] == sorted(each.rank for each in ranked)
    for each in ranked:
        assert each.tie == (each.rank > 1 and ranked[0].score - each.score <= model.error_margin)
    axis = bar_axis(ranked)
    assert axis.at(ranked[0].score) == 100 and axis.at(ranked[-1].score) > 0


def test_bars_of_equal_scores_are_whole(page_service):
    ranked = asyncio.run(rank_responses(page_service.get(None), PROMPT, ["same", "same"]))
    assert [bar_axis(ranked).at(each.score) for each in ranked] == [100, 100]
    assert [each.rank for each in ranked] == [1, 1]


@pytest.mark.parametrize(
    ("prompt", "pasted", "said"),
    [
        ("", "one", "The conversation is empty"),
        ("Q", " \n===\n", "There is no response"),
        ("Q", "\n===\n".join(["x"] * (MAX_RESPONSES + 1)), "the limit is 256. Score them in the Batch tab"),
        ("Q", "word " * 3000, "Response 1: "),
        ("Q", '{"prompt": "P", "responses": ["a", "b"]}', "another prompt than the one above"),
        ("<|turn|>user\nQ", "one", "a token of a chat template that is not known"),
        ("User: Q\nAssistant: begun", "one", "ends with a response"),
    ],
)
def test_what_cannot_be_ranked_is_said(page_service, prompt, pasted, said):
    assert said in asyncio.run(show_ranking(page_service, None, prompt, pasted))
