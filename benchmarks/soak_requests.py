"""The requests of `soak.py`: to every endpoint, valid ones with the scores they must get, and invalid ones."""

from __future__ import annotations

import base64
import json
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Conversation = list[dict[str, str]]
WORDS = (
    *("the", "and", "sleep", "early", "story", "answer", "counts", "north", "river", "seven"),
    *("naïve", "日本", "🙂", "{with}", "<tag>", '"quoted"', "back\\slash"),
)
NO_HTTP = ("no HTTP", "bad chunks", "bad length", "long head")
"""Kinds that the HTTP parser refuses: the answer has no JSON, and may be lost, since it closes while a client sends."""
HUGE = 5 << 20  # bytes, above the server's limit of 4 MiB
JSON_TYPE = "Content-Type: application/json\r\n"


@dataclass(frozen=True)
class Request:
    """A request as it is sent.

    Attributes:
        kind: under which it is counted.
        data: head and body.
        statuses: those that it may get, beside 429.
        scores: in the answer, as `read` finds them there; None if they are not looked at.
        read: takes the scores from the answer's JSON.
    """

    kind: str
    data: bytes
    statuses: tuple[int, ...]
    scores: tuple[float, ...] | None = None
    read: Callable[[Any], list[float]] | None = None


def http(path: str, body: bytes | None, method: str = "", head: str = JSON_TYPE, host: str = "127.0.0.1") -> bytes:
    method = method or ("GET" if body is None else "POST")
    length = "" if body is None else f"Content-Length: {len(body)}\r\n"
    return f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n{head}{length}\r\n".encode() + (body or b"")


def draw_conversations(count: int, seed: int) -> list[Conversation]:
    """Conversations of two to six turns, each of 1 to 25 words."""
    draw = random.Random(seed)

    def turn(number: int) -> dict[str, str]:
        text = " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 25)))
        return {"role": ("user", "assistant")[number % 2], "content": text}

    return [[turn(number) for number in range(2 * draw.choice((1, 1, 1, 2, 3)))] for _ in range(count)]


def chatml(conversation: Conversation) -> str:
    return "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in conversation)


class ValidRequests:
    """Draws requests over conversations whose scores are known."""

    def __init__(self, conversations: list[Conversation], scores: list[float], model: str, seed: int):
        self.conversations, self.scores, self.model = conversations, scores, model
        self.draw = random.Random(seed)
        self.pairs = [row for row, each in enumerate(conversations) if len(each) == 2]

    def __call__(self) -> Request:
        kinds = (self.native, self.compared, self.reward, self.pooled, self.classified, self.ranked, self.embedded)
        return self.draw.choice(kinds)()

    def native(self) -> Request:
        rows = self.rows()
        body: dict[str, Any] = {"conversations": [self.conversations[row] for row in rows]}
        body |= self.draw.choice(({}, {"model": self.model}, {"model": None}, {"truncate": True}))
        return self.request("/v1/scores", body, rows, lambda answer: answer["scores"])

    def compared(self) -> Request:
        row = self.draw.randrange(len(self.conversations))
        *prompt, response = self.conversations[row]
        pair = {"prompt": prompt, "response_a": response["content"], "response_b": response["content"]}
        body = self.draw.choice((pair, {"pairs": [pair]}))
        return self.request("/v1/comparisons", body, [row, row], lambda answer: answer["comparisons"][0]["scores"])

    def reward(self) -> Request:
        rows = self.rows()
        texts = [chatml(self.conversations[row]) for row in rows]
        start = "<|im_start|>assistant\n"
        prompts = [text[: text.rindex(start) + len(start)] for text in texts]
        body = self.draw.choice(({"query": texts}, {"query": texts, "prompts": prompts, "labels": [""] * len(rows)}))
        return self.request("/get_reward", body, rows, lambda answer: answer["rewards"])

    def pooled(self) -> Request:
        rows = self.rows()
        body = {"input": [chatml(self.conversations[row]) for row in rows], "task": "classify"}
        if self.draw.random() < 0.5:
            rows = rows[:1]
            body = {"messages": self.conversations[rows[0]], "task": "classify"}
        return self.request("/pooling", body, rows, lambda answer: [each["data"][0] for each in answer["data"]])

    def classified(self) -> Request:
        rows = self.rows()
        texts = [chatml(self.conversations[row]) for row in rows]
        if self.draw.random() < 0.5:
            return self.request("/classify", {"text": texts}, rows, lambda answer: [e["embedding"][0] for e in answer])
        body = {"input": texts}
        return self.request("/classify", body, rows, lambda answer: [each["probs"][0] for each in answer["data"]])

    def ranked(self) -> Request:
        row = self.draw.choice(self.pairs)
        query, document = (turn["content"] for turn in self.conversations[row])
        if self.draw.random() < 0.5:
            body = {"queries": query, "documents": [document, document]}
            path = self.draw.choice(("/score", "/v1/score"))
            return self.request(path, body, [row, row], lambda answer: [each["score"] for each in answer["data"]])
        path = self.draw.choice(("/rerank", "/v1/rerank", "/v2/rerank"))
        body = {"query": query, "documents": [document]}
        return self.request(path, body, [row], lambda answer: [each["relevance_score"] for each in answer["results"]])

    def embedded(self) -> Request:
        rows = self.rows()
        body = {"input": [chatml(self.conversations[row]) for row in rows]}
        if self.draw.random() < 0.5:
            return self.request(
                "/v1/embeddings", body, rows, lambda got: [each["embedding"][0] for each in got["data"]]
            )
        body["encoding_format"] = "base64"

        def decoded(answer: Any) -> list[float]:
            return [struct.unpack("<f", base64.b64decode(each["embedding"]))[0] for each in answer["data"]]

        return self.request("/v1/embeddings", body, rows, decoded)

    def rows(self) -> list[int]:
        return self.draw.choices(range(len(self.conversations)), k=self.draw.choice((1, 1, 1, 2, 5)))

    def request(self, path: str, body: Any, rows: list[int], read: Callable[[Any], list[float]]) -> Request:
        scores = tuple(self.scores[row] for row in rows)
        return Request(f"valid {path}", http(path, json.dumps(body).encode()), (200,), scores, read)


