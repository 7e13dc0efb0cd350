from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.common.errors import ConversationError
from runtime.conversations.rows.policy_texts import read_policy_text
from tests.helpers.served import chatml, conversation

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>|"), max_size=30)
LATER = st.lists(st.tuples(TEXT, TEXT), max_size=3)


def turns_of(exchanges: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [turn for question, response in exchanges for turn in conversation(response, question)]


@given(LATER, TEXT, TEXT, st.booleans())
def test_chatml_is_read_back(earlier, question, response, closed):
    turns = turns_of([*earlier, (question, response)])
    text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
    end = "<|im_end|>\n" if closed else "<|im_end|><|endoftext|><|endoftext|>"
    assert read_policy_text("<|endoftext|>" * 2 + text.removesuffix("<|im_end|>\n") + end) == turns


@given(LATER, TEXT, TEXT)
def test_llama3_is_read_back(earlier, question, response):
    turns = turns_of([*earlier, (question, response)])
    parts = [f"<|start_header_id|>{each['role']}<|end_header_id|>\n\n{each['content']}<|eot_id|>" for each in turns]
    assert read_policy_text("<|begin_of_text|><|begin_of_text|>" + "".join(parts)) == turns


def test_a_system_turn_is_kept():
    text = "<|im_start|>system\nYou are terse.<|im_end|>\n" + chatml("ok", "hi")
    assert read_policy_text(text) == [{"role": "system", "content": "You are terse."}, *conversation("ok", "hi")]


def test_a_response_that_was_cut_off_has_no_end():
    assert read_policy_text(chatml("and then").removesuffix("<|im_end|>"))[-1]["content"] == "and then"


def test_plain_text_with_names():
    text = "User: What is 1+1?\nAssistant: 2\nUser: And 2+2?\nAssistant: 4</s>"
    assert read_policy_text(text) == turns_of([("What is 1+1?", "2"), ("And 2+2?", "4")])


def test_a_plain_prompt_and_what_follows_it():
    prompt = "What is 1+1? "
    assert read_policy_text(prompt + "2</s>", prompt) == [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": "2"},
    ]


def gemma(turns):
    names = {"assistant": "model"}
    parts = [
        f"<start_of_turn>{names.get(each['role'], each['role'])}\n{each['content']}<end_of_turn>\n" for each in turns
    ]
    return "<bos>" + "".join(parts)


def zephyr(turns):
    return "".join(f"<|{each['role']}|>\n{each['content']}</s>\n" for each in turns)


def phi(turns):
    return "".join(f"<|{each['role']}|>\n{each['content']}<|end|>\n" for each in turns)


def deepseek(turns):
    names = {"system": "", "user": "<｜User｜>", "assistant": "<｜Assistant｜>"}
    ends = {"assistant": "<｜end▁of▁sentence｜>"}
    parts = [names[each["role"]] + each["content"] + ends.get(each["role"], "") for each in turns]
    return "<｜begin▁of▁sentence｜>" + "".join(parts)


def mistral(turns, space=" "):
    text = "<s>"
    for each in turns:
        content = space + each["content"]
        text += {"user": f"[INST]{content}{space}[/INST]", "assistant": f"{content}</s>"}[each["role"]]
    return text


def llama2(turns):
    if turns[0]["role"] != "system":
        return mistral(turns).replace("</s>", " </s><s>")
    system, first, *others = turns
    content = f"<<SYS>>\n{system['content']}\n<</SYS>>\n\n{first['content']}"
    return llama2([{"role": "user", "content": content}, *others])


def compact_mistral(turns):
    if turns[0]["role"] == "system":
        return f"<s>[SYSTEM_PROMPT]{turns[0]['content']}[/SYSTEM_PROMPT]" + mistral(turns[1:], "").removeprefix("<s>")
    return mistral(turns, "")


def anthropic(turns):
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[each['role']]}: {each['content']}" for each in turns)


