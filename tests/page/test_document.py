"""The served page: no requests to other hosts, uploads confined, header before and after loading."""

from __future__ import annotations

import atexit
import re
import tempfile
from pathlib import Path

import gradio
import httpx
import pytest
from fastapi import FastAPI

from runtime import serve
from runtime.api.service import Service
from runtime.page.document import make_page, read_head, show_masthead
from runtime.page.isolation import POLICY
from runtime.page.theme import make_theme


@pytest.fixture(scope="module")
def client(page_url):
    with httpx.Client(base_url=page_url) as client:
        yield client


def test_the_theme_names_system_fonts_alone():
    css = make_theme()._get_theme_css()
    assert "url(" not in re.sub(r"url\([\"']?data:", "", css) and "@font-face" not in css and "@import" not in css


def test_style_and_script_name_no_address():
    head = read_head()
    assert not re.findall(r"https?://|//[a-z]+\.", head)
    assert "fetch(" not in head and "XMLHttpRequest" not in head and "import(" not in head


def test_html_carries_the_policy_and_other_answers_do_not(client):
    assert client.get("").headers["content-security-policy"] == POLICY
    assert "content-security-policy" not in client.get("theme.css").headers


def test_browsers_get_little_and_keep_assets(client):
    page, plain = client.get(""), client.get("", headers={"accept-encoding": "identity"})
    assert page.headers["content-encoding"] == "gzip" and page.text == plain.text
    assert page.num_bytes_downloaded < len(plain.content) / 3 and "cache-control" not in page.headers
    asset = re.search(r"assets/[\w.-]+\.js", page.text)
    assert asset and "immutable" in client.get(asset[0]).headers["cache-control"]
    assert "cache-control" not in client.get("assets/none-1234.js").headers


def test_the_configuration_has_no_footer_no_history_no_analytics(client):
    config = client.get("config").json()
    assert config["footer_links"] == [] and config["run_history"] is False and config["analytics_enabled"] is False
    assert gradio.utils.get_space() is None


def test_no_event_is_offered_as_an_api(client):
    assert client.get("gradio_api/info").json() == {"named_endpoints": {}, "unnamed_endpoints": {}}


@pytest.mark.parametrize("name", ["../../../etc/evil.jsonl", "..\\..\\evil.jsonl", "/etc/evil.jsonl", "a\0b.jsonl"])
def test_an_upload_s_name_leads_nowhere(client, name):
    answer = client.post("gradio_api/upload", files={"files": (name, b"{}")})
    if answer.status_code == 200:
        (path,) = answer.json()
        assert Path(path).resolve().is_relative_to(Path(gradio.utils.get_upload_folder()).resolve())
    else:
        assert answer.status_code in (400, 422)
    assert client.get("").status_code == 200


def test_files_of_the_machine_are_not_served(client):
    for path in ("/etc/passwd", str(Path(__file__).resolve()), "../../../../etc/passwd"):
        assert client.get(f"gradio_api/file={path}").status_code in (403, 404)


@pytest.mark.parametrize(("button", "place", "others"), [("batch-run", 1, [None, False]), ("best-run", 1, [None, "x"])])
def test_no_address_is_fetched_for_a_file(client, monkeypatch, tmp_path, button, place, others):
    """URLs are refused in file inputs and in text inputs."""
    fetched = []

    async def fetch(url, cache_dir):
        fetched.append(url)
        (tmp_path / "x.jsonl").write_text("{}")
        return str(tmp_path / "x.jsonl")

    monkeypatch.setattr(gradio.processing_utils, "async_ssrf_protected_download", fetch)
    config = client.get("config").json()
    number = next(each["id"] for each in config["components"] if each["props"].get("elem_id") == button)
    event = next(each["id"] for each in config["dependencies"] if [number, "click"] in each["targets"])
    data = [*others[:place], {"path": "https://host/x.jsonl", "meta": {"_type": "gradio.FileData"}}, *others[place:]]
    asked = {"data": data, "fn_index": event, "session_hash": button}
    assert client.post("gradio_api/queue/join", json=asked).status_code == 200
    answer = client.get("gradio_api/queue/data", params={"session_hash": button}).text
    assert fetched == []
    assert '"success":false' in answer and "upload the file itself" in answer


def test_an_upload_that_is_too_large_is_refused(page_service):
    from tests.helpers.page_server import serving

    with serving(page_service, max_upload_size="1kb") as url:
        assert httpx.post(f"{url}gradio_api/upload", files={"files": ("a.jsonl", bytes(4096))}).status_code == 413


def test_the_masthead_says_how_far_loading_is():
    service = Service()
    service.status = "quantizing the demo: block 7 of 30"
    assert "block 7 of 30" in show_masthead(service) and "still loading" in show_masthead(service)
    service.failure = "no room"
    assert "Loading failed" in show_masthead(service) and "no room" in show_masthead(service)
    service.close()


def test_the_masthead_says_what_is_loaded(page_service):
    html = show_masthead(page_service)
    assert "tiny-gptq-4bit" in html and "bits per weight" in html and "of 10 pairs" in html


def test_a_page_can_be_made_before_models_are_there():
    service = Service()
    assert isinstance(make_page(service), gradio.Blocks)
    service.close()


def test_uploads_are_private_to_the_server(page_service, monkeypatch, tmp_path):
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    removals = []
    monkeypatch.setattr(atexit, "register", lambda *call, **options: removals.append((call, options)))
    serve._add_page(FastAPI(), page_service, "")
    uploads = Path(gradio.utils.get_upload_folder())
    assert uploads.parent == tmp_path and uploads.stat().st_mode & 0o777 == 0o700
    ((remove, *rest), options) = next(each for each in removals if str(uploads) in each[0])
    remove(*rest, **options)
    assert not uploads.exists()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "chosen"))
    serve._add_page(FastAPI(), page_service, "")
    assert gradio.utils.get_upload_folder() == str(tmp_path / "chosen")
