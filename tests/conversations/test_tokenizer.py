"""Token ids equal those of transformers' AutoTokenizer, which builds a Qwen2Tokenizer for the whole family."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from calibration.sampling import CalibrationRow
from calibration.sources import ConversationRow, load_rows
from quantize.job.tokenizer_check import tokenizer_note
from runtime.conversations.rendering import Renderer
from runtime.demo.model import demo_directory
from tests.helpers.tiny import WORLDPM

HARD = [
    "a.\n\nB",
    "one\n\n\n  two \r\n\r\n\tthree   ",
    "```python\ndef f(x):\n\treturn x ** 2  # 1,234.50\n```\n\n* item\n  - nested",
    "It's we'll THEY'RE 2nd 1234567890 3.14e-10",
    "你好，世界。\n\n日本語のテキスト 한국어 ภาษาไทย",
    "naïve café, e\u0301 decomposed, ﬁ ligature",
    "👍🏽 👨‍👩‍👧‍👦 🙂🙂 ❤️",
    "<b>html</b> & \\frac{a}{b} | table | row |\n|---|---|\n",
    " ",
]


def differing(directory: Path, conversations: list) -> list[int]:
    """Indices of the conversations that transformers encodes differently."""
    renderer, theirs = Renderer.from_directory(directory, 1 << 20), AutoTokenizer.from_pretrained(directory)
    assert type(theirs).__name__ == "Qwen2Tokenizer"
    empty = {"role": "system", "content": ""}
    whole = [each if each[0]["role"] == "system" else [empty, *each] for each in conversations]
    expected = [theirs.apply_chat_template(each, return_dict=False) for each in whole]
    rendered = [renderer.render(each).token_ids for each in conversations]
    return [i for i, (ours, ids) in enumerate(zip(rendered, expected, strict=True)) if ours != ids]


def hard_conversations() -> list:
    turns = [(prompt, response) for prompt in HARD[:-1] for response in HARD[:-1]]
    return [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in turns]


def test_a_tiny_checkpoint_gets_the_same_ids(tiny_checkpoint: Path) -> None:
    assert differing(tiny_checkpoint, hard_conversations()) == []


@pytest.mark.slow
def test_the_demo_gets_the_same_ids() -> None:
    rows = load_rows()
    bundled = [each for pair in rows.pairs for each in (pair.chosen_conversation, pair.rejected_conversation)]
    assert differing(demo_directory(), hard_conversations() + bundled) == []


def rows_of(directory: Path, conversations: list) -> list[CalibrationRow]:
    renderer = Renderer.from_directory(directory, 1 << 20)
    return [CalibrationRow(ConversationRow(each), renderer.render(each)) for each in conversations]


def test_other_rules_are_noted(tiny_checkpoint: Path, tmp_path: Path) -> None:
    conversations = hard_conversations()
    assert tokenizer_note(tiny_checkpoint, rows_of(tiny_checkpoint, conversations), WORLDPM) is None
    changed = Path(shutil.copytree(tiny_checkpoint, tmp_path / "changed"))
    rules = json.loads((changed / "tokenizer.json").read_text())
    assert rules["normalizer"] == {"type": "NFC"}
    (changed / "tokenizer.json").write_text(json.dumps(rules | {"normalizer": None}))
    note = str(tokenizer_note(changed, rows_of(changed, conversations), WORLDPM))
    assert f"for 15 of {len(conversations)} calibration rows (it uses Qwen2Tokenizer)" in note


def test_a_tokenizer_that_transformers_cannot_load_is_noted(tiny_checkpoint: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(tiny_checkpoint, tmp_path / "broken"))
    (broken / "tokenizer.json").write_text("{}")
    assert "cannot load the tokenizer" in str(
        tokenizer_note(broken, rows_of(tiny_checkpoint, hard_conversations()), WORLDPM)
    )
