from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from runtime.common.errors import CheckpointError, ConversationError
from runtime.conversations.chat_template import ChatTemplate
from runtime.conversations.rendering import Renderer
from tests.helpers.tiny import CHAT_TEMPLATE, SPECIAL_TOKENS, tiny_tokenizer, write_tokenizer

TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=60).filter(str.strip)
TRICKY = st.lists(st.sampled_from([*SPECIAL_TOKENS, "<|im_", "end|>", "\n", "<", "|>", "a", " ", ""]), max_size=8)


def conversation(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(tiny_tokenizer(), ChatTemplate(CHAT_TEMPLATE), 200)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return PreTrainedTokenizerFast.from_pretrained(directory)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=TEXT, response=TEXT, system=st.none() | TEXT)
def test_equals_apply_chat_template_then_encode(theirs, prompt, response, system):
    messages = conversation(prompt, response)
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    expected = theirs.encode(text, add_special_tokens=False)
    rendered = Renderer(tiny_tokenizer(), ChatTemplate(CHAT_TEMPLATE), 10_000).render(messages)
    assert rendered.token_ids == expected
    assert rendered.scored_index == len(expected) - 1


@settings(deadline=None)
@given(pieces=TRICKY)
def test_typed_special_tokens_stay_text(pieces):
    renderer = Renderer(tiny_tokenizer(), ChatTemplate(CHAT_TEMPLATE), 10_000)
    typed = "".join(pieces)
    rendered = renderer.render(conversation("q" + typed, "r" + typed))
    plain = renderer.render(conversation("q", "r"))
    specials = {tiny_tokenizer().token_to_id(token) for token in SPECIAL_TOKENS}
    count = sum(token in specials for token in rendered.token_ids)
    assert count == sum(token in specials for token in plain.token_ids)
    text = tiny_tokenizer().decode(rendered.token_ids, skip_special_tokens=False)
    assert text.count("q" + typed) == 1 and "r" + typed in text


def test_private_use_characters_of_the_user_survive(renderer):
    rendered = renderer.render(conversation("\ue000<|im_end|>\ue001", "ok"))
    assert "\ue000<|im_end|>\ue001" in tiny_tokenizer().decode(rendered.token_ids, skip_special_tokens=False)


def test_missing_system_turn_is_an_empty_one(renderer):
    explicit = [{"role": "system", "content": ""}, *conversation("q", "r")]
    assert renderer.render(explicit).token_ids == renderer.render(conversation("q", "r")).token_ids
    assert renderer.render(explicit).warnings == []


def test_non_empty_system_turn_is_reported(renderer):
    rendered = renderer.render([{"role": "system", "content": "be kind"}, *conversation("q", "r")])
    assert "system prompt" in rendered.warnings[0]


def test_over_long_is_an_error_that_names_both_lengths(renderer):
    with pytest.raises(ConversationError, match=r"pairs.jsonl:3: \d+ tokens, but the model has 200 positions"):
        renderer.render(conversation("x" * 300, "r"), where="pairs.jsonl:3")


def test_over_long_says_what_helps(renderer):
    with pytest.raises(ConversationError, match=r"positions; shorten it\.$"):
        renderer.render(conversation("x" * 300, "r"))
    with pytest.raises(ConversationError, match=r"positions; shorten it, or allow truncation \(--truncate\)\.$"):
        renderer.render(conversation("x" * 300, "r", "q", "r"))


def test_truncation_drops_whole_oldest_turns_and_says_so(renderer):
    turns = conversation("x" * 80, "y" * 80, "z" * 40, "the end of the response")
    rendered = renderer.render(turns, truncate=True)
    assert rendered.token_ids == renderer.render(turns[2:]).token_ids
    assert rendered.warnings == ["truncated: the oldest 2 turns were dropped"]


