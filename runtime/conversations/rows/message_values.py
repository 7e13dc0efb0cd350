"""Read turns from a value of a row: text, messages of OpenAI or ShareGPT, objects with a text, or any of these as JSON.

Text that holds turns, such as a transcript, is read as `runtime.conversations.policy_transcripts` reads it.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from runtime.conversations.conversation import (
    ChatMessage,
    EmptyConversationError,
    check_message,
    describe_value,
    location_prefix,
)
from runtime.conversations.rows.context import RowContext

TEXT_KEYS = ("content", "text", "response", "answer", "completion", "output", "value", "generated_text")
_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
_TOOL_ROLES = ("tool", "function", "observation", "function_call", "function_response", "ipython")
_LONGEST_LITERAL = 1 << 20  # characters of messages that are written as Python's repr
_MESSAGES_AS_TEXT = re.compile(r"\s*\[\s*\{\s*(['\"])(?:role|content|from|value)\1\s*:")
_STRINGS = re.compile(r"'(?:[^'\\\n]|\\.)*'|\"(?:[^\"\\\n]|\\.)*\"", re.DOTALL)


def decode_messages(text: str, name: str, context: RowContext) -> list[Any] | None:
    """The messages that a text holds as JSON or as Python's repr; None if it does not begin like them.

    Raises:
        ConversationError: it begins like messages but is neither.
    """
    if not _MESSAGES_AS_TEXT.match(text):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = _literal(text)
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise context.error(f"{name} is text that begins like messages, but is neither JSON nor Python; send a list.")
    return value


def _literal(text: str) -> Any:
    """A Python literal; None if it is none, is too long, or holds operators, which could nest without end."""
    if len(text) > _LONGEST_LITERAL or re.search(r"[^\[\]{},:\s\w.]", _STRINGS.sub("", text)):
        return None
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def read_messages(value: Any, name: str, context: RowContext) -> list[ChatMessage]:
    """Checked turns with role and content only, from a list of messages or one message.

    Raises:
        EmptyConversationError: the list is empty.
        ConversationError: the value is no message, or holds what the reward model was not trained on.
    """
    single = isinstance(value, dict)
    if isinstance(value, list) and not value:
        raise EmptyConversationError(
            f"{location_prefix(context.where)}{name} is an empty list; add messages or remove the row."
        )
    turns: list[ChatMessage] = []
    for index, message in enumerate([value] if single else value):
        turns += _read_message(message, name if single else f"{name}[{index}]", context)
    return turns


def _read_message(message: Any, name: str, context: RowContext) -> list[ChatMessage]:
    if isinstance(message, dict) and isinstance(message.get("human"), str) and "role" not in message:
        answer = message.get("assistant", message.get("gpt"))  # ms-swift's ShareGPT: a question and its answer
        pairs = [("user", message["human"])] + ([] if answer is None else [("assistant", answer)])
        turns = [{"role": role, "content": content} for role, content in pairs]
    elif isinstance(message, dict) and "from" in message and "role" not in message:
        role = message["from"]
        role = _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
        turns = [_read_openai({"role": role, "content": message.get("value")}, name, context)]
    elif isinstance(message, dict) and "role" in message:
        turns = [_read_openai(message, name, context)]
    else:
        turns = [message]
    for turn in turns:
        check_message(turn, name, context.where)
    return turns


def _read_openai(message: dict[str, Any], name: str, context: RowContext) -> dict[str, Any]:
    """A message of OpenAI's API: text parts are joined, `developer` is the system, tools and images are refused."""
    role, content = message["role"], _join_parts(message.get("content"), name, context)
    if role == "developer":
        role = "system"
    elif isinstance(role, str) and role in _TOOL_ROLES:
        context.refuse(f"{name} has the role {role!r}", "it is rendered as text of the user")
        tool = message.get("name")
        role, content = "user", f"[{role}{f' {tool}' if isinstance(tool, str) else ''}] {_text_of(content)}"
    calls = message.get("tool_calls") or message.get("function_call")
    if calls:
        context.refuse(f"{name} has tool calls", "they are rendered as text")
        content = "\n".join(
            filter(None, [content if isinstance(content, str) else "", f"[tool calls] {_text_of(calls)}"])
        )
    if "content" not in message and not calls:
        return message
    return {"role": role, "content": content}


def _join_parts(content: Any, name: str, context: RowContext) -> Any:
    """Text of a list of parts; anything else is returned unchanged, for the check to refuse."""
    if not isinstance(content, list) or not content or not all(isinstance(part, dict) for part in content):
        return content
    texts = []
    for part in content:
        kind = part.get("type", "text")
        if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(kind, str) and kind not in ("text", "input_text", "output_text"):
            context.refuse(f"{name} has a part of type {kind!r:.40}", "its place is marked in the text")
            texts.append(f"[{kind}]")
        else:
            return content
    return "".join(texts)


def _text_of(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def object_text(value: dict[str, Any]) -> Any:
    """The text of a response that is an object, such as `{"answer": ..., "model": ...}`; None if there is none."""
    if isinstance(value.get("message"), dict):  # a choice of OpenAI's API
        return value["message"]
    found = [value[key] for key in TEXT_KEYS if isinstance(value.get(key), str)]
    return found[0] if found else None


def is_message(value: Any) -> bool:
    """Whether an object names its speaker."""
    return isinstance(value, dict) and ("role" in value or "from" in value or "human" in value)


def unreadable(value: Any, name: str, role: str, context: RowContext) -> Exception:
    """The error for a value that holds no turns."""
    example = f'[{{"role": "{role}", "content": "..."}}]'
    return context.error(f"{name} is {describe_value(value)}; text or a list of messages, {example}, was expected.")
