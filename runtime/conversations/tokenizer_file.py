"""Read a checkpoint's tokenizer: `tokenizer.json`, or `vocab.json` and `merges.txt` with the rules of Qwen2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models

from runtime.common.errors import CheckpointError, brief
from runtime.common.json_object import read_json_object
from runtime.common.qwen2_tokenizer import set_qwen2_rules

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def read_tokenizer(directory: Path) -> Tokenizer:
    """Read the tokenizer of a checkpoint directory.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    file, vocabulary, merges = (directory / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    if file.is_file():
        return _read(lambda: Tokenizer.from_file(str(file)), file)
    if not (vocabulary.is_file() and merges.is_file()):
        raise CheckpointError(
            f"{file} is missing, and so are vocab.json and merges.txt; copy the tokenizer files of the original "
            "checkpoint there."
        )
    model = _read(lambda: models.BPE.from_file(str(vocabulary), str(merges)), vocabulary)
    tokenizer = Tokenizer(model)
    set_qwen2_rules(tokenizer)
    for index, token in sorted(_added_tokens(directory).items()):
        tokenizer.add_tokens([token])  # as special as the token itself says
        if tokenizer.token_to_id(token.content) != index:
            raise CheckpointError(
                f"{directory}: {brief(token.content)} has the id {index}, but the tokens of vocab.json end before "
                f"{tokenizer.token_to_id(token.content)}; copy the tokenizer files of the original checkpoint there."
            )
    return tokenizer


def _read(read: Callable[[], Any], file: Path) -> Any:
    try:
        return read()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception, and panics are no Exceptions
        raise CheckpointError(f"{file} cannot be read as a tokenizer: {error!s:.300}") from error


def _added_tokens(directory: Path) -> dict[int, AddedToken]:
    """Tokens beside the vocabulary, by id: from tokenizer_config.json, else from added_tokens.json."""
    config_file, file = directory / "tokenizer_config.json", directory / "added_tokens.json"
    config = read_json_object(config_file) if config_file.is_file() else {}
    try:
        if described := config.get("added_tokens_decoder"):
            return {
                int(index): AddedToken(each["content"], **{flag: bool(each.get(flag)) for flag in _FLAGS})
                for index, each in described.items()
            }
        stored = read_json_object(file) if file.is_file() else {}
        # added_tokens.json has no flags. The control tokens of the Qwen family, and only they, are written <|so|>.
        return {
            int(index): AddedToken(text, normalized=False, special=text.startswith("<|"))
            for text, index in stored.items()
        }
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{directory}: its added tokens have a value of the wrong type ({error}).") from error
