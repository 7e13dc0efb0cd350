"""Responses of all endpoints: each score equals the local one."""

from __future__ import annotations

import asyncio
import base64
import struct
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from runtime.api.service import ServedModel, Service
from runtime.conversations.rendering import RenderedConversation
from runtime.evaluation.comparison import measure_parity
from runtime.scorer import probability_preferred
from tests.helpers.scored import SUBJECT, pair
from tests.helpers.served import QUESTION, RESPONSES, api_of, chatml, conversation, send, serve

LLAMA3 = "<|begin_of_text|>" + "".join(
    f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"
    for role, content in (("user", QUESTION), ("assistant", RESPONSES[0]))
)


def local(service: Service, response: str) -> float:
    """The score of the conversation scored alone, without the server."""
    return float(service.get(None).scorer.score([conversation(response)]))


TEXTS = [chatml(response) for response in RESPONSES]
PROMPT = chatml("").removesuffix("<|im_end|>")
ONE = {"messages": conversation(RESPONSES[2])}
REQUESTS = {
    "scores": ("/v1/scores", {"conversations": [conversation(each) for each in RESPONSES]}, lambda a: a["scores"]),
    "get_reward": ("/get_reward", {"query": TEXTS, "prompts": [PROMPT] * 3, "labels": [1] * 3}, lambda a: a["rewards"]),
    "pooling": ("/pooling", {"input": TEXTS[:2]}, lambda a: [each["data"][-1][0] for each in a["data"]]),
    "pooling task": ("/pooling", {"input": TEXTS[:1], "task": "classify"}, lambda a: a["data"][0]["data"]),
    "pooling messages": ("/pooling", ONE, lambda a: [a["data"][0]["data"][-1][-1]]),
    "classify text": ("/classify", {"text": TEXTS[:2]}, lambda a: [each["embedding"][0] for each in a]),
    "classify one text": ("/classify", {"text": TEXTS[0], "model": "tiny"}, lambda a: a["embedding"]),
    "classify input": ("/classify", {"input": TEXTS[:2]}, lambda a: [each["probs"][-1] for each in a["data"]]),
    "classify messages": ("/classify", ONE, lambda a: a["data"][-1]["probs"]),
    "score": ("/score", {"queries": QUESTION, "documents": RESPONSES}, lambda a: [e["score"] for e in a["data"]]),
    "text_1": ("/v1/score", {"text_1": [QUESTION] * 3, "text_2": RESPONSES}, lambda a: [e["score"] for e in a["data"]]),
    "embeddings": ("/v1/embeddings", {"input": TEXTS[:2]}, lambda a: [each["embedding"][0] for each in a["data"]]),
    "embeddings llama": ("/v1/embeddings", {"input": LLAMA3}, lambda a: a["data"][-1]["embedding"]),
}


def token_ids(service: Service, response: str) -> list[int]:
    return service.get(None).variant.renderer.render(conversation(response)).token_ids


@pytest.mark.parametrize("path", ["/pooling", "/v1/embeddings"])
def test_token_ids_are_scored_as_they_are(service: Service, path: str):
    ids = [token_ids(service, each) for each in RESPONSES]
    for given in (ids, ids[0]):
        answer = send(api_of(service), path, {"input": given}).json()
        key = "data" if path == "/pooling" else "embedding"
        found = [each[key][-1] for each in answer["data"]]
        expected = [local(service, each) for each in (RESPONSES if given is ids else RESPONSES[:1])]
        assert [each[0] if isinstance(each, list) else each for each in found] == expected
        assert answer["usage"]["total_tokens"] == sum(map(len, ids if given is ids else ids[:1]))


def test_typed_tokens_as_ids_are_special_tokens(service: Service):
    """A client may mean them; the text of a message never is."""
    renderer = service.get(None).variant.renderer
    end = renderer.render(conversation("b")).token_ids[-1]
    ids = [end, *token_ids(service, "b")]
    score = service.get(None).scorer.scores([RenderedConversation(ids, len(ids) - 1)])
    assert [each["embedding"] for each in send(api_of(service), "/v1/embeddings", {"input": ids}).json()["data"]] == [
        score
    ]


NULLS = {
    "/v1/scores": {"truncate": None, "conversations": [conversation("a")]},
    "/v1/comparisons": {"prompt": "q", "response_a": "a", "response_b": "b", "pairs": None, "truncate": None},
    "/get_reward": {"query": chatml("a"), "prompts": None, "labels": None},
    "/pooling": {"input": chatml("a"), "messages": None, "task": None, "encoding_format": None, "use_activation": None},
    "/classify": {"input": chatml("a"), "messages": None, "text": None, "truncate_prompt_tokens": None},
    "/score": {"queries": "q", "documents": "a", "text_1": None, "text_2": None, "activation": None},
    "/rerank": {"query": "q", "documents": ["a"], "top_n": None, "max_tokens_per_doc": None},
    "/v1/embeddings": {"input": chatml("a"), "encoding_format": None, "dimensions": None, "user": None},
}  # fmt: skip


