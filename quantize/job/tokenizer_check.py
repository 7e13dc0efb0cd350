"""Compare our token ids with those of transformers, which other readers of the checkpoint use.

transformers builds some tokenizers from the model type and ignores the rules in `tokenizer.json`. A checkpoint whose
rules differ then gets other tokens, and so other scores, in transformers and in engines that use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calibration.sampling import CalibrationRow
from runtime.conversations.conversation import ChatMessage
from runtime.conversations.scoring_rule import ScoringRule


def tokenizer_note(directory: Path, rows: Sequence[CalibrationRow], rule: ScoringRule) -> str | None:
    """Return a note for the user if transformers gives other token ids for some of `rows`, else None.

    Rows with special-token text in a message are not compared: there we differ from transformers on purpose.
    """
    from transformers import AutoTokenizer  # here because the import is slow

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # of any type, for whatever the files contain
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        return f"transformers cannot load the tokenizer ({reason}), so its token ids were not compared with ours"
    added = tuple(tokenizer.get_added_vocab())
    compared = [row for row in rows if not any(token in _text(row.conversation.messages) for token in added)]
    differing = [
        row
        for row in compared
        if _token_ids(tokenizer, rule.with_system(row.conversation.messages)) != row.rendered.token_ids
    ]
    if not differing:
        return None
    return (
        f"transformers gives other token ids than tokenizer.json for {len(differing)} of {len(compared)} calibration "
        f"rows (it uses {type(tokenizer).__name__}), so scores differ there and in engines that use it; change "
        "tokenizer.json to the rules of that class, or load it with PreTrainedTokenizerFast"
    )


def _text(messages: Sequence[ChatMessage]) -> str:
    return "\n".join(message["content"] for message in messages)


def _token_ids(tokenizer: Any, messages: Sequence[ChatMessage]) -> list[int]:
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