def other_requests(conversation: Conversation, longest: int) -> Iterator[Request]:
    """Requests without a score: state, mistakes and attacks. `longest` is the model's limit of tokens."""
    for path in ("/health", "/v1/models", "/metrics", "/openapi.json", "/docs"):
        yield Request(f"state {path}", http(path, None), (200,))
    yield Request("state HEAD /health", http("/health", None, "HEAD"), (200,))
    yield from _bad_bodies(conversation)
    yield from _bad_fields(conversation, longest)
    yield from _bad_http(json.dumps({"conversations": [conversation]}).encode())


def _bad_bodies(conversation: Conversation) -> Iterator[Request]:
    body = json.dumps({"conversations": [conversation]}).encode()
    paths = ("/v1/scores", "/v1/comparisons", "/get_reward", "/pooling", "/classify", "/score", "/rerank")
    for path in (*paths, "/v1/embeddings"):
        yield Request("bad JSON", http(path, body[:-3]), (400,))
        yield Request("empty body", http(path, b""), (422,))
        yield Request("no object", http(path, b"[1, 2]"), (422,))
        yield Request("no fields", http(path, b"{}"), (422,))
    yield Request("bad JSON", http("/v1/scores", b"[" * 100_000), (400, 422))
    yield Request("bad JSON", http("/v1/scores", b'{"conversations": ' + b"9" * 10_000 + b"}"), (400, 422))
    yield Request("not UTF-8", http("/v1/scores", b'{"conversations": "\xff\xfe"}'), (400,))
    yield Request("huge body", http("/v1/scores", b'{"conversations": "' + b"x" * HUGE + b'"}'), (413,))


def _bad_fields(conversation: Conversation, longest: int) -> Iterator[Request]:
    def post(kind: str, path: str, body: Any, status: int = 422) -> Request:
        return Request(kind, http(path, json.dumps(body).encode()), (status,))

    text = chatml(conversation)
    prompt, response = conversation[0], {"role": "assistant", "content": "word " * 4 * longest}
    yield post("unknown field", "/v1/scores", {"conversations": [conversation], "temperature": 1})
    yield post("wrong type", "/v1/scores", {"conversations": [[{"role": "user", "content": 1}] * 2]})
    yield post("wrong type", "/v1/scores", {"conversations": {"a": float("nan")}})
    yield post("wrong type", "/get_reward", {"query": [1, None, text]})
    yield post("wrong order", "/v1/scores", {"conversations": [conversation[::-1]]})
    yield post("unknown role", "/v1/scores", {"conversations": [[prompt, {"role": "tool", "content": "x"}]]})
    yield post("half a character", "/v1/scores", {"conversations": [[prompt, {**response, "content": "\ud800"}]]})
    yield post("unknown model", "/v1/scores", {"conversations": [conversation], "model": "gpt-\u001b[2J"}, 404)
    yield post("no turns", "/get_reward", {"query": ["nobody says anything"]})
    yield post("token ids", "/pooling", {"input": [[1, 2, 3]]})
    yield post("other scores", "/pooling", {"input": [text], "use_activation": True})
    yield post("unlike counts", "/get_reward", {"query": [text] * 2, "prompts": [text]})
    yield post("unlike counts", "/score", {"queries": ["a", "b"], "documents": ["c"] * 3})
    yield post("too long", "/v1/scores", {"conversations": [[prompt, response]]})
    cut = {"conversations": [[prompt, response, *conversation[:2]]], "truncate": True}
    yield post("too long, truncated", "/v1/scores", cut, 200)
    yield post("too many", "/v1/scores", {"conversations": [conversation] * 300})
    yield post("too many turns", "/v1/scores", {"conversations": [[prompt, conversation[1]] * 600]})
    yield Request("bad parameter", http("/get_reward?blank=nan", json.dumps({"query": [text]}).encode()), (422,))


def _bad_http(body: bytes) -> Iterator[Request]:
    chunked = JSON_TYPE + "Transfer-Encoding: chunked\r\n"
    head = http("/v1/scores", None, "POST", chunked)
    yield Request("chunks", head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body), (200,))
    yield Request("bad chunks", head + b"zz\r\n" + body, (400,))
    yield Request("no such path", http("/v1/nothing", body), (404,))
    yield Request("no such path", http("/../../etc/passwd%00", None), (404,))
    yield Request("wrong method", http("/v1/scores", None), (405,))
    yield Request("wrong method", http("/health", body, "DELETE"), (405,))
    yield Request("other host", http("/v1/scores", body, host="evil.example"), (400,))
    yield Request("other origin", http("/v1/scores", body, head=JSON_TYPE + "Origin: http://evil.example\r\n"), (403,))
    yield Request("other type", http("/v1/scores", body, head="Content-Type: text/plain\r\n"), (422,))
    yield Request("no HTTP", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", (400,))
    yield Request("long head", http("/health", None, head=f"X: {'x' * 100_000}\r\n"), (200, 400))
    yield Request("bad length", http("/v1/scores", None, "POST", JSON_TYPE + "Content-Length: -1\r\n"), (400,))