@pytest.mark.parametrize("path", NULLS)
def test_a_null_is_an_absent_option(service: Service, path: str):
    body = NULLS[path] | {"model": None}
    answer = send(api_of(service), path, body)
    assert answer.status_code == 200, answer.text
    absent = {name: value for name, value in body.items() if value is not None}
    volatile = {"id", "created"}
    both = [each.json() for each in (answer, send(api_of(service), path, absent))]
    one, two = ({k: v for k, v in each.items() if k not in volatile} for each in both)
    assert one == two


def test_a_model_may_be_named_by_its_path(service: Service, tiny_checkpoint: Path):
    for name in ("tiny", str(tiny_checkpoint), str(tiny_checkpoint.resolve())):
        answer = send(api_of(service), "/v1/scores", {"conversations": [conversation("a")], "model": name})
        assert answer.json()["model"] == "tiny"
    other = send(
        api_of(service), "/v1/scores", {"conversations": [conversation("a")], "model": str(tiny_checkpoint.parent)}
    )
    assert other.status_code == 404 and other.json()["error"]["message"].endswith("models: tiny.")


@pytest.mark.parametrize("name", REQUESTS)
def test_every_endpoint_gives_the_local_score(service: Service, name: str):
    path, body, scores_in = REQUESTS[name]
    answer = send(api_of(service), path, body)
    assert answer.status_code == 200, answer.text
    scores = scores_in(answer.json())
    responses = RESPONSES[2:] if "messages" in body else RESPONSES[: len(scores)]
    assert scores == [local(service, each) for each in responses]


def test_typed_special_tokens_are_text(service: Service):
    """Special tokens typed in a message are tokenized as text and end no turn."""
    typed = RESPONSES[2]
    assert "<|im_end|>" in typed
    answer = send(api_of(service), "/v1/scores", {"conversations": [conversation(typed)]}).json()
    (rendered,) = [service.get(None).variant.renderer.render(conversation(typed))]
    assert answer["tokens"] == [len(rendered.token_ids)]
    assert rendered.token_ids.count(rendered.token_ids[rendered.scored_index]) == 1


def test_embeddings_in_base64_are_a_float32(service: Service):
    body = {"input": TEXTS[:1], "encoding_format": "base64"}
    (each,) = send(api_of(service), "/v1/embeddings", body).json()["data"]
    exact = send(api_of(service), "/v1/embeddings", {"input": TEXTS[:1]}).json()["data"][0]["embedding"]
    assert list(struct.unpack("<f", base64.b64decode(each["embedding"]))) == exact


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_reranking_puts_the_best_first(service: Service, path: str):
    answer = send(api_of(service), path, {"query": QUESTION, "documents": RESPONSES, "top_n": 2}).json()
    expected = sorted(((local(service, text), index) for index, text in enumerate(RESPONSES)), reverse=True)[:2]
    assert [each["index"] for each in answer["results"]] == [index for _, index in expected]
    every = send(
        api_of(service), path, {"query": QUESTION, "documents": RESPONSES, "top_n": None, "model": None}
    ).json()
    assert len(every["results"]) == len(RESPONSES) and every["results"][:2] == answer["results"]
    scores = [each["relevance_score"] for each in answer["results"]]
    assert scores == [score for score, _ in expected]
    assert [each["document"]["text"] for each in answer["results"]] == [RESPONSES[index] for _, index in expected]


# ---- comparisons ----------------------------------------------------------------------------------------


def test_a_comparison_equals_scorer_compare(service: Service):
    body = {"prompt": QUESTION, "response_a": RESPONSES[0], "response_b": RESPONSES[1]}
    answer = send(api_of(service), "/v1/comparisons", body).json()
    both = service.get(None).scorer.compare(QUESTION, RESPONSES[0], RESPONSES[1])
    (compared,) = answer["comparisons"]
    assert compared["scores"] == [both.score_a, both.score_b]
    assert compared["margin"] == compared["scores"][0] - compared["scores"][1]
    assert compared["probability_a"] == probability_preferred(compared["margin"])
    assert compared["preferred"] == ("a" if both.margin > 0 else "b")
    assert answer["error_margin"] is None and compared["too_close"] is False


def test_pairs_with_turns_and_a_system_prompt(service: Service):
    prompt = [{"role": "system", "content": "Be terse."}, {"role": "user", "content": QUESTION}]
    pairs = [{"prompt": each, "response_a": "same", "response_b": "same"} for each in (prompt, QUESTION)]
    answer = send(api_of(service), "/v1/comparisons", {"pairs": pairs}).json()
    assert [each["preferred"] for each in answer["comparisons"]] == [None, None]
    assert [each["too_close"] for each in answer["comparisons"]] == [True, True]
    first, second = (each["warnings"] for each in answer["comparisons"])
    assert first == ["non-empty system prompt: the model was trained with an empty one"] and second == []


