"""What the hub and the network refuse, in one sentence each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

from runtime.common.errors import USER_FIXABLE_ERRNOS, JobError, summarize_error

CONTINUE = "What was uploaded is kept; the same command continues."


@contextmanager
def explaining(repository: str) -> Iterator[None]:
    """Turn errors of the hub's client into a JobError that names the repository, the reason and the remedy."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno in USER_FIXABLE_ERRNOS:
            raise  # of this machine, such as a full disk
        if message := _explain(error, repository):
            raise JobError(message) from error
        raise


def _explain(error: Exception, repository: str) -> str:
    """The message; empty for an error that is not the hub's or the network's."""
    if isinstance(error, ValueError) and str(error).startswith("Invalid metadata"):
        reason = " ".join(str(error).split())
        return f"{repository}: the hub refuses the card ({reason}); correct README.md."
    chain: list[BaseException] = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    refused = next((each for each in chain if isinstance(each, HfHubHTTPError)), None)
    if refused is not None:
        return _explain_answer(refused, repository)
    kinds = (ConnectionError, TimeoutError)
    if any(isinstance(each, kinds) or type(each).__module__.startswith(("httpx", "httpcore")) for each in chain):
        return (
            f"{repository}: the hub at {constants.ENDPOINT} cannot be reached ({summarize_error(error)}); try again "
            f"when the network is up. {CONTINUE}"
        )
    if isinstance(error, (OSError, RuntimeError)):  # of the transfer: hf_xet and the LFS upload raise these
        return f"{repository}: the upload failed ({summarize_error(error)}). {CONTINUE}"
    return ""


def _explain_answer(error: HfHubHTTPError, repository: str) -> str:
    status = error.response.status_code
    reason = error.server_message or summarize_error(error)
    owner = repository.partition("/")[0]
    if status == 401:
        return (
            f"{repository}: the hub does not accept the token ({reason}); log in again with `hf auth login`, or "
            "correct HF_TOKEN."
        )
    if status in (403, 404):
        return (
            f"{repository}: the token may not write there ({reason}); take one with write access, or an OWNER other "
            f"than {owner}."
        )
    if status in (429, *range(500, 600)):
        return f"{repository}: the hub answered {status} ({reason}), also when asked again. {CONTINUE}"
    return f"{repository}: the hub refused with {status} ({reason})."
