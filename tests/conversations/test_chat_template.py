"""Templates are not trusted: whatever they do ends as one of our errors, soon and in little memory."""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
import time
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from runtime.common.errors import CheckpointError, ConversationError
from runtime.conversations.chat_template import ChatTemplate, _worker_of
from runtime.conversations.rendering import Renderer
from tests.helpers.tiny import CHAT_TEMPLATE, tiny_tokenizer, write_tokenizer

MESSAGES = [
    {"role": "system", "content": ""},
    {"role": "user", "content": "why?"},
    {"role": "assistant", "content": "because\n  of <b>that</b> & é"},
]

FAILING = {
    "{{ 1 + 'a' }}": "TypeError",
    "{{ 1 // 0 }}": "ZeroDivisionError",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "RecursionError",
    "{{ range(10 ** 30) }}": "OverflowError",
    "{% for i in range(100001) %}{% endfor %}": "too big",
    "{{ raise_exception('only one turn') }}": "rejects this conversation: only one turn",
    "{{ raise_exception('a\x1b[31m\nb' * 1000) }}": "rejects this conversation: a [31m b",
    "{{ messages.nothing.more }}": "has no attribute 'nothing'",
    "{{ ''.__class__.__mro__ }}": "unsafe",
}
GREEDY = {
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "more than 2 s of processor time",
    "{% set n = 10 %}{{ n ** (n ** n) }}": "more than 2 s of processor time",
    "{{ 'a' * 10 ** 10 }}": "too much memory",
    "{% set x = namespace(s='aa') %}{% for i in range(60) %}{% set x.s = x.s ~ x.s %}{% endfor %}": "too much memory",
}
NOT_COMPILING = {
    "{% for %}": "Expected",
    "{{ " + "(" * 1000 + "1" + ")" * 1000 + " }}": "",
    "{% if 1 %}" * 500 + "{% endif %}" * 500: "",
    "{{ " + "-" * 100_000 + "1 }}": "",
}


def test_text_equals_that_of_transformers(tmp_path):
    write_tokenizer(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% if loop.index > 2 %}{% break %}{% endif %}"
        "{{ m.content.split('\n')[0] | trim }}\n{% endfor %}\n   {% if true %}\n x {{ eos_token }}{% endif %}"
        "{{ strftime_now('%Y') | int > 2000 }}"
    )
    theirs.bos_token = "<|im_start|>"
    ours = ChatTemplate(template, {"bos_token": "<|im_start|>", "eos_token": theirs.eos_token})
    expected = theirs.apply_chat_template(MESSAGES, chat_template=template, tokenize=False)
    assert ours.render(MESSAGES) == expected and "<b>that</b>" in expected


@pytest.mark.parametrize("template", FAILING)
def test_an_error_in_a_template_is_ours(template):
    made = ChatTemplate(template)
    for _ in range(2):
        with pytest.raises(ConversationError) as caught:
            made.render(MESSAGES)
        assert FAILING[template] in str(caught.value) and len(str(caught.value)) < 400
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("template", GREEDY)
def test_time_and_memory_are_limited(template):
    made, before = ChatTemplate(template), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConversationError, match=GREEDY[template]):
        made.render(MESSAGES)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB: all of it was elsewhere
    with pytest.raises(ConversationError, match=GREEDY[template]):
        made.render(MESSAGES)


@pytest.mark.parametrize("template", NOT_COMPILING, ids=range(len(NOT_COMPILING)))
def test_a_template_that_does_not_compile_is_refused(template):
    with pytest.raises(
        CheckpointError, match=f"^here: the chat template does not compile: .*{NOT_COMPILING[template]}"
    ):
        ChatTemplate(template, where="here")


def test_a_template_that_fails_on_any_conversation_is_refused_at_opening():
    with pytest.raises(CheckpointError, match="^here: the chat template fails on this conversation: ZeroDivisionError"):
        Renderer(tiny_tokenizer(), ChatTemplate("{{ 1 // 0 }}"), 200, "here")


def test_a_killed_process_is_replaced_and_leaves_nothing():
    template = ChatTemplate(CHAT_TEMPLATE)
    text = template.render(MESSAGES)
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        os.kill(_worker_of(CHAT_TEMPLATE, ())._process.pid, signal.SIGKILL)
        time.sleep(0.2)
        assert template.render(MESSAGES) == text
    assert len(os.listdir("/proc/self/fd")) == files


