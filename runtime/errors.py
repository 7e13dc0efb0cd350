"""What a user can cause and mend. Anything else that goes wrong is ours and stays a traceback.

A message states the fault, the value found, and the remedy, in that order; commands print it
after ``error:`` and exit with status 2.
"""

import errno

MENDABLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)
"""Numbers of the OSErrors that a user can mend."""


_REMEDIES = {
    errno.ENOSPC: "free some, or choose another place",
    errno.EDQUOT: "free some, or choose another place",
    errno.EIO: "see whether the disk is sound, or choose another place",
}


class KitError(Exception):
    """Base of every fault that a user can mend."""


class CheckpointError(KitError):
    """A checkpoint that is missing, damaged, or not a WorldPM-style reward model."""


class ConversationError(KitError):
    """A conversation, or a file of them, that cannot be scored as it stands."""


class PlanError(KitError):
    """Work that does not fit the machine or contradicts its own arguments."""


class JobError(KitError):
    """A job, of quantizing or of scoring, that cannot start, go on, or be resumed."""


class LostJobError(JobError):
    """A job that resuming does not mend."""


class NonFiniteError(KitError):
    """A NaN or an infinity, with the tensor, block or conversation that first showed it.

    Attributes:
        block: index of that block, where one did.
    """

    block: int | None = None


def printable(text: str) -> str:
    """A message as any output can hold it: names of files and fields may have bytes that are no UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def in_words(error: OSError) -> str:
    """The file, what the system says of it, and the remedy, of one of the MENDABLE."""
    place = f"{error.filename}: " if error.filename else ""
    remedy = _REMEDIES.get(error.errno or 0, "change who may read and write there, or choose another place")
    return f"{place}{(error.strerror or str(error)).lower()}; {remedy}."
