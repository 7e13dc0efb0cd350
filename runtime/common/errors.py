"""Errors that the user can fix. Any other exception is a bug in this project and keeps its traceback.

A message states what is wrong, the value found and the remedy, in that order. Commands print it after ``error:`` and
exit with status 2.
"""

import errno
import os
import reprlib

USER_FIXABLE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)
"""OSError numbers that the user can fix."""

_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother, _BRIEF.maxlong = 3, 100, 100, 60

_REMEDIES = {
    errno.ENOSPC: "free some space{disk}, or use another disk",
    errno.EDQUOT: "free some space{disk}, or use another disk",
    errno.EIO: "check the disk{disk}, or use another one",
}


LONGEST_MESSAGE = 1000
"""Characters of a message."""


class KitError(Exception):
    """Base class of the errors that the user can fix.

    A message quotes names and values of files that are not trusted. So what cannot be printed becomes an escape, and
    the middle of a message above `LONGEST_MESSAGE` is left out: its ends name the file and the remedy.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(presentable(message))


class CheckpointError(KitError):
    """A checkpoint is missing, damaged, or not a WorldPM-style reward model."""


class ConversationError(KitError):
    """A conversation, or a file of conversations, cannot be scored as it is."""


class ConfigurationError(KitError):
    """Options contradict each other, or the work does not fit the machine."""


class JobError(KitError):
    """A quantization or scoring job cannot start, continue or resume."""


class UnresumableJobError(JobError):
    """A job that cannot be resumed."""


class NonFiniteError(KitError):
    """A NaN or an infinity; the message names the first tensor, block or conversation that has it.

    Attributes:
        block: index of the block, or None if it did not come from a block.
    """

    block: int | None = None


def brief(value: object) -> str:
    """The `repr` of a value for a message, bounded in length and depth, for any content of a file."""
    return _BRIEF.repr(value)


def in_conversation(error: KitError, number: int) -> KitError:
    """The same error, as that of conversation `number` of a call."""
    named = type(error)(f"conversation {number}: {error}")
    named.__dict__.update(error.__dict__)
    return named


def presentable(message: str) -> str:
    """Return a message with escapes for what is not printable, cut in the middle to `LONGEST_MESSAGE`."""
    if not message.isprintable():
        message = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in message)
    if len(message) > LONGEST_MESSAGE:
        message = f"{message[: LONGEST_MESSAGE - 300]} [...] {message[-250:]}"
    return message


def printable(text: str) -> str:
    """Return `text` with characters that UTF-8 cannot encode, such as surrogates in file names, as escapes."""
    return text.encode(errors="backslashreplace").decode()


def describe_os_error(error: OSError) -> str:
    """Return the file, the system's message and the remedy for an error in `USER_FIXABLE_ERRNOS`."""
    prefix = f"{error.filename}: " if error.filename else ""
    problem = (error.strerror or str(error)).lower()
    return f"{prefix}{problem}; {remedy(error, 'change its permissions, or use another path')}."


def remedy(error: OSError, otherwise: str) -> str:
    """What to do about an error, with the disk that is full or fails; `otherwise` for errors of another kind."""
    if error.errno not in _REMEDIES:
        return otherwise
    path = error.filename if isinstance(error.filename, str) else ""
    named = os.path.exists(path) or os.sep in path  # not "standard output"
    return _REMEDIES[error.errno].format(disk=f" on {_mount_point(path)}" if named else "")


def _mount_point(path: str) -> str:
    """The directory where the disk of `path` is mounted."""
    path = os.path.realpath(path)
    while not os.path.ismount(path):
        path = os.path.dirname(path)
    return path


def summarize_error(error: BaseException) -> str:
    """The type and the first line of an error of a library, for a message of ours."""
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
