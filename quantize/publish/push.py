"""Upload a quantized checkpoint to the hub. huggingface_hub retries, and continues an interrupted upload."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, get_token
from rich.console import Console

from quantize.publish.card import missing_metadata, published_card, read_results
from quantize.publish.errors import explaining
from quantize.publish.files import UploadPlan
from quantize.publish.remote import check_remote
from runtime.checkpoints.checkpoint import Checkpoint, open_checkpoint
from runtime.common.errors import ConfigurationError
from runtime.common.hub import HubId
from runtime.common.terminal import format_size
from runtime.evaluation.verdict import pluralize


@dataclass(frozen=True)
class PushOptions:
    """The arguments of an upload.

    Attributes:
        repository: `owner/name` on the hub.
        dry_run: list the files, and ask and send nothing.
        public: visibility of a repository that does not exist yet.
        include_rows: also upload the compared conversations.
        overwrite: replace files of the repository that differ.
        base_model, license: for the card; None for what is recorded.
        results: files of worldpm-evaluate, for the card.

    Raises:
        ConfigurationError: `repository` or `base_model` is no hub id.
    """

    repository: str
    dry_run: bool = False
    public: bool = False
    include_rows: bool = False
    overwrite: bool = False
    base_model: str | None = None
    license: str | None = None
    results: Sequence[Path] = ()

    def __post_init__(self) -> None:
        for flag, value in (("--push-to", self.repository), ("--base-model", self.base_model)):
            if value is not None and not HubId.is_repository(value):
                raise ConfigurationError(
                    f"{flag} is {value!r}; OWNER/NAME was expected: letters, digits, `-`, `_` and `.`, at most 96 of "
                    "them in a name."
                )


def push(model: str, options: PushOptions, console: Console) -> None:
    """List and upload the files of `model`.

    Raises:
        CheckpointError: the model is missing or damaged.
        ConfigurationError: it is not quantized, its card cannot be read, there is no token, or the repository has other
            content.
        JobError: the hub refused the upload or cannot be reached.
    """
    # 1. Validate the model, list its files and complete its card.
    checkpoint = open_checkpoint(model)
    card = _card(checkpoint, options)
    plan = UploadPlan.make(checkpoint, str(card), include_rows=options.include_rows)
    print_plan(plan, card, console)
    if options.dry_run:
        console.print(f"Nothing was uploaded. Without --dry-run this goes to {options.repository}.")
        return

    # 2. Create the repository, or check that the one that exists has no other content.
    if get_token() is None:
        raise ConfigurationError(
            "there is no token for the hub; log in with `hf auth login`, or set HF_TOKEN to a token that may write."
        )
    api = HfApi(library_name="worldpm-kit")
    with explaining(options.repository):
        url = api.create_repo(options.repository, private=not options.public, exist_ok=True)
        check_remote(api, options.repository, plan, overwrite=options.overwrite)

        # 3. Upload.
        console.print(f"uploading to {url}")
        with tempfile.TemporaryDirectory(prefix="worldpm-push-") as staged:
            plan.stage(Path(staged))
            commit = api.upload_folder(
                repo_id=options.repository,
                folder_path=staged,
                commit_message=f"Upload {checkpoint.name} with worldpm-kit",
            )
    console.print(f"uploaded    {url}\ncommit      {commit.oid}")


def print_plan(plan: UploadPlan, card: ModelCard, console: Console) -> None:
    """Print the files that are uploaded, those that stay, and what the card lacks."""
    size = format_size(sum(map(plan.nbytes, plan.files)))
    console.print(f"Uploaded: {pluralize(len(plan.files), 'file')}, {size}", style="bold")
    width = max(map(len, [*plan.files, *plan.left_out]))
    for name in plan.files:
        console.print(f"  {name:<{width}}  {format_size(plan.nbytes(name)):>10}  {plan.notes.get(name, '')}".rstrip())
    if plan.left_out:
        console.print("Not uploaded", style="bold")
    for name, reason in plan.left_out.items():
        console.print(f"  {name:<{width}}  {reason}")
    for note in missing_metadata(card):
        console.print(f"note: {note}", style="bold")


def _card(checkpoint: Checkpoint, options: PushOptions) -> ModelCard:
    if checkpoint.quantization is None:
        raise ConfigurationError(f"{checkpoint.name} is not quantized; give a checkpoint that this kit has written.")
    return published_card(
        checkpoint,
        options.repository,
        base_model=options.base_model,
        licence=options.license,
        results=[result for path in options.results for result in read_results(path, checkpoint)],
    )
