"""Targets: tokenizers, chat templates and transcripts of policies."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from random import Random

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from benchmarks.fuzz.mutation import mutate_fragments, mutate_json
from benchmarks.fuzz.target import Target, Violation
from runtime.common.errors import ConversationError
from runtime.conversations import template_worker
from runtime.conversations.chat_template import ChatTemplate
from runtime.conversations.conversation import check_conversation
from runtime.conversations.rendering import Renderer
from runtime.conversations.rows.policy_texts import read_policy_text
from runtime.conversations.scoring_rule import END_OF_CONVERSATION
from tests.helpers.tiny import CHAT_TEMPLATE, SPECIAL_TOKENS, VOCABULARY, tiny_tokenizer

CONVERSATION = [
    {"role": "user", "content": "What is <|im_end|> the thing?"},
    {"role": "assistant", "content": "Naïve 日本 🙂 12345\n\n  the <|endoftext|> end"},
]
CONVERSATIONS = (
    CONVERSATION,
    [{"role": "system", "content": "Be brief."}, *CONVERSATION, *CONVERSATION],
)


# ---- tokenizer.json -------------------------------------------------------------------------------------


def _tokenizers() -> list[bytes]:
    found = [tiny_tokenizer()]
    for normalizer, splitter in (
        (normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase(), normalizers.Replace("a", "b")]), None),
        (normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()),
        (normalizers.Prepend("_"), pre_tokenizers.Metaspace()),
        (None, pre_tokenizers.Split("the", "isolated")),
    ):
        tokenizer = tiny_tokenizer()
        if normalizer is not None:
            tokenizer.normalizer = normalizer
        if splitter is not None:
            tokenizer.pre_tokenizer = splitter
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.TemplateProcessing("$A <|endoftext|>", None, [("<|endoftext|>", 281)])
        found.append(tokenizer)
    words = {"[UNK]": 0, "the": 1, "##t": 2, "a": 3}
    for model in (models.WordPiece(words, unk_token="[UNK]"), models.WordLevel(words, unk_token="[UNK]")):
        found.append(Tokenizer(model))
    found.append(Tokenizer(models.Unigram([("<unk>", 0.0), ("the", -1.0), ("t", -2.0)], 0, True)))
    for tokenizer in found[-3:]:
        tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    found[1].enable_truncation(4)
    found[2].enable_padding(length=16)
    return [tokenizer.to_str().encode() for tokenizer in found]


@cache
def _template() -> ChatTemplate:
    return ChatTemplate(CHAT_TEMPLATE)


def _check_tokenizer(data: bytes, scratch: Path) -> None:
    """What is accepted renders conversations within the vocabulary, ending in the scored token."""
    (scratch / "tokenizer.json").write_bytes(data)
    (scratch / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    _template()  # keeps its process
    renderer = Renderer.from_directory(scratch, 512, VOCABULARY)
    scored_id = Tokenizer.from_str(data.decode()).token_to_id(END_OF_CONVERSATION)
    for conversation in CONVERSATIONS:
        rendered = renderer.render(conversation)
        if not all(0 <= index < VOCABULARY for index in rendered.token_ids):
            raise Violation("a token id is outside the vocabulary")
        if rendered.token_ids[rendered.scored_index] != scored_id:
            raise Violation("the scored token is another")


# ---- chat templates -------------------------------------------------------------------------------------

JINJA = (
    *(
        "{% ",
        " %}",
        "{{ ",
        " }}",
        "{%- ",
        " -%}",
        "{# ",
        " #}",
        "for message in messages",
        "endfor",
        "if ",
        "else",
        "endif",
    ),
    *(
        "message['content']",
        "message.role",
        "messages[0]",
        "loop.first",
        "loop.last",
        "loop.index0",
        "set x = ",
        "macro m(a)",
    ),
    *("endmacro", "generation", "endgeneration", "continue", "break", "raise_exception('no')", "strftime_now('%Y')"),
    *(" | tojson(indent=2)", " | length", " | trim", " | upper", " | list", " | join(',')", " | map(attribute='role')"),
    *(
        " | replace('a', 'b')",
        "namespace(a=1)",
        "range(99)",
        "range(99999)",
        "'<|im_start|>'",
        "'<|endoftext|>'",
        "eos_token",
    ),
    *(
        "'%s' % 1",
        "'{}'.format(1)",
        ".__class__",
        ".split('a')",
        "[::-1]",
        "1000000",
        " * ",
        " + ",
        " ~ ",
        "'x' * 9999",
    ),
    *(
        "include 'x'",
        "import 'x' as y",
        "extends 'x'",
        "block b",
        "endblock",
        "filter upper",
        "endfilter",
        "(",
        ")",
        "[",
        "]",
    ),
    *(
        "call m(1)",
        "endcall",
        "caller()",
        "self.b()",
        "dict(a=1)",
        "cycler(1)",
        "lipsum(9)",
        "set ns.a = 2",
        "not ",
        "is defined",
    ),
)


def _templates() -> list[bytes]:
    macro = "{%- macro m(a) -%}{{ a | trim }}{%- endmacro -%}"
    loop = "{% for message in messages %}{% generation %}{{ m(message.content) }}{% endgeneration %}{% endfor %}"
    return [
        CHAT_TEMPLATE.encode(),
        f"{macro}{loop}{{{{ eos_token }}}}<|endoftext|>".encode(),
        b"{% set ns = namespace(a=1) %}{% for m in messages %}{% set ns.a = ns.a + 1 %}{{ m | tojson }}{% endfor %}"
        b"{{ ns.a }}<|endoftext|>",
    ]


def _check_worker(data: bytes, scratch: Path) -> None:
    """What the process of a template does, without its limits: every error is an answer."""
    text = data.decode(errors="replace")
    if "**" in text:  # a power cannot be interrupted here; `template` has it
        return
    template, opened = template_worker.answer(None, {"template": text, "variables": {"eos_token": "</s>"}})
    if template is None:
        if not isinstance(opened["reason"], str) or len(opened["reason"]) > 1000:
            raise Violation(f"the reason is {opened['reason']!r:.200}")
        return
    for conversation in CONVERSATIONS:
        json.dumps(template_worker.answer(template, {"messages": conversation})[1])


@cache
def _tokenizer_text() -> str:
    return tiny_tokenizer().to_str()


def _check_template(data: bytes, scratch: Path) -> None:
    """A checkpoint with the template is refused or renders conversations that end in the scored token."""
    (scratch / "tokenizer.json").write_text(_tokenizer_text())
    (scratch / "chat_template.jinja").write_bytes(data)
    _render(scratch)


def _check_tokenizer_config(data: bytes, scratch: Path) -> None:
    """As for a template, which is in the config here."""
    (scratch / "tokenizer.json").write_text(_tokenizer_text())
    (scratch / "tokenizer_config.json").write_bytes(data)
    _render(scratch)


def _render(directory: Path) -> None:
    renderer = Renderer.from_directory(directory, 512, VOCABULARY)
    for conversation in CONVERSATIONS:
        try:
            rendered = renderer.render(conversation)
        except ConversationError:
            continue
        scored, last = rendered.token_ids[rendered.scored_index], len(rendered.token_ids) - 1
        end_token = renderer.rule.end_token
        if rendered.scored_index != last if end_token is None else scored != renderer._special_ids[end_token]:
            raise Violation("the scored token is another")


def _tokenizer_configs() -> list[bytes]:
    plain = {"eos_token": "<|endoftext|>", "pad_token": {"content": "<|endoftext|>"}, "chat_template": CHAT_TEMPLATE}
    named = [{"name": "default", "template": CHAT_TEMPLATE}, {"name": "tool_use", "template": "{{ 1 }}"}]
    return [json.dumps(each).encode() for each in (plain, plain | {"chat_template": named})]


def mutate_tokenizer_config(data: bytes, random: Random) -> bytes:
    """Change the config; at times the template in it."""
    try:
        config = json.loads(data)
        if random.randrange(4) == 0 and isinstance(config["chat_template"], str):
            source = mutate_fragments(JINJA)(config["chat_template"].encode(errors="replace"), random)
            return json.dumps(config | {"chat_template": source.decode(errors="replace")}).encode()
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    return mutate_json(data, random)


# ---- transcripts of policies ----------------------------------------------------------------------------

TRANSCRIPTS = (
    *(
        "<|im_start|>user\n",
        "<|im_start|>assistant\n",
        "<|im_end|>",
        "<|im_end|>\n",
        "<|endoftext|>",
        "<s>",
        "</s>",
        "[INST]",
    ),
    *(
        "[/INST]",
        "<<SYS>>\n",
        "\n<</SYS>>\n\n",
        "[SYSTEM_PROMPT]",
        "[/SYSTEM_PROMPT]",
        "<start_of_turn>user\n",
        "<end_of_turn>",
    ),
    *(
        "<start_of_turn>model\n",
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|>",
        "User: ",
        "\nAssistant: ",
    ),
    *(
        "<｜User｜>",
        "<｜Assistant｜>",
        "<｜end▁of▁sentence｜>",
        "<|user|>\n",
        "<|assistant|>\n",
        "<|end|>",
        "\n",
        " ",
        "\x00",
    ),
)


def _transcripts() -> list[bytes]:
    return [
        "".join(pieces).encode()
        for pieces in (
            ("<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n", "A<|im_end|>"),
            ("<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST]", " A </s>"),
            ("User: Q\n\nAssistant: ", "A"),
            ("<｜User｜>Q<｜Assistant｜>", "A<｜end▁of▁sentence｜>"),
            ("<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>", "A"),
        )
    ]


def _check_transcript(data: bytes, scratch: Path) -> None:
    """Every text is refused or gives turns of text, with and without a prompt; none is invented."""
    text = data.decode(errors="surrogatepass" if b"\xed" in data else "replace") if _is_text(data) else ""
    for prompt in (None, text[: len(text) // 2], text):
        turns = read_policy_text(text, prompt)
        decoded = prompt is not None and prompt.lstrip().startswith("[")  # messages as JSON, which has escapes
        if not all(isinstance(turn["content"], str) and (decoded or turn["content"] in text) for turn in turns):
            raise Violation("a turn holds what the text does not")
        try:
            check_conversation(turns)
        except ConversationError:
            continue


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


RENDERING = tuple(
    f"runtime.conversations.{name}" for name in ("rendering", "chat_template", "scoring_rule", "tokenizer_file")
)
WORKER = "runtime.conversations.template_worker"
STARTS_A_PROCESS = 8.0  # seconds; the process of a template is given 2 of them for each of three answers

TARGETS = [
    Target("tokenizer", RENDERING, _tokenizers, mutate_json, _check_tokenizer),
    Target("template-worker", [WORKER], _templates, mutate_fragments(JINJA), _check_worker),
    Target("template", [*RENDERING, WORKER], _templates, mutate_fragments(JINJA), _check_template, STARTS_A_PROCESS),
    Target("tokenizer-config", RENDERING, _tokenizer_configs, mutate_tokenizer_config, _check_tokenizer_config),
    Target(
        "transcript",
        ["runtime.conversations.policy_transcripts"],
        _transcripts,
        mutate_fragments(TRANSCRIPTS),
        _check_transcript,
    ),
]
