"""Rejected requests: every error has the same JSON shape and leaks nothing, and the next request still works."""

from __future__ import annotations

import base64
import io
import json
import pickle
import zipfile
from pathlib import Path

import pytest

from runtime.api.options import Limits
from runtime.api.service import Service
from runtime.common.errors import ConversationError
from tests.helpers.served import ENDPOINTS, QUESTION, RESPONSES, api_of, chatml, conversation, gate, send, serve

GOOD = {"conversations": [conversation(RESPONSES[0])]}
JSON = {"content-type": "application/json"}
KEY = "correct-horse-battery"


def error_of(answer) -> dict:
    """Check the shape of an error response and return the error."""
    body = answer.json()
    assert list(body) == ["error"] and list(body["error"]) == ["message", "field", "code"], body
    assert body["error"]["code"] == answer.status_code
    assert "Traceback" not in answer.text and ".py" not in answer.text
    return body["error"]


@pytest.fixture
def still_works(service: Service):
    yield
    assert send(api_of(service), "/v1/scores", GOOD).status_code == 200


WRONG = {
    "no field": ("/v1/scores", {}, "conversations"),
    "null": ("/v1/scores", {"conversations": None}, "conversations"),
    "a number": ("/v1/scores", {"conversations": 3}, "conversations"),
    "empty": ("/v1/scores", {"conversations": []}, "conversations"),
    "one turn": ("/v1/scores", {"conversations": [conversation("x")[:1]]}, "conversations[0]"),
    "a role": ("/v1/scores", {"conversations": [[{"role": "tool", "content": ""}] * 2]}, "conversations[0][0].role"),
    "a content": (
        "/v1/scores",
        {"conversations": [[*conversation("x"), {"role": "user", "content": 1}]]},
        "conversations[0][2].content",
    ),
    "no response": ("/v1/scores", {"conversations": [conversation("x")[::-1]]}, "conversations[0]"),
    "a blank one": ("/v1/scores", {"conversations": [conversation("x"), conversation(" ")]}, "conversations[1]"),
    "a truth value": ("/v1/scores", GOOD | {"truncate": "yes"}, "truncate"),
    "a typing error": ("/v1/scores", GOOD | {"truncat": True}, "truncat"),
    "a model": ("/v1/scores", GOOD | {"model": 7}, "model"),
    "half a pair": ("/v1/comparisons", {"prompt": "q", "response_a": "a"}, "body"),
    "a pair twice": (
        "/v1/comparisons",
        {"prompt": "q", "pairs": [{"prompt": "q", "response_a": "a", "response_b": "b"}]},
        "body",
    ),
    "in pairs": (
        "/v1/comparisons",
        {"pairs": [{"prompt": "q", "response_a": "a", "response_b": None}]},
        "pairs[0].response_b",
    ),
    "a blank B": ("/v1/comparisons", {"prompt": "q", "response_a": "a", "response_b": ""}, "response_b"),
    "prompts": ("/get_reward", {"query": ["a", "b"], "prompts": ["a"]}, "body"),
    "no turns": ("/get_reward", {"query": [chatml("x"), "hello"]}, "query[1]"),
    "tokens": ("/v1/embeddings", {"input": [1, 2, 3]}, "input[0]"),
    "tokens without an end": ("/pooling", {"input": [[5], [5]]}, "input[0]"),
    "tokens that are none": ("/pooling", {"input": [[1 << 70, 2]]}, "input[0]"),
    "negative tokens": ("/v1/embeddings", {"input": [-1, 2]}, "input[0]"),
    "too many tokens": ("/pooling", {"input": [5] * 1025}, "input[0]"),
    "no tokens": ("/pooling", {"input": [[]]}, "input"),
    "tokens and text": ("/pooling", {"input": [5, "a"]}, "input"),
    "truth values as tokens": ("/pooling", {"input": [True]}, "input"),
    "an activation": ("/pooling", {"input": chatml("x"), "use_activation": True}, "use_activation"),
    "vLLM's activation": ("/classify", {"input": chatml("x"), "activation": True}, "activation"),
    "vLLM's softmax": ("/pooling", {"input": chatml("x"), "softmax": True}, "softmax"),
    "a norm": ("/v1/embeddings", {"input": chatml("x"), "normalize": True}, "normalize"),
    "an activation of embeddings": ("/v1/embeddings", {"input": chatml("x"), "use_activation": True}, "use_activation"),
    "a truncation": ("/v1/embeddings", {"input": chatml("x"), "truncate_prompt_tokens": 4}, "truncate_prompt_tokens"),
    "a template": ("/pooling", {"messages": conversation("x"), "chat_template": "{{ messages }}"}, "chat_template"),
    "a cut": ("/rerank", {"query": "a", "documents": ["a"], "max_tokens_per_doc": 2}, "max_tokens_per_doc"),
    "counts": ("/score", {"queries": ["a", "b"], "documents": ["a", "b", "c"]}, "documents"),
    "top_n": ("/rerank", {"query": "a", "documents": ["a"], "top_n": -1}, "top_n"),
    "dimensions": ("/v1/embeddings", {"input": chatml("x"), "dimensions": 8}, "dimensions"),
    "two inputs": ("/classify", {"input": chatml("x"), "text": chatml("x")}, "body"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_422_with_its_field(service: Service, still_works, name: str):
    path, body, field = WRONG[name]
    answer = send(api_of(service), path, body)
    assert answer.status_code == 422, answer.text
    assert error_of(answer)["field"].startswith(field), answer.text


def archive() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("../../etc/passwd", "x")
    return stream.getvalue()


BYTES = {
    "a zip": archive(),
    "a pickle": pickle.dumps({"conversations": [object]}),
    "not utf-8": b'{"conversations": "\xff"}',
    "nothing": b"",
    "half": b'{"conversations": [',
    "depth": b"[" * 200_000,
    "a long number": b'{"conversations": ' + b"9" * 10_000 + b"}",
    "a list": b"[]",
    "NaN": b"NaN",
}


@pytest.mark.parametrize("endpoint", ["/v1/scores", "/classify"])
@pytest.mark.parametrize("name", BYTES)
def test_bytes_that_are_no_request(service: Service, still_works, name: str, endpoint: str):
    answer = send(api_of(service), endpoint, content=BYTES[name], headers=JSON)
    assert answer.status_code in (400, 422), answer.text
    error_of(answer)


def test_json_under_another_type_is_refused(service: Service):
    """A foreign page can send text/plain without a CORS preflight request."""
    answer = send(api_of(service), "/v1/scores", content=json.dumps(GOOD), headers={"content-type": "text/plain"})
    assert answer.status_code == 422 and "application/json" in error_of(answer)["message"]


def test_half_a_surrogate_pair_is_refused(service: Service, still_works):
    body = b'{"conversations": [[{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "a"}]]}'
    answer = send(api_of(service), "/v1/scores", content=body, headers=JSON)
    assert answer.status_code == 422 and error_of(answer)["field"] == "conversations[0]"
    odd = b'{"\\ud800": 1, "conversations": []}'
    error_of(send(api_of(service), "/v1/scores", content=odd, headers=JSON))


@pytest.mark.parametrize("path", ENDPOINTS)
def test_an_unknown_model_is_404(service: Service, path: str):
    bodies = {
        "/v1/scores": GOOD,
        "/v1/comparisons": {"prompt": "q", "response_a": "a", "response_b": "b"},
        "/get_reward": {"query": chatml("x")},
        "/score": {"queries": "q", "documents": ["d"]},
        "/rerank": {"query": "q", "documents": ["d"]},
    }
    unversioned = "/" + path.rsplit("/", 1)[1]
    body = bodies.get(path, bodies.get(unversioned) if unversioned in ("/score", "/rerank") else None)
    body = (body or {"input": chatml("x")}) | {"model": "gpt"}
    query = "?model=gpt" if path == "/get_reward" else ""
    answer = send(api_of(service), path + query, body)
    assert answer.status_code == 404, answer.text
    assert error_of(answer)["field"] == "model" and "models: tiny" in error_of(answer)["message"]


# ---- limits ---------------------------------------------------------------------------------------------


def test_limits_name_the_field_and_the_limit(service: Service, still_works):
    api = api_of(service, Limits(conversations=2, tokens=100, turns=4, body_bytes=5000))
    many = send(api, "/v1/scores", {"conversations": [conversation("a")] * 3})
    assert many.status_code == 422 and "3 conversations; at most 2 are allowed" in error_of(many)["message"]
    assert error_of(many)["field"] == "conversations"
    long = send(api, "/v1/scores", {"conversations": [conversation("a " * 200)]})
    assert long.status_code == 422 and "at most 100 are allowed" in error_of(long)["message"]
    turns = send(api, "/v1/scores", {"conversations": [conversation("a") * 3]})
    assert turns.status_code == 422 and "has 6 turns; at most 4 are allowed" in error_of(turns)["message"]
    assert error_of(turns)["field"] == "conversations[0]"
    large = send(api, "/v1/scores", {"conversations": [conversation("a" * 6000)]})
    assert large.status_code == 413 and "more than the 5,000 bytes allowed" in error_of(large)["message"]
    assert large.headers["connection"] == "close"
    assert send(api, "/get_reward", {"query": ["x"] * 3}).status_code == 422
    pairs = [{"prompt": "q", "response_a": "a", "response_b": "b"}] * 2
    assert error_of(send(api, "/v1/comparisons", {"pairs": pairs}))["field"] == "pairs"


def test_ten_thousand_turns_are_refused_before_they_are_rendered(service: Service, still_works):
    answer = send(api_of(service), "/v1/scores", {"conversations": [conversation("a") * 5000]})
    assert answer.status_code == 422 and "10,000 turns" in error_of(answer)["message"]


def test_a_conversation_beyond_the_model_s_positions(service: Service, still_works):
    long = [*conversation("b" * 700), *conversation("c" * 700)]
    api = api_of(service)
    assert "positions" in error_of(send(api, "/v1/scores", {"conversations": [long]}))["message"]
    cut = send(api, "/v1/scores", {"conversations": [long], "truncate": True}).json()
    assert cut["warnings"] == [["truncated: the oldest 2 turns were dropped"]]
    alone = send(api, "/v1/scores", {"conversations": [long[2:]]}).json()
    assert cut["scores"] == alone["scores"]


def test_a_full_queue_is_429_with_a_time(tiny_checkpoint: Path):
    service = serve(tiny_checkpoint, queue_tokens=50)
    gated, model = gate(service), service.get(None)
    rendered = [model.variant.renderer.render(conversation("a"))]
    first = model.submit(rendered)
    assert gated.entered.wait(30)
    second = model.submit(rendered)
    busy = send(api_of(service), "/v1/scores", GOOD)
    assert busy.status_code == 429 and "the limit is 50" in error_of(busy)["message"]
    assert int(busy.headers["retry-after"]) > 0
    gated.open.set()
    assert first.result(30) == second.result(30)
    assert send(api_of(service), "/v1/scores", GOOD).status_code == 200


def test_a_score_that_is_not_finite_is_500_with_the_reason(tiny_checkpoint: Path):
    service = serve(tiny_checkpoint)
    bad = service.get(None).variant.renderer.render(conversation("overflows"))
    gate(service, bad=len(bad.token_ids)).open.set()
    answer = send(api_of(service), "/v1/scores", {"conversations": [conversation("a"), conversation("overflows")]})
    assert answer.status_code == 500
    assert error_of(answer)["message"].startswith("conversations: conversation 1: a non-finite score")
    assert send(api_of(service), "/v1/scores", GOOD).status_code == 200


def test_a_closed_queue_is_503_and_a_full_one_429(tiny_checkpoint: Path):
    service = serve(tiny_checkpoint)
    service.batcher.close()
    answer = send(api_of(service), "/v1/scores", GOOD)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert "The server is stopping" in error_of(answer)["message"]


def test_an_internal_error_is_500_without_details(tiny_checkpoint: Path):
    service = serve(tiny_checkpoint)
    service.get(None).scorer = None  # type: ignore[assignment]
    service.batcher.on_batch = None
    answer = send(api_of(service), "/v1/scores", GOOD)
    assert answer.status_code == 500 and "NoneType" not in error_of(answer)["message"]


# ---- access ---------------------------------------------------------------------------------------------


def basic(password: str, user: str = "anyone") -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.mark.parametrize("header", [f"Bearer {KEY}", f"bearer  {KEY}", basic(KEY), basic(KEY, "")])
def test_the_key_gives_access(service: Service, header: str):
    api = api_of(service, key=KEY)
    for path in ("/v1/models", "/docs", "/openapi.json", "/metrics"):
        assert send(api, path, headers={"authorization": header}).status_code == 200
    assert send(api, "/v1/scores", GOOD, headers={"authorization": header}).status_code == 200


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        KEY,
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        "Bearer",
        "Bearer \xff",
        basic("no"),
        "Basic !",
        "Basic /w==",
        f"Digest {KEY}",
    ],
)
def test_anything_but_the_key_is_rejected(service: Service, header: str | None):
    api = api_of(service, key=KEY)
    headers = {} if header is None else {"authorization": header.encode("latin-1")}
    for path in ("/v1/models", "/docs", "/openapi.json", "/metrics", "/", "/nothing", "/health/"):
        refused = send(api, path, headers=headers)
        assert refused.status_code == 401 and refused.headers["www-authenticate"].startswith("Basic ")
        error_of(refused)
    assert send(api, "/v1/scores", GOOD, headers=headers).status_code == 401
    assert send(api, "/health", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost", 200), ("LOCALHOST:7860", 200), ("127.0.0.1:7860", 200), ("[::1]:7860", 200), ("10.0.0.5", 200)]
    + [(host, 400) for host in ("evil.example", "evil.example:7860", "localhost.evil.example", "", "127.0.0.1.nip.io")],
)
def test_other_host_names_are_refused(service: Service, host: str, status: int):
    answer = send(api_of(service, hosts=frozenset({"localhost"})), "/health", headers={"host": host})
    assert answer.status_code == status
    assert send(api_of(service), "/health", headers={"host": host}).status_code == 200


