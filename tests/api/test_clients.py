"""Third-party clients: the `openai` package, and requests as OpenRLHF and verl send them."""

from __future__ import annotations

import asyncio

import httpx
import openai
import pytest

from runtime.api.service import Service
from tests.helpers.served import RESPONSES, api_of, chatml, conversation, listening

KEY = "correct-horse-battery"


def local(service: Service) -> list[float]:
    return [float(service.get(None).scorer.score([conversation(each)])) for each in RESPONSES[:2]]


@pytest.mark.parametrize("options", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}])
def test_the_openai_client_reads_scores_as_embeddings(service: Service, options: dict):
    """Without `encoding_format` the client requests base64 and decodes it."""
    with listening(api_of(service, key=KEY)) as (url, _), openai.OpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
        texts = [chatml(each) for each in RESPONSES[:2]]
        answer = client.embeddings.create(model="tiny", input=texts, **options)
        assert [each.id for each in client.models.list()] == ["tiny"]
        with pytest.raises(openai.NotFoundError, match="models: tiny"):
            client.embeddings.create(model="text-embedding-3-small", input=texts)
        with pytest.raises(openai.UnprocessableEntityError, match="no turns were found"):
            client.embeddings.create(model="tiny", input="hello")
    assert answer.usage.total_tokens > 20 and [each.index for each in answer.data] == [0, 1]
    if options.get("encoding_format") != "base64":
        assert [each.embedding for each in answer.data] == [[score] for score in local(service)]


def test_the_openai_client_raises_for_a_wrong_key(service: Service):
    with listening(api_of(service, key=KEY)) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="no")
        with pytest.raises(openai.AuthenticationError, match="The key is missing or wrong"):
            client.models.list()
        client.close()


@pytest.mark.slow
def test_openrlhf_s_rollouts_as_it_sends_them(service: Service):
    """Concurrent requests of one sample each, as lists of one, on one connection per request."""
    prompt = chatml("").removesuffix("<|im_end|>")

    async def reward(url: str, response: str) -> dict:
        payload = {"query": [f"{prompt}{response}<|im_end|>"], "prompts": [prompt], "labels": ["42"]}
        async with httpx.AsyncClient(timeout=180) as client:
            answer = await client.post(url, json=payload)
            answer.raise_for_status()
            return answer.json()

    async def rollouts(url: str) -> list[dict]:
        return await asyncio.gather(*(reward(url, response) for response in RESPONSES[:2] * 16))

    with listening(api_of(service)) as (url, _):
        answers = asyncio.run(rollouts(f"{url}/get_reward"))
    for answer, score in zip(answers, local(service) * 16, strict=True):
        assert answer["rewards"] == answer["scores"] == [score]
        assert all(isinstance(values, list) and len(values) == 1 for values in answer["extra_logs"].values())


def test_verl_s_two_ways_of_reading(service: Service):
    """verl reads the last probability from vLLM, and the last number of the last embedding from SGLang."""
    text = chatml(RESPONSES[0])
    with listening(api_of(service)) as (url, _), httpx.Client(base_url=url) as client:
        vllm = client.post("/classify", json={"model": "tiny", "input": text, "use_activation": False}).json()
        sglang = client.post("/v1/embeddings", json={"model": "tiny", "input": text}).json()
    assert vllm["data"][-1]["probs"][-1] == local(service)[0]
    assert sglang["data"][-1]["embedding"][-1] == local(service)[0]
