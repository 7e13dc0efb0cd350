"""A server below a sub-path of a proxy, which removes the sub-path or leaves it."""

from __future__ import annotations

import re

import httpx
import pytest

from runtime.api.application import make_api
from runtime.api.options import Limits, parse
from runtime.api.service import Service
from runtime.common.errors import ConfigurationError
from tests.helpers.served import api_of, chatml, conversation, listening, send

GOOD = {"conversations": [conversation("a")]}
KEY = "correct-horse-battery"


@pytest.mark.parametrize("before", ["", "/deep/reward"])
def test_every_path_is_there_with_and_without_the_sub_path(service: Service, before: str):
    api = api_of(service, root_path="/deep/reward")
    score = float(service.get(None).scorer.score([conversation("a")]))
    assert send(api, f"{before}/v1/scores", GOOD).json()["scores"] == [score]
    assert send(api, f"{before}/get_reward", {"query": chatml("a")}).json()["rewards"] == [score]
    assert send(api, f"{before}/health", method="HEAD").status_code == 200
    assert send(api, f"{before}/docs/assets/swagger-ui.css").status_code == 200
    assert send(api, f"{before}/docs").status_code == 200
    assert send(api, f"{before}/openapi.json").json()["servers"] == [{"url": "/deep/reward"}]
    assert send(api, f"{before}/nothing").json()["error"]["code"] == 404
    assert send(api, "/deep/rewards/health").status_code == 404


def test_the_key_the_limits_and_the_figures_know_the_paths(service: Service):
    api = api_of(service, limits=Limits(body_bytes=100), key=KEY, root_path="/reward")
    assert send(api, "/reward/health").status_code == 200
    assert send(api, "/reward/v1/models").status_code == 401
    header = {"headers": {"authorization": f"Bearer {KEY}"}}
    assert send(api, "/reward/v1/scores", GOOD | {"model": "x" * 100}, **header).status_code == 413
    text = send(api, "/reward/metrics", **header).text
    assert 'worldpm_requests_total{endpoint="/v1/scores",status="413"} 1.0' in text


@pytest.mark.parametrize("path", ["reward", "/v1/x", "/docs", "/a b", "//a", "https://example.org/a"])
def test_other_sub_paths_are_refused(path: str):
    with pytest.raises(ConfigurationError, match="--root-path is"):
        parse(["--root-path", path])
    assert parse(["--root-path", "/a/b/"]).root_path == "/a/b" and parse(["--root-path", "/"]).root_path == ""


@pytest.mark.slow
@pytest.mark.parametrize("before", ["", "/reward"])
def test_the_page_links_to_the_sub_path(page_service: Service, before: str):
    from runtime.page import mount_page

    api = mount_page(make_api(page_service, Limits(), None, root_path="/reward"), page_service, root_path="/reward")
    with listening(api) as (url, _), httpx.Client(base_url=url) as client:
        html = client.get(f"{before}/").text
        assert f'"root":"{url}/reward"' in html.replace(" ", "").replace("\\u002f", "/")
        assets = re.findall(r'(?:src|href)="([^"]*assets/[^"]+\.(?:js|css))"', html)
        assert assets
        for asset in assets[:3]:
            found = client.get(httpx.URL(f"{url}/reward/").join(asset))
            assert found.status_code == 200, asset
        assert client.get(f"{before}/config").json()["root"] == f"{url}/reward"
        assert client.get(f"{before}/health").status_code == 200
