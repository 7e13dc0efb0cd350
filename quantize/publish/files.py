"""Which files of a checkpoint's directory are uploaded, and which stay and why."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from quantize.report.model_card import CARD_FILE
from quantize.tensor_parallel import MANIFEST_FILE
from runtime.checkpoints.checkpoint import TOKENIZER_FILES, Checkpoint
from runtime.checkpoints.shards import INDEX_FILE
from runtime.common.files import sha256_of
from runtime.conversations.row_sources import INPUT_SUFFIXES
from runtime.evaluation.pairs import PARITY_PAIRS_FILE
from runtime.evaluation.reference_scores import REFERENCE_SCORES_FILE
from runtime.evaluation.report import JSON_FILE, read_report
from runtime.evaluation.report_files import HTML_FILE, JUNIT_FILE, render_html

LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "NOTICE.md")
CONFIG_FILES = ("config.json", "quantize_config.json", "generation_config.json")
REPORT_FILES = (JSON_FILE, HTML_FILE, JUNIT_FILE, REFERENCE_SCORES_FILE, MANIFEST_FILE)
NO_TEXTS = "without the texts of the worst pairs"


@dataclass(frozen=True)
class UploadPlan:
    """What is uploaded, by name in the repository.

    Attributes:
        files: a file that is uploaded as it is, or the content of one that is written for the upload.
        notes: what to know of an uploaded file, by name.
        left_out: why a file or directory is not uploaded, by name.
    """

    files: dict[str, Path | bytes]
    notes: dict[str, str]
    left_out: dict[str, str]

    @classmethod
    def make(cls, checkpoint: Checkpoint, card: str, *, include_rows: bool) -> UploadPlan:
        """List the directory of a checkpoint.

        Raises:
            KitError: parity.json is damaged.
        """
        directory = checkpoint.directory
        uploaded = {*_checkpoint_files(checkpoint), *REPORT_FILES, *LICENCE_FILES}
        uploaded |= {PARITY_PAIRS_FILE} if include_rows else set()
        names = sorted(each.relative_to(directory).as_posix() for each in directory.rglob("*") if each.is_file())
        files: dict[str, Path | bytes] = {name: directory / name for name in names if name in uploaded}
        files[CARD_FILE] = card.encode()
        notes = {CARD_FILE: "with the hub's metadata"}
        if not include_rows:
            redacted = _reports_without_texts(directory / JSON_FILE)
            files |= redacted
            notes |= dict.fromkeys(redacted, NO_TEXTS)
            if JSON_FILE not in redacted:  # a page alone cannot be redacted
                files.pop(HTML_FILE, None)
        return cls(dict(sorted(files.items())), notes, _left_out([name for name in names if name not in files]))

    def nbytes(self, name: str) -> int:
        """The size of an uploaded file."""
        content = self.files[name]
        return len(content) if isinstance(content, bytes) else content.stat().st_size

    def stage(self, directory: Path) -> None:
        """Fill an empty directory with what is uploaded: links to the files, and the contents."""
        for name, content in self.files.items():
            if isinstance(content, bytes):
                (directory / name).write_bytes(content)
            else:
                (directory / name).symlink_to(content.absolute())

    def sha256(self, name: str) -> str:
        """The SHA-256 of an uploaded file."""
        content = self.files[name]
        return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else sha256_of(content)


def _checkpoint_files(checkpoint: Checkpoint) -> list[str]:
    shards = [shard.file.name for shard in checkpoint.shards]
    return [*shards, INDEX_FILE, *CONFIG_FILES, *TOKENIZER_FILES]


def _reports_without_texts(path: Path) -> dict[str, Path | bytes]:
    """parity.json and parity.html without the texts of pairs; empty if there is no report."""
    if not path.is_file():
        return {}
    report = read_report(path).model_copy(update={"worst": []})
    return {JSON_FILE: report.to_json().encode(), HTML_FILE: render_html(report).encode()}


def _left_out(names: list[str]) -> dict[str, str]:
    """The reason for each file, and one for all files of a directory."""
    left_out: dict[str, str] = {}
    inside = Counter(name.partition("/")[0] for name in names if "/" in name)
    for name in names:
        folder, slash, _ = name.partition("/")
        if slash:
            what = "resume state of the quantization" if folder == "job" else "a directory"
            left_out[f"{folder}/"] = f"{what}, {inside[folder]} files"
        elif name == PARITY_PAIRS_FILE:
            left_out[name] = "conversations; --include-rows uploads them"
        elif name == HTML_FILE:
            left_out[name] = f"it may hold texts, and there is no {JSON_FILE} to write it again without them"
        elif name.endswith(INPUT_SUFFIXES) and not name.endswith((".json", ".json.gz", ".json.zst")):
            left_out[name] = "rows of data"
        else:
            left_out[name] = "not a file of the checkpoint"
    return left_out
