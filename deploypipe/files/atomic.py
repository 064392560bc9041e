"""Write files that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


def place_file(source: Path, path: Path) -> None:
    """Give a file a second, stable name, atomically: a hard link if the file system has them, else a copy."""
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    try:
        os.link(source, part)
    except OSError:
        shutil.copyfile(source, part)
    part.replace(path)
    part.unlink(missing_ok=True)  # replace() does nothing if both names are of one file


def write_atomically(path: Path, content: bytes) -> None:
    """Write and flush a file next to `path`, then rename it: readers see the old content or the new, never a part.

    A device or stream (/dev/stdout) is written to directly.
    """
    if _is_stream(path):
        path.write_bytes(content)
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # other processes may write the same file
    try:
        with part.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """A folder next to `out`, removed afterwards: a file that is written there can be moved to `out` at once."""
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        yield Path(folder)


def _is_stream(path: Path) -> bool:
    is_in_dev = path.is_absolute() and path.parts[1:2] == ("dev",)
    return path.is_char_device() or (is_in_dev and path.is_symlink())


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
