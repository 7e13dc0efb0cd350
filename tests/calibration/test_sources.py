from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from calibration.sources import BUNDLED, ConversationRow, load_rows
from runtime.common.errors import ConversationError
from runtime.conversations.conversation import PreferencePair, top_category_of
from runtime.conversations.row_files import read_rows


def pair(prompt: str, chosen: str = "good", rejected: str = "bad", **more: object) -> dict[str, object]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_rows_that_carry_nothing_are_left_out_and_counted(tmp_path):
    messages = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    path = write(
        tmp_path / "rows.jsonl",
        pair("1", category="maths"),
        pair("1", category="code"),
        pair("2", chosen=" "),
        pair("3", "same", "same"),
        {**messages, "subset": "chat"},
        messages,
        pair("1", "bad", "good"),
    )
    rows = load_rows(path)
    assert rows.counts == {"read": 7, "empty": 1, "duplicate": 2, "tied": 1}
    assert [(kept.category, kept.where) for kept in rows.pairs] == [
        ("maths", "rows.jsonl:1"),
        ("uncategorised", "rows.jsonl:7"),
    ]
    assert rows.conversations == [ConversationRow(messages["messages"], "chat", "rows.jsonl:5")]
    assert rows.summary() == (
        f"{path}: 2 pairs and 1 single conversations (left out: 1 empty, 2 duplicate, 1 tied); format pair, messages"
    )


def test_a_broken_row_stops_the_reading_with_its_line(tmp_path):
    path = write(tmp_path / "rows.jsonl", pair("1"), {"prompt": "2", "chosen": "x"})
    with pytest.raises(ConversationError, match=r"^rows.jsonl:2: the row has the keys 'prompt', 'chosen' but no"):
        load_rows(path)


@pytest.mark.parametrize("content", ["", "\n\n", "[]"])
def test_an_empty_file_is_named(tmp_path, content):
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(ConversationError, match=r"rows.json is empty; at least one row"):
        load_rows(path)


def test_a_file_without_usable_rows_says_why(tmp_path):
    path = write(tmp_path / "rows.jsonl", pair(""), pair("3", "same", "same"))
    with pytest.raises(ConversationError, match=r"no usable row: .*1 empty, 1 tied"):
        load_rows(path)


def test_a_directory_is_read_in_the_order_of_its_names(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "b.jsonl", pair("2"))
    write(tmp_path / "data" / "a.json", pair("1"))
    write(tmp_path / "z.jsonl", pair("3"), pair("1"))
    (tmp_path / "dataset_infos.json").write_text('{"default": {}}')
    (tmp_path / "README.md").write_text("words")
    (tmp_path / "load.py").write_text("raise SystemExit('data sets do not run code')")
    rows = load_rows(str(tmp_path))
    assert [kept.where for kept in rows.pairs] == ["a.json:1", "b.jsonl:1", "z.jsonl:1"]
    assert rows.counts["duplicate"] == 1


def test_a_directory_without_rows_is_named(tmp_path):
    with pytest.raises(ConversationError, match=f"{re.escape(str(tmp_path))} has no file that ends in .jsonl"):
        load_rows(tmp_path)


@pytest.mark.parametrize("source", ["nowhere/rows.jsonl", "rows", "/a/b", "../a", "a/b/c", "", "~/nowhere"])
def test_what_is_neither_a_path_nor_a_hub_id_is_not_looked_up(source, monkeypatch):
    fetch = "runtime.conversations.row_sources._fetch"
    monkeypatch.setattr(fetch, lambda name, _: pytest.fail(f"{name} was looked up"))
    with pytest.raises(ConversationError, match="does not exist|has no file"):
        load_rows(source or "''")


def test_a_hub_data_set_is_fetched_without_its_scripts(tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(name, **arguments):
        asked.update(arguments, name=name)
        write(tmp_path / "train.jsonl", pair("1"))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert len(load_rows("owner/name@main").pairs) == 1
    assert (asked["name"], asked["revision"], asked["repo_type"]) == ("owner/name", "main", "dataset")
    allowed = re.compile(r"\*\.(jsonl|json|csv|parquet)(\.gz|\.zst)?")
    assert all(map(allowed.fullmatch, asked["allow_patterns"]))


def test_no_network_is_one_sentence_with_the_way_out(monkeypatch):
    def snapshot_download(*_, **__):
        raise OSError("Name or service not known\nsecond line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ConversationError, match=r"owner/name .*\(Name or service not known\).*hf download") as caught:
        load_rows("owner/name")
    assert "\n" not in str(caught.value)


# The bundled set


AREAS = {
    "adversarial",
    "languages",
    "long",
    "markdown",
    "multi-turn",
    "objective",
    "safety",
    "short",
    "subjective",
}


@pytest.fixture(scope="module")
def bundled() -> list[PreferencePair]:
    rows = load_rows()
    assert rows.counts == {"read": len(rows.pairs), "empty": 0, "duplicate": 0, "tied": 0}
    return rows.pairs


def test_bundled_pairs_cover_every_area(bundled):
    sizes = Counter(pair.top_category for pair in bundled)
    assert set(sizes) == AREAS
    assert min(sizes.values()) >= 6
    assert len(bundled) >= 96


def test_bundled_rows_are_in_their_areas_file_and_in_full_shape():
    for file in sorted(BUNDLED.glob("*.jsonl")):
        for place, row in read_rows(file):
            assert row.keys() == {"prompt", "chosen", "rejected", "category"}, place
            assert top_category_of(row["category"]) == file.stem.replace("_", "-"), place
            assert len(row["chosen"]) == len(row["rejected"]) == 1, place
            assert row["prompt"][-1]["role"] == "user", place


def test_bundled_prompts_and_responses_are_all_different(bundled):
    def words(text: str) -> str:
        return "".join(filter(str.isalnum, text.casefold())) or text

    prompts = Counter(words("\n".join(turn["content"] for turn in pair.prompt)) for pair in bundled)
    assert [prompt[:80] for prompt, count in prompts.items() if count > 1] == []
    responses = Counter(words(text[0]["content"]) for pair in bundled for text in (pair.chosen, pair.rejected))
    long_ones = {text: count for text, count in responses.items() if len(text) > 20}
    assert [text[:80] for text, count in long_ones.items() if count > 1] == []


def test_bundled_text_is_clean(bundled):
    for pair in bundled:
        for turn in [*pair.prompt, *pair.chosen, *pair.rejected]:
            text = turn["content"]
            assert not re.search(r"<\|\w+\|>|\[INST\]|<s>|</s>", text), pair.where
            assert text == text.strip(), pair.where
            assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\ufeff\ufffd\ue000-\uf8ff]", text), pair.where
            assert not re.search(r"TODO|lorem ipsum|as an ai language model", text, re.IGNORECASE), pair.where


def test_bundled_preferences_do_not_follow_length(bundled):
    longer = sum(len(pair.chosen[0]["content"]) > len(pair.rejected[0]["content"]) for pair in bundled)
    assert 0.35 <= longer / len(bundled) <= 0.75
