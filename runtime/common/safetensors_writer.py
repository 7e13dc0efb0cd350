"""Write a safetensors file atomically."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from runtime.common.files import naming, partial_path, publish_file, scratch_directory

_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write `tensors` to `path`; after a crash the file is complete or absent.

    The safetensors library writes to a temporary file with a random name beside its target. So the target is in a
    temporary directory, which the next run finds and removes if this one is killed.

    Raises:
        OSError: the file cannot be written.
    """
    directory = partial_path(path)
    file = directory / path.name
    with naming(path), scratch_directory(directory):
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata)
        except SafetensorError as error:  # also for a full disk
            found = _OS_ERROR.search(str(error))
            number, text = (int(found[1]), os.strerror(int(found[1]))) if found else (errno.EIO, str(error))
            raise OSError(number, text, str(path)) from error
        publish_file(file, path)