def test_a_process_with_many_open_files_still_renders():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2000:
        pytest.skip("the machine allows too few open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (2000, hard))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        assert ChatTemplate("{{ messages[0].content }} of many files").render(MESSAGES[1:]) == "why? of many files"
    finally:
        for file in opened:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_threads_and_forked_children_get_their_own_answers():
    template = ChatTemplate("{{ messages[0].content }}")
    wrong: list[str] = []

    def ask(name: str) -> None:
        for number in range(200):
            if template.render([{"role": "user", "content": f"{name} {number}"}]) != f"{name} {number}":
                wrong.append(name)

    threads = [threading.Thread(target=ask, args=(f"thread {index}",)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    child = os.fork()
    if child == 0:
        ask("child")
        os._exit(1 if wrong else 0)
    ask("parent")
    assert os.waitpid(child, 0)[1] == 0 and wrong == []


# ---- files ----------------------------------------------------------------------------------------------


def write(directory: Path, config: str | bytes, template: bytes | None = None) -> Path:
    content = config.encode() if isinstance(config, str) else config
    (directory / "tokenizer_config.json").write_bytes(content)
    if template is not None:
        (directory / "chat_template.jinja").write_bytes(template)
    return directory


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ("[]", "tokenizer_config.json holds a list"),
        ("[" * 100_000, "tokenizer_config.json is not JSON"),
        (b"\xff\xfe{", "tokenizer_config.json is not JSON"),
        ('{"chat_template": ["a", "b"]}', "has no chat_template"),
        ('{"chat_template": [{"name": "default"}]}', "has no chat_template"),
        ('{"chat_template": {"default": "a"}}', "has no chat_template"),
        ("{}", "has no chat_template"),
    ],
)
def test_a_damaged_tokenizer_config_is_named(tmp_path, config, named):
    with pytest.raises(CheckpointError, match=named):
        ChatTemplate.from_directory(write(tmp_path, config))


def test_a_template_file_that_is_no_utf_8_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="chat_template.jinja cannot be read"):
        ChatTemplate.from_directory(write(tmp_path, "{}", b"\xff\xfe"))


def test_the_named_default_and_the_special_tokens_are_found(tmp_path):
    config = {
        "bos_token": {"content": "<s>", "lstrip": False},
        "eos_token": "</s>",
        "chat_template": [
            {"name": "tool", "template": "x"},
            {"name": "default", "template": "{{ bos_token ~ eos_token }}"},
        ],
    }
    assert ChatTemplate.from_directory(write(tmp_path, json.dumps(config))).render([]) == "<s></s>"
    write(tmp_path, json.dumps(config), b"file{{ eos_token }}")
    assert ChatTemplate.from_directory(tmp_path).render([]) == "file</s>"


# ---- the tokenizer's side -------------------------------------------------------------------------------


def test_a_stored_truncation_or_padding_cuts_and_pads_nothing(tmp_path):
    write_tokenizer(tmp_path)
    plain = Renderer.from_directory(tmp_path, 10_000).render(MESSAGES).token_ids
    tokenizer = tiny_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert Renderer.from_directory(tmp_path, 10_000).render(MESSAGES).token_ids == plain


def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows_is_refused(tmp_path):
    write_tokenizer(tmp_path)
    largest = max(tiny_tokenizer().get_vocab().values())
    assert Renderer.from_directory(tmp_path, 100, largest + 1).max_positions == 100
    with pytest.raises(CheckpointError, match=f"the tokenizer has the id {largest}, but vocab_size is {largest}"):
        Renderer.from_directory(tmp_path, 100, largest)


def test_a_message_with_all_common_private_use_characters_is_rendered():
    renderer = Renderer(tiny_tokenizer(), ChatTemplate(CHAT_TEMPLATE), 100_000)
    everything = "".join(map(chr, range(0xE000, 0xF900)))
    rendered = renderer.render([MESSAGES[1], {"role": "assistant", "content": everything + "<|im_end|>"}])
    end = renderer._special_ids["<|im_end|>"]
    assert rendered.token_ids.count(end) == 3  # of system, user and assistant; the typed one is text