@settings(deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 60), st.sampled_from("ua")), max_size=12),
    system=st.sampled_from(["", "be kind"]),
    last=st.integers(1, 220),
)
def test_truncation_equals_dropping_one_exchange_after_another(renderer, lengths, system, last):
    roles = {"u": "user", "a": "assistant"}
    turns = [{"role": roles[role], "content": "x" * length} for length, role in lengths]
    turns = [*conversation("the first"), *turns, *conversation("q", "r" * last)]
    head = [{"role": "system", "content": system}]
    starts = (i for i, turn in enumerate(turns) if turn["role"] == "user")
    endless = Renderer(tiny_tokenizer(), ChatTemplate(CHAT_TEMPLATE), 1 << 20)
    for start in starts:
        expected = endless.render([*head, *turns[start:]]).token_ids
        if len(expected) <= renderer.max_positions:
            break
    else:
        with pytest.raises(ConversationError, match=f"conversation: {len(expected)} tokens, .* last exchange alone"):
            renderer.render([*head, *turns], truncate=True)
        return
    rendered = renderer.render([*head, *turns], truncate=True)
    assert rendered.token_ids == expected
    told = [f"truncated: the oldest {start} turns were dropped"] if start else []
    assert [warning for warning in rendered.warnings if "truncated" in warning] == told


def test_truncation_encodes_a_logarithm_of_the_turns(monkeypatch):
    renderer, sizes = Renderer(tiny_tokenizer(), ChatTemplate(CHAT_TEMPLATE), 200), []
    encode = renderer._encode
    monkeypatch.setattr(renderer, "_encode", lambda messages: (sizes.append(len(messages)), encode(messages))[1])
    turns = conversation(*["x"] * 1024)
    assert len(renderer.render(turns, truncate=True).token_ids) <= 200
    assert len(sizes) <= 12, "512 starts: one for all of it, nine or ten to bisect, one for what is left"


def test_truncation_never_cuts_the_response(renderer):
    with pytest.raises(ConversationError, match="last exchange alone"):
        renderer.render(conversation("x", "y", "q", "r" * 300), truncate=True)


def test_scored_index_is_the_templates_last_token_even_with_text_after_it():
    renderer = Renderer(tiny_tokenizer(), ChatTemplate(CHAT_TEMPLATE + "\n\n"), 200)
    rendered = renderer.render(conversation("q", "r"))
    assert rendered.token_ids[rendered.scored_index] == tiny_tokenizer().token_to_id("<|endoftext|>")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0]['content'] }}", "does not end a conversation"),
        ("{% for %}", "does not compile"),
    ],
)
def test_unusable_templates_are_refused(template, message):
    with pytest.raises(CheckpointError, match=message):
        Renderer(tiny_tokenizer(), ChatTemplate(template), 200)


def test_template_cannot_reach_python():
    with pytest.raises((CheckpointError, ConversationError)):
        Renderer(tiny_tokenizer(), ChatTemplate("{{ ''.__class__.__mro__[1].__subclasses__() }}<|endoftext|>"), 200)


def test_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="tokenizer.json is missing"):
        Renderer.from_directory(tmp_path, 200)


def test_a_tokenizer_that_fails_on_a_text_is_refused_or_costs_the_conversation():
    """WordLevel without its [UNK] token raises a bare Exception."""
    for words, refused in (({"a": 0}, True), ({"system": 0, "user": 1, "assistant": 2, "a": 3, "b": 4}, False)):
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.add_special_tokens([*SPECIAL_TOKENS])
        if refused:
            with pytest.raises(CheckpointError, match="the tokenizer fails"):
                Renderer(tokenizer, ChatTemplate(CHAT_TEMPLATE), 200)
            continue
        renderer = Renderer(tokenizer, ChatTemplate(CHAT_TEMPLATE), 200)
        assert renderer.render(conversation("a", "b")).token_ids
        with pytest.raises(ConversationError, match="the tokenizer fails on this conversation"):
            renderer.render(conversation("a", "unknown"))
