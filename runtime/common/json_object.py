"""Read a JSON object from a file that is not trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runtime.common.errors import CheckpointError


def read_json_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in a checkpoint's file.

    Raises:
        CheckpointError: the file is missing, cannot be read, or holds something else; names it.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; is {path.parent} the directory of a checkpoint?") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); download or write it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; a JSON object was expected.")
    return content