@pytest.mark.parametrize(("error", "close"), [(0.0, False), (100.0, True)])
def test_too_close_is_within_the_measured_error(tiny_checkpoint: Path, error: float, close: bool):
    service = serve(tiny_checkpoint)
    service.get(None).error_margin = error
    body = {"prompt": QUESTION, "response_a": RESPONSES[0], "response_b": RESPONSES[1]}
    answer = send(api_of(service), "/v1/comparisons", body).json()
    assert (answer["error_margin"], answer["comparisons"][0]["too_close"]) == (error, close)


# ---- OpenRLHF -------------------------------------------------------------------------------------------


def test_openrlhf_s_samples_may_be_blank_or_have_a_system_turn(service: Service):
    queries = ["<|im_start|>system\nYou are Qwen.<|im_end|>\n" + each for each in (TEXTS[0], chatml(""))]
    api = api_of(service)
    refused = send(api, "/get_reward", {"query": queries})
    assert refused.status_code == 422 and refused.json()["error"]["field"] == "query[1]"
    answer = send(api, "/get_reward?blank=-5&system=drop", {"query": queries, "labels": ["x", None]}).json()
    assert answer["rewards"] == [local(service, RESPONSES[0]), -5.0]
    assert answer["scores"] == answer["rewards"]
    assert answer["extra_logs"]["warnings"] == [0.0, 0.0] and answer["extra_logs"]["tokens"][1] == 0.0
    kept = send(api, "/get_reward?blank=-5", {"query": queries[:1]}).json()
    assert kept["rewards"] != answer["rewards"][:1] and kept["extra_logs"]["warnings"] == [1.0]
    assert send(api, "/get_reward?model=none", {"query": queries[:1]}).status_code == 404


def test_single_samples_that_arrive_together_are_scored_together(service: Service):
    """As OpenRLHF sends them: one sample per request."""

    async def all_at_once() -> list[httpx.Response]:
        transport = httpx.ASGITransport(api_of(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            bodies = [{"query": [text], "prompts": [PROMPT], "labels": [""]} for text in TEXTS * 20]
            return await asyncio.gather(*(client.post("/get_reward", json=body) for body in bodies))

    before = service.batcher.batches
    rewards = [answer.json()["rewards"] for answer in asyncio.run(all_at_once())]
    assert rewards == [[local(service, each)] for each in RESPONSES * 20]
    assert service.batcher.batches - before < 60


# ---- state ----------------------------------------------------------------------------------------------


def test_models_health_and_metrics(tiny_checkpoint: Path):
    service = serve(tiny_checkpoint)
    api = api_of(service)
    (card,) = send(api, "/v1/models").json()["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("tiny", "model", 1024)
    assert send(api, "/health").json() == {"ready": True, "status": "ready", "models": ["tiny"]}
    assert send(api, "/health", method="HEAD").status_code == 200
    send(api, "/v1/scores", {"conversations": [conversation("a"), conversation("b")], "model": "tiny"})
    send(api, "/v1/scores", {"conversations": [], "model": "tiny"})
    text = send(api, "/metrics").text
    for line in (
        'worldpm_requests_total{endpoint="/v1/scores",status="200"} 1.0',
        'worldpm_requests_total{endpoint="/v1/scores",status="422"} 1.0',
        'worldpm_conversations_total{model="tiny"} 2.0',
        "worldpm_queue_tokens 0.0",
        "worldpm_batch_conversations_sum 2.0",
        "worldpm_ready 1.0",
    ):
        assert line in text.splitlines(), line


def test_health_reports_the_progress_of_loading(tiny_checkpoint: Path):
    service = Service()
    service.status = "quantizing the demo: block 7 of 30"
    api = api_of(service)
    answer = send(api, "/health")
    assert (answer.status_code, answer.json()["status"]) == (503, service.status)
    assert int(answer.headers["retry-after"]) > 0
    early = send(api, "/v1/scores", {"conversations": [conversation("a")]})
    assert early.status_code == 503 and service.status in early.json()["error"]["message"]
    assert int(early.headers["retry-after"]) > 0
    service.failure = "the disk is full."
    assert send(api, "/health").json()["status"] == "the disk is full."
    assert "retry-after" not in send(api, "/health").headers


def test_the_error_of_a_margin_is_measured_on_the_report_s_pairs(service: Service):
    pairs = [pair((1.0, 0.0), (1.3, 0.0)), pair((0.0, 1.0), (0.0, 1.4), id="b")]
    model = service.get(None)
    reported = replace(model.variant, report=measure_parity(pairs, SUBJECT))
    served = ServedModel("reported", reported, model.scorer, service.batcher)
    assert served.error_margin == pytest.approx(((0.3**2 + 0.4**2) / 2) ** 0.5)
    assert model.error_margin is None
