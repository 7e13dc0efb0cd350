"""Mutations that keep a document's structure, so that an input gets past the first check of a reader.

Each takes bytes and a `random.Random`, which Hypothesis or the seed of Atheris controls, and returns bytes.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

Mutation = Callable[[bytes, Random], bytes]

BYTES = (
    b"",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\n",
    b"\r\n",
    b'"',
    b"{",
    b"]",
    b",",
    b"\\u0000",
    b"\\ud800",
    b"9" * 5000,
)
NUMBERS = (0, -1, 1, 2, 7, 8, 255, 256, 1 << 31, 1 << 32, 1 << 53, 1 << 63, (1 << 64) - 1, 1 << 64, 10**30, 10**4200)
VALUES = (
    *(None, True, False, "", "0", [], {}, [[]], 0.5, -0.0, 1e308, -1e308, float("inf"), float("nan"), 5e-324),
    *("\ud800", "\0", "\u202e", "\x1b[2J", "e\u0301", "🙂", "x" * 3000, "\n", "../x", "/etc/passwd", "a.safetensors"),
    *NUMBERS,
)


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """Overwrite, insert, delete, repeat or cut bytes."""
    start = random.randrange(len(data) + 1)
    end = min(start + random.choice((0, 1, 1, 2, 4, 8, 64)), len(data))
    kind = random.randrange(6)
    if kind == 0 and start < len(data):
        return data[:start] + bytes([data[start] ^ 1 << random.randrange(8)]) + data[start + 1 :]
    if kind == 1:
        return data[:start] + random.choice(BYTES) + data[start:]
    if kind == 2:
        return data[:start] + data[end:]
    if kind == 3:
        return data[:end] + data[start:]
    if kind == 4:
        return data[:start]
    return data[:start] + bytes(random.randrange(256) for _ in range(end - start)) + data[end:]


def mutate_json(data: bytes, random: Random) -> bytes:
    """Change values, keys and nesting of a JSON document; at times its text."""
    if random.randrange(8) == 0:
        return mutate_bytes(data, random)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(data, random)
    return dump(mutate_tree(document, random), random)


def dump(document: Any, random: Random) -> bytes:
    """JSON text of a document, at times with raw Unicode, a repeated key or deep nesting, which Python's is not."""
    try:
        text = json.dumps(document, ensure_ascii=random.randrange(4) > 0)
    except (ValueError, RecursionError):  # numbers of thousands of digits
        text = "[" * random.choice((100, 100_000))
    kind = random.randrange(40)
    if kind == 0 and (keys := [*re.finditer(r'"[^"\\]*": ', text)]):
        key = random.choice(keys)
        text = text[: key.start()] + key[0] + random.choice(("null, ", '"", ', "1, ")) + text[key.start() :]
    elif kind == 1:
        depth = random.choice((50, 900, 960, 980, 5000))
        text = text.replace("null", "[" * depth + "]" * depth, 1)
    return text.encode(errors="surrogatepass")


def mutate_tree(document: Any, random: Random) -> Any:
    """The document with one to three changes."""
    holder = [document]
    for _ in range(random.randint(1, 3)):
        _change(holder, random)
    return holder[0]


def _change(holder: list[Any], random: Random) -> None:
    places = _places(holder)
    parent, key = random.choice(places)
    other_parent, other_key = random.choice(places)
    kind = random.randrange(10)
    if kind < 3:
        parent[key] = random.choice(VALUES)
    elif kind < 6:
        parent[key] = _nearby(parent[key], random)
    elif kind == 6:
        parent[key] = _copy(other_parent[other_key])
    elif kind == 7 and parent is not holder:
        del parent[key]
    elif kind == 8 and isinstance(parent, dict):
        name = other_key if isinstance(other_key, str) else _nearby(key, random)
        parent[name] = parent.pop(key) if random.randrange(2) else _copy(parent[key])
    else:
        parent[key] = random.choice(([parent[key]], {"content": parent[key]}, [parent[key]] * 3))


def _places(root: list[Any]) -> list[tuple[Any, Any]]:
    """Parent and key of every value, at any depth."""
    found, containers = [], [root]
    while containers:
        container = containers.pop()
        for key in [*container] if isinstance(container, dict) else range(len(container)):
            found.append((container, key))
            if isinstance(container[key], (dict, list)):
                containers.append(container[key])
    return found


def _nearby(value: Any, random: Random) -> Any:
    """A value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        real = float(value) if abs(value) < 1 << 1000 else 0.5
        return random.choice((value + 1, value - 1, -value, value * 2, value // 2, real, *NUMBERS))
    if isinstance(value, float):
        return random.choice((-value, value * 1e300, 0.0, int(value) if abs(value) < 1e308 else 0))
    if isinstance(value, str):
        return mutate_bytes(value.encode(errors="surrogatepass"), random).decode(errors="replace")
    if isinstance(value, list) and value:
        return random.choice((value[::-1], value[:-1], value * 2, value + [value[0]]))
    return random.choice(VALUES)


def _copy(value: Any) -> Any:
    try:
        return json.loads(json.dumps(value)) if isinstance(value, (dict, list)) else value
    except (ValueError, RecursionError):
        return None


def mutate_lines(data: bytes, random: Random) -> bytes:
    """Change a line of JSON, or drop, repeat or damage lines."""
    lines = data.split(b"\n")
    number = random.randrange(len(lines))
    kind = random.randrange(8)
    if kind == 0:
        return mutate_bytes(data, random)
    if kind == 1:
        return b"\n".join(lines[:number] + lines[number + 1 :])
    if kind == 2:
        lines.insert(number, random.choice((lines[number], b"", b" ", b"null", b"\xef\xbb\xbf", b"[]", b"1")))
    else:
        lines[number] = mutate_json(lines[number], random)
    return random.choice((b"\n", b"\n", b"\n", b"\r\n", b"\r")).join(lines)


def mutate_gzip(inner: Mutation) -> Mutation:
    """Change what is compressed, or the compressed bytes."""

    def mutate(data: bytes, random: Random) -> bytes:
        if random.randrange(3) == 0:
            return mutate_bytes(data, random)
        try:
            return gzip.compress(inner(gzip.decompress(data), random), 1, mtime=0)
        except (OSError, EOFError, ValueError, ArithmeticError):
            return mutate_bytes(data, random)
        except Exception:  # zlib.error
            return mutate_bytes(data, random)

    return mutate


def mutate_fragments(fragments: Sequence[str]) -> Mutation:
    """Insert, replace or drop fragments of a language with the given words; at times any bytes."""
    pattern = re.compile("|".join(sorted(map(re.escape, fragments), key=len, reverse=True)) + r"|\w+|\s+|.", re.DOTALL)

    def mutate(data: bytes, random: Random) -> bytes:
        if random.randrange(8) == 0:
            return mutate_bytes(data, random)
        pieces = pattern.findall(data.decode(errors="replace"))
        for _ in range(random.randint(1, 4)):
            pieces = pieces or [random.choice(fragments)]
            at = random.randrange(len(pieces))
            kind = random.randrange(5)
            if kind < 2:
                pieces.insert(at, random.choice(fragments))
            elif kind == 2:
                pieces[at] = random.choice(fragments)
            elif kind == 3:
                pieces[at:at] = pieces[random.randrange(len(pieces)) :][: random.randint(1, 12)]
            elif len(pieces) > 1:
                del pieces[at : at + random.randint(1, 3)]
        return "".join(pieces).encode()

    return mutate
