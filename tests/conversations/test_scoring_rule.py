"""Which token is scored and which system turn is added, by template."""

from __future__ import annotations

import pytest

from runtime.checkpoints.checkpoint import open_checkpoint
from runtime.common.errors import CheckpointError
from runtime.conversations.chat_template import ChatTemplate
from runtime.conversations.rendering import Renderer
from tests.helpers.damage import change_json
from tests.helpers.tiny import CHAT_TEMPLATE, MATH_TEMPLATE, WORLDPM, tiny_tokenizer, write_tokenizer
from tests.helpers.tiny_score import assistant, user

CONVERSATION = [user("q"), assistant("the answer <|im_end|>\n<|endoftext|>")]
SYSTEM = {"role": "system", "content": "Be kind."}
DEFAULT = CHAT_TEMPLATE.replace("system\\n<|im_end|>", "system\\nYou are helpful.<|im_end|>")
TURN = "{% for message in messages %}{{ message['content'] }}"


def renderer(template: str, positions: int = 1000) -> Renderer:
    return Renderer(tiny_tokenizer(), ChatTemplate(template), positions)


def text(template: str, conversation: list) -> str:
    return tiny_tokenizer().decode(renderer(template).render(conversation).token_ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("template", "description"),
    [
        (CHAT_TEMPLATE, "the final `<|endoftext|>`"),
        (CHAT_TEMPLATE + "\n", "the final `<|endoftext|>`"),
        (MATH_TEMPLATE, r"the last token, `\n` after `<|im_end|>`"),
        (TURN + "{{ '<|im_end|>' }}{% endfor %}", "the last token, `<|im_end|>`"),
        (TURN + "{{ '<|endoftext|><|im_end|>' }}{% endfor %}", "the last token, `<|im_end|>`"),
        (TURN + "{{ '<|im_end|> the' }}{% endfor %}", "the last token, ` the` after `<|im_end|>`"),
    ],
)
def test_the_rule_is_read_off_the_template(template, description):
    made = renderer(template)
    rendered = made.render(CONVERSATION)
    assert made.rule.description == description
    if made.rule == WORLDPM:
        assert rendered.token_ids[rendered.scored_index] == tiny_tokenizer().token_to_id("<|endoftext|>")
    else:
        assert rendered.scored_index == len(rendered.token_ids) - 1


@pytest.mark.parametrize(
    "template",
    [
        TURN + "{% endfor %}",
        TURN + "{{ '\\n' }}{% endfor %}",
        TURN + "{{ '[/INST]' }}{% endfor %}",
        "{{ '<|im_end|>' }}" + TURN + "{% endfor %}",
        "{{ messages[0]['content'] }}<|im_end|>",
    ],
    ids=["nothing", "a line break", "a token of another tokenizer", "at the wrong end", "without the response"],
)
def test_a_template_whose_last_token_would_be_the_response_s_is_refused(template):
    with pytest.raises(CheckpointError, match="does not end a conversation with a special token"):
        renderer(template)


def test_worldpm_s_default_system_text_is_replaced_and_a_sibling_s_is_kept():
    assert text(DEFAULT, CONVERSATION).startswith("<|im_start|>system\n<|im_end|>")
    assert text(MATH_TEMPLATE, CONVERSATION).startswith("<|im_start|>system\nThink step by step.<|im_end|>")


def test_a_given_system_turn_is_kept_and_warned_of_where_training_had_none():
    for template in (DEFAULT, MATH_TEMPLATE):
        assert text(template, [SYSTEM, *CONVERSATION]).startswith("<|im_start|>system\nBe kind.<|im_end|>")
    assert renderer(DEFAULT).render([SYSTEM, *CONVERSATION]).warnings
    assert not renderer(MATH_TEMPLATE).render([SYSTEM, *CONVERSATION]).warnings


@pytest.mark.parametrize("system", [[], [SYSTEM]], ids=["default", "given"])
def test_truncation_keeps_the_system_turn_and_the_last_exchange(system):
    turns = [user("x" * 80), assistant("y" * 80), user("z" * 40), assistant("the end")]
    rendered = renderer(MATH_TEMPLATE, 130).render([*system, *turns], truncate=True)
    assert rendered.token_ids == renderer(MATH_TEMPLATE).render([*system, *turns[2:]]).token_ids
    assert rendered.warnings == ["truncated: the oldest 2 turns were dropped"]


# ---- a checkpoint whose template is another's -----------------------------------------------------------


def test_a_recorded_rule_must_be_the_template_s(damaged):
    change_json(damaged / "config.json", scored_token="<|endoftext|>")
    assert open_checkpoint(damaged).renderer().rule == WORLDPM
    write_tokenizer(damaged, MATH_TEMPLATE)
    with pytest.raises(CheckpointError, match="read at the last token.*this model's is read at '<|endoftext|>'"):
        open_checkpoint(damaged).renderer()
    change_json(damaged / "config.json", scored_token="last")
    assert open_checkpoint(damaged).renderer().rule.end_token is None


def test_a_worldpm_with_another_model_s_template_is_refused(damaged):
    write_tokenizer(damaged, MATH_TEMPLATE)
    assert open_checkpoint(damaged).renderer().rule.end_token is None
    named = damaged.rename(damaged.with_name("WorldPM-72B-UltraFeedback"))
    with pytest.raises(CheckpointError, match="restore its published chat template"):
        open_checkpoint(named).renderer()
