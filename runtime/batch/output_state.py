"""The resume record `OUTPUT.progress.json`: how many bytes of an unfinished output are valid, and how they were made.

It is replaced atomically after each window, once the window's bytes are synced to disk. Bytes beyond its count were
written by a killed run and are cut off on resuming. A finished output has no such file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from runtime.batch.row import OutputRecord
from runtime.common.errors import JobError
from runtime.common.files import write_file_atomically

SCHEMA = 1


@dataclass(frozen=True)
class OutputState:
    """Content of an output so far.

    Attributes:
        recipe: the options that determine the scores; `model` is the fingerprint of the checkpoint.
        threads: CPU threads of the run; another number changes the rounding of sums.
        rows: rows written, including those with an error.
        errors: rows with an error.
        tokens: tokens of all rows.
        bytes: length of the output with these rows.
        sha256: digest of these bytes.
        input: digest of the input rows read for them.
        formats: the formats that were recognised, each with the location of its first row.
    """

    recipe: dict[str, Any]
    threads: int
    rows: int = 0
    errors: int = 0
    tokens: int = 0
    bytes: int = 0
    sha256: str = ""
    input: str = ""
    formats: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, output: Path) -> OutputState | None:
        """Read the state of `output`; None if it has none.

        Raises:
            JobError: the file is damaged or has an unknown schema.
        """
        path = progress_path(output)
        try:
            content = json.loads(path.read_bytes())
            schema = content.pop("schema")
            if schema == SCHEMA:
                return cls(**content)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise JobError(f"{path} is damaged ({error!r}); remove it and {output}, and start again.") from error
        raise JobError(f"{path} has schema {schema!r}, but this version needs {SCHEMA}; choose another --output.")

    def save(self, output: Path) -> None:
        """Write the state of `output` atomically."""
        write_file_atomically(progress_path(output), json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n")

    def with_records(
        self, records: Sequence[OutputRecord], input_digest: str, formats: Mapping[str, str]
    ) -> OutputState:
        """A copy that also counts `records`; `bytes` and `sha256` stay as they are."""
        return replace(
            self,
            rows=self.rows + len(records),
            errors=self.errors + sum("error" in record for record in records),
            tokens=self.tokens + sum(sum(record.get("tokens", ())) for record in records),
            input=input_digest,
            formats=dict(formats),
        )

    def check_recipe(self, recipe: dict[str, Any], output: Path) -> None:
        """Check that the run that resumes has the same recipe.

        Raises:
            JobError: the message names each option that differs.
        """
        changes = [
            "the model differs (--model)" if name == "model" else f"{name} was {old!r} and is now {recipe.get(name)!r}"
            for name in dict.fromkeys([*self.recipe, *recipe])  # options that were not used are absent
            if recipe.get(name) != (old := self.recipe.get(name))
        ]
        if changes:
            raise JobError(
                f"{output} was started with other options: {'; '.join(changes)}. Resume with the original ones, or "
                "start again with another --output."
            )


def progress_path(output: Path) -> Path:
    """Path of the resume record of `output`."""
    return output.with_name(f"{output.name}.progress.json")
