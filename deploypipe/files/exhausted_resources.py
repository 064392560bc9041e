"""Recognise errors of a machine that has run out of disk, memory, open files or threads, as opposed to bugs.

Libraries wrap the system's errors in their own, so they are recognised by error number or by text.
"""

import errno
from collections.abc import Iterator

from deploypipe.errors import DeploypipeError, ExhaustedError

_MEMORY = ("out of memory", "end other programs, use smaller batches, or use a machine with more memory")
_ROOM = ("the disk is full", "free some space")
_FILES = ("too many files are open", "allow more with `ulimit -n 65536`")
_LARGE = (
    "a file would be larger than this system allows",
    "allow it with `ulimit -f unlimited`",
)
_WRITE = ("the disk is read-only", "make it writable")
_DEVICE = ("the disk reports an error", "check it with the system's tools, or use another one")
_THREADS = ("no more threads or processes can be started", "allow more with `ulimit -u unlimited`")
_BY_NUMBER = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: _LARGE,
    errno.ENOMEM: _MEMORY,
    errno.EMFILE: _FILES,
    errno.ENFILE: _FILES,
    errno.EROFS: _WRITE,
    errno.EIO: _DEVICE,
}
_BY_WORDS = (  # of torch, safetensors, onnxruntime, protobuf, SQLite and Python's own
    ("No space left on device", _ROOM),
    ("os error 28", _ROOM),
    ("database or disk is full", _ROOM),
    ("PytorchStreamWriter failed writing", _ROOM),
    ("unexpected pos", _ROOM),  # the same
    ("Disk quota exceeded", _ROOM),
    ("File too large", _LARGE),
    ("os error 27", _LARGE),
    ("Too many open files", _FILES),
    ("os error 24", _FILES),
    ("Read-only file system", _WRITE),
    ("can't allocate memory", _MEMORY),
    ("not enough memory", _MEMORY),
    ("out of memory", _MEMORY),
    ("std::bad_alloc", _MEMORY),
    ("bad allocation", _MEMORY),
    ("Failed to allocate memory", _MEMORY),
    ("Cannot allocate memory", _MEMORY),
    ("failed to map segment", _MEMORY),  # of a library
    ("can't start new thread", _THREADS),
)
_MAX_CAUSES = 8


def find_exhaustion(error: BaseException) -> tuple[str, str] | None:
    """(problem, remedy) if the error, or a cause of it, says that the machine has run out of something."""
    for cause in _causes(error):
        if isinstance(cause, MemoryError):
            return _MEMORY
        if isinstance(cause, OSError) and cause.errno in _BY_NUMBER:
            problem, remedy = _BY_NUMBER[cause.errno]
            return (f"{cause.filename}: {problem}" if cause.filename else problem), remedy
        text = "" if isinstance(cause, DeploypipeError) else str(cause)
        for words, found in _BY_WORDS:
            if words in text:
                return found
    return None


def raise_if_exhausted(error: BaseException) -> None:
    """Raise ExhaustedError if the machine has run out of something. For handlers that treat errors as results."""
    if isinstance(error, ExhaustedError):
        raise error
    if found := find_exhaustion(error):
        raise ExhaustedError("; ".join(found)) from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes, at most 8."""
    cause: BaseException | None = error
    for _ in range(_MAX_CAUSES):
        if cause is None:
            return
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
