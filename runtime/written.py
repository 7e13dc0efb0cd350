"""How much of a growing output counts, and for what it was written: `OUTPUT.progress.json` beside it.

Rewritten whole after each window of rows, once the window's bytes are on disk; whatever lies beyond the bytes
it counts was torn by a kill. A finished output has none.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from runtime.errors import JobError
from runtime.files import write_whole
from runtime.scored_row import Record

SCHEMA = 1


@dataclass(frozen=True)
class Written:
    """What is in an output.

    Attributes:
        recipe: what decided the scores, by the names of the arguments; `model` is its fingerprint.
        threads: CPU threads that the run was started with: sums that are split otherwise round otherwise.
        rows: rows written, those with an error included.
        errors: rows with an error.
        tokens: tokens of all rows.
        bytes: length of the output with these rows.
        sha256: of these bytes.
        input: digest of the rows that were read for them.
    """

    recipe: dict[str, Any]
    threads: int
    rows: int = 0
    errors: int = 0
    tokens: int = 0
    bytes: int = 0
    sha256: str = ""
    input: str = ""

    @classmethod
    def load(cls, output: Path) -> Written | None:
        """Read what stands beside `output`; None where nothing does.

        Raises:
            JobError: it is damaged, or of another version of the kit.
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
        raise JobError(f"{path} has schema {schema!r}, this kit writes {SCHEMA}; choose another --output.")

    def save(self, output: Path) -> None:
        """Write it beside `output`."""
        write_whole(progress_path(output), json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n")

    def plus(self, records: Sequence[Record], tokens: int, input_digest: str) -> Written:
        """This with a window of rows more; its bytes are counted by who wrote them."""
        return replace(
            self,
            rows=self.rows + len(records),
            errors=self.errors + sum("error" in record for record in records),
            tokens=self.tokens + tokens,
            input=input_digest,
        )

    def refuse_changes(self, recipe: dict[str, Any], output: Path) -> None:
        """Compare with the recipe that the run is to go on with.

        Raises:
            JobError: naming each argument that differs.
        """
        changes = [
            "the model differs (--model)" if name == "model" else f"{name} was {old!r} and is now {recipe.get(name)!r}"
            for name, old in self.recipe.items()
            if recipe.get(name) != old
        ]
        if changes:
            raise JobError(
                f"{output} was begun with other arguments: {'; '.join(changes)}. Resume with the first ones, or "
                "start afresh in another --output."
            )


def progress_path(output: Path) -> Path:
    """Where `output`'s progress is kept."""
    return output.with_name(f"{output.name}.progress.json")
