"""Both heads at both scored tokens, against transformers' own rendering and classes."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer, Qwen2ForSequenceClassification

from runtime import Scorer
from runtime.checkpoints.heads import LINEAR_HEAD, MLP_HEAD
from runtime.checkpoints.transformers_model import Qwen2ForRewardModel
from tests.helpers.tiny import CHAT_TEMPLATE, MATH_TEMPLATE, write_tiny_checkpoint
from tests.helpers.tiny_score import assistant, user

TEMPLATES = {"worldpm": CHAT_TEMPLATE, "math": MATH_TEMPLATE}
SYSTEM = {"role": "system", "content": "integrate natural language"}
CONVERSATIONS = [
    [user("What is 2 + 3?"), assistant("It is 5.\n")],
    [user("What is 2 + 3?"), assistant("the story " * 40)],
    [SYSTEM, user("Straße 北"), assistant("seven")],
    [user("one"), assistant("two"), user("three"), assistant("  four  ")],
    *([user("q" * size), assistant("r" * (3 * size))] for size in (1, 5, 17, 60)),
]


def transformers_scores(model, directory, empty_system: bool) -> torch.Tensor:
    """Scores one by one at the last token of `apply_chat_template`; the pad token is not set, so none is skipped."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    scores = []
    for conversation in CONVERSATIONS:
        given = [{"role": "system", "content": ""}] if empty_system and conversation[0] is not SYSTEM else []
        text = tokenizer.apply_chat_template([*given, *conversation], tokenize=False)
        result = model(torch.tensor([tokenizer.encode(text, add_special_tokens=False)]))
        scores.append(result if isinstance(result, torch.Tensor) else result.logits[0])
    return torch.cat(scores)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("head", [MLP_HEAD, LINEAR_HEAD], ids=["two linears", "one linear"])
def test_scores_equal_those_of_transformers(tmp_path, head, template):
    directory = write_tiny_checkpoint(tmp_path, head=head, template=TEMPLATES[template])
    ours = Scorer.from_pretrained(directory, devices="cpu", dtype="float32").score(CONVERSATIONS)
    theirs_class = Qwen2ForRewardModel if head == MLP_HEAD else Qwen2ForSequenceClassification
    with torch.no_grad():
        model = theirs_class.from_pretrained(directory, dtype=torch.float32).eval()
        theirs = transformers_scores(model, directory, empty_system=template == "worldpm")
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() < 1e-5 * theirs.std()