TEMPLATES = (gemma, zephyr, phi, deepseek, mistral, llama2, compact_mistral, anthropic)
WITH_SYSTEM = (zephyr, phi, deepseek, llama2, compact_mistral)
WORDS = st.text("ab \n.é你", min_size=1, max_size=12).map(str.strip).filter(bool)


@pytest.mark.parametrize("template", TEMPLATES)
@given(earlier=st.lists(st.tuples(WORDS, WORDS), max_size=2), question=WORDS, response=WORDS, system=st.none() | WORDS)
def test_other_templates_are_read_back(template, earlier, question, response, system):
    turns = turns_of([*earlier, (question, response)])
    if system is not None and template in WITH_SYSTEM:
        turns.insert(0, {"role": "system", "content": system})
    text = template(turns)
    assert read_policy_text(text) == turns
    prompt = text[: text.rindex(response)]  # with the opening of the assistant's turn, as trainers send it
    assert read_policy_text(prompt + response + "</s>", prompt) == turns
    before_generation = template(turns[:-1])
    if template is gemma:
        assert read_policy_text(before_generation + response, before_generation)[-2:] == turns[-2:]


@pytest.mark.parametrize(
    "prompt",
    [
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>why?<|END_OF_TURN_TOKEN|>",
        "<|turn|>user\nwhy?",
        "### why? [/INST]",
        "<｜turn｜>why?",
    ],
)
def test_an_unknown_template_is_refused(prompt):
    """As one user message, its tokens would be scored as if the user had typed them."""
    with pytest.raises(
        ConversationError, match=r"^query\[0\]: prompt has '.*', a token of a chat template that is not"
    ):
        read_policy_text(prompt + " because", prompt, "query[0]")


def test_angle_brackets_of_users_are_no_template():
    prompt = "Is a <| b |> c or x < y > z? See <div> and [INSTALL]."
    assert read_policy_text(prompt + "yes", prompt)[0]["content"] == prompt


INVENTED = "Fine.<|im_end|>\n<|im_start|>user\nThanks, perfect!<|im_end|>\n<|im_start|>assistant\nA pleasure."


@pytest.mark.parametrize("begin", ["", "<|begin_of_text|>", "<|endoftext|><|endoftext|>"])
def test_turns_that_a_policy_invents_are_its_response(begin):
    """With the prompt it is text; without, nobody could tell."""
    prompt = "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n"
    query = begin + prompt + INVENTED + "<|im_end|><|endoftext|>"
    assert read_policy_text(query, prompt) == conversation(INVENTED, "How are you?")
    assert len(read_policy_text(query)) == 4


def test_a_prompt_that_opens_the_response():
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert read_policy_text(prompt + "so</think>hello<|im_end|>", prompt) == conversation(
        "<think>\nso</think>hello", "hi"
    )


def test_a_prompt_that_was_cut_short_is_not_looked_for():
    text = chatml("ok", "hi")
    assert read_policy_text(text, "<|im_start|>system\nlong ago<|im_end|>\n" + text) == conversation("ok", "hi")


@pytest.mark.parametrize("text", ["", "hello", "hello<|im_end|>\n" + chatml("ok"), "Assistant"])
def test_text_without_turns_is_refused(text):
    with pytest.raises(ConversationError, match=r"query\[3\]: no turns were found"):
        read_policy_text(text, where="query[3]")


@pytest.mark.parametrize("end", ["<pad>", "<|im_end|>\n"])
def test_ends_that_are_not_at_the_end_take_no_time(end):
    """A million of them: what is quadratic here would take hours."""
    assert read_policy_text(chatml("").removesuffix("<|im_end|>") + end * 1_000_000 + "x")[-1]["content"][-1] == "x"
    assert read_policy_text(chatml("a") + end * 1_000_000)[-1]["content"] == "a"


def test_a_response_keeps_its_space_after_a_turn_that_only_ends_like_a_plain_prompt():
    prompt = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nAssistant:"
    assert read_policy_text(prompt + " A", prompt)[-1]["content"] == "Assistant: A"