def test_other_origins_may_not_read_unless_they_are_named(service: Service):
    origin = {"origin": "https://example.org"}
    for header in ("https://example.org", "http://localhost:81", "http://localhost.evil.example", "null", ""):
        refused = send(api_of(service), "/v1/models", headers={"origin": header})
        assert refused.status_code == 403 and "access-control-allow-origin" not in refused.headers
        assert error_of(refused)["field"] == "Origin"
    assert send(api_of(service), "/v1/scores", GOOD, headers={"origin": "http://localhost"}).status_code == 200
    api = api_of(service, key=KEY, cors_origins=("https://example.org",))
    asked = origin | {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    before = send(api, "/v1/scores", method="OPTIONS", headers=asked)
    assert before.status_code == 200 and before.headers["access-control-allow-origin"] == "https://example.org"
    assert send(api, "/v1/models", headers=origin | {"authorization": f"Bearer {KEY}"}).status_code == 200
    other = send(api, "/v1/models", headers={"origin": "https://evil.example", "authorization": f"Bearer {KEY}"})
    assert other.status_code == 403
    assert "access-control-allow-origin" not in other.headers


def test_a_text_of_a_system_turn_alone_is_refused(service: Service):
    query = {"query": ["<|im_start|>system\nx<|im_end|>"]}
    assert error_of(send(api_of(service), "/get_reward?system=drop&blank=0", query))["code"] == 422


# ---- log ------------------------------------------------------------------------------------------------


def test_the_log_has_no_text_unless_asked(service: Service, capsys: pytest.CaptureFixture[str]):
    secret = {"conversations": [conversation("xyzzy", QUESTION)]}
    send(api_of(service), "/v1/scores", secret)
    send(api_of(service), "/v1/scores?xyzzy=1", secret | {"truncate": "xyzzy"})
    written = capsys.readouterr().err
    lines = [json.loads(line) for line in written.splitlines()]
    assert [(line["event"], line["path"], line["status"]) for line in lines] == [
        ("request", "/v1/scores", 200),
        ("request", "/v1/scores", 422),
    ]
    assert lines[0]["conversations"] == 1 and lines[0]["tokens"] > 9 and "xyzzy" not in written
    send(api_of(service, log_text=True), "/v1/scores", secret)
    assert "xyzzy" in capsys.readouterr().err


def test_a_message_that_is_refused_is_not_repeated(service: Service):
    """Neither the message nor HTML in it appears in the response."""
    script = "<script>alert(1)</script>"
    answer = send(api_of(service), "/v1/scores", {"conversations": [[{"role": script, "content": script}] * 2]})
    assert answer.status_code == 422 and "script" not in answer.text
    answer = send(api_of(service), "/v1/scores", GOOD | {"model": script})
    assert answer.headers["content-type"] == "application/json"
    assert issubclass(ConversationError, Exception)


def test_a_message_that_quotes_the_request_is_printable_and_short(service: Service):
    for name in ("querie\ufeffs", "\x1b[2J", "x" * 5000):
        answer = send(api_of(service), "/v1/scores", {name: 1, "conversations": [conversation("A")]})
        message = answer.json()["error"]["message"]
        assert answer.status_code == 422 and message.isprintable() and len(message) <= 1000
