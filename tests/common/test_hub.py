from __future__ import annotations

from pathlib import Path

import pytest

from runtime.common.hub import HubId, downloaded_commit, short_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("source", "name", "revision", "label"),
    [
        ("Qwen/WorldPM-72B", "Qwen/WorldPM-72B", None, "WorldPM-72B"),
        ("Qwen/WorldPM-72B@main", "Qwen/WorldPM-72B", "main", "WorldPM-72B@main"),
        (f"a/b.c@{COMMIT}", "a/b.c", COMMIT, f"b.c@{COMMIT}"),
        ("a/b@refs/pr/4", "a/b", "refs/pr/4", "b@refs-pr-4"),
    ],
)
def test_ids_and_revisions(source, name, revision, label):
    hub_id = HubId.parse(source)
    assert (hub_id.name, hub_id.revision, hub_id.label) == (name, revision, label)
    assert short_name(source) == label and "/" not in label


@pytest.mark.parametrize("source", ["a", "a@b", "a/b@", "a/b@@c", "a/b@c d", "a/b/c@d", "./a/b", "/a/b@c", "a@b/c", ""])
def test_what_is_no_id(source):
    assert HubId.parse(source) is None and HubId.parse(Path("a/b")) is None


def test_a_path_that_exists_is_no_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b@c").mkdir(parents=True)
    assert HubId.parse("a/b@c") is None and HubId.parse("a/b") == HubId("a/b")
    assert short_name("a/b@c") == "b@c"


@pytest.mark.parametrize(
    ("directory", "commit"),
    [
        (f"hub/models--a--b/snapshots/{COMMIT}", COMMIT),
        (f"hub/models--a--b/blobs/{COMMIT}", None),
        ("hub/models--a--b/snapshots/main", None),
        (".", None),
        ("/", None),
    ],
)
def test_the_commit_of_a_download(directory, commit):
    assert downloaded_commit(Path(directory)) == commit
