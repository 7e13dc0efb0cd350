"""`/docs`: Swagger UI from this origin only."""

from __future__ import annotations

import re
from typing import Any

import pytest

from runtime.api.service import Service
from tests.helpers.served import api_of, listening, send

KEY = "correct-horse-battery"


def test_the_page_and_its_files_come_from_this_origin(service: Service):
    api = api_of(service)
    page = send(api, "/docs")
    policy = page.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "unsafe" not in policy and "http" not in policy
    assert "://" not in page.text and not re.search(r"<script(?! src=)", page.text)
    assets = re.findall(r'(?:src|href)="(docs/assets/[^"]+)"', page.text)
    assert len(assets) == 3
    for path in assets:
        asset = send(api, f"/{path}")
        assert asset.status_code == 200 and "max-age" in asset.headers["cache-control"], path
        assert "sourceMappingURL" not in asset.text
    assert send(api, "/docs/assets/%2e%2e/documentation.py").status_code == 404
    assert send(api, "/docs/assets/none.js").json()["error"]["code"] == 404


def test_the_files_need_the_key(service: Service):
    assert send(api_of(service, key=KEY), "/docs/assets/swagger-ui.css").status_code == 401


@pytest.mark.slow
def test_a_browser_lists_and_calls_the_endpoints(service: Service, chromium: Any):
    """With the key as the browser's password, and without requests to other hosts or violations of the policy."""
    requested: list[str] = []
    errors: list[str] = []
    with listening(api_of(service, key=KEY)) as (url, _):
        context = chromium.new_context(http_credentials={"username": "any", "password": KEY})
        page = context.new_page()
        page.on("request", lambda request: requested.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
        page.goto(f"{url}/docs")
        page.locator("#operations-worldpm-kit-score_conversations_v1_scores_post").click()
        page.get_by_role("button", name="Try it out").click()
        page.get_by_role("button", name="Execute").click()
        status = page.locator(".live-responses-table tbody .response-col_status").first
        status.wait_for()
        shown = status.inner_text()
        context.close()
    assert shown.startswith("200"), shown
    assert not errors
    assert not [each for each in requested if not each.startswith((url, "data:", "blob:"))]
