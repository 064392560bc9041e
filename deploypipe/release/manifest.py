"""What a bundle holds, to the byte: `manifest.json`."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from deploypipe.errors import BundleError, ConfigError
from deploypipe.files.atomic import write_atomically
from deploypipe.files.hashing import file_sha256
from deploypipe.files.json_records import from_json
from deploypipe.records import FileEntry
from deploypipe.text.safe_names import MAX_NAME_BYTES, name_problem
from deploypipe.verification.golden_file import shown

MANIFEST, SIGNATURE = "manifest.json", "signature.json"
FORMAT = "deploypipe-bundle-1"
MAX_VERSION = 999_999_999
_MAX_BYTES = 2**24
_SHOWN_DIGITS = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    format: str
    name: str  # pipeline and target: bundles of one name are versions of one another
    files: tuple[FileEntry, ...]  # all but this file and the signature, sorted by name
    digest: str  # sha256 of the above: what the bundle is known by

    @property
    def tag(self) -> str:
        """The digest, as short as people want it."""
        return self.digest[:_SHOWN_DIGITS]

    @property
    def folder(self) -> str:
        """What the bundle's folder is called."""
        return f"{self.name}-{self.tag}"


def write_manifest(folder: Path, name: str) -> Manifest:
    """Of all files in `folder`, which has no folders in it."""
    entries = [
        FileEntry(name=path.name, sha256=file_sha256(path), size_bytes=path.stat().st_size)
        for path in sorted(folder.iterdir())
        if path.name not in (MANIFEST, SIGNATURE)
    ]
    manifest = Manifest(format=FORMAT, name=name, files=tuple(entries), digest=_digest(name, entries))
    write_atomically(folder / MANIFEST, _as_bytes(manifest))
    return manifest


def check_manifest(folder: Path) -> Manifest:
    """Every file is what the manifest says, and there is no other. Nothing but the manifest is parsed.

    BundleError names the first file that differs. Who can change a file can change the manifest too: against that, only
    a signature helps (`signing`).
    """
    manifest = read_manifest(folder)
    wanted = {entry.name: entry for entry in manifest.files}
    found = {path.name for path in folder.iterdir()} - {MANIFEST, SIGNATURE}
    if odd := sorted(found ^ wanted.keys()):
        problem = "is not in the manifest" if odd[0] in found else "is missing"
        raise BundleError(f"{folder / odd[0]}: {problem} ({shown(odd)}); copy the bundle again from where it was built")
    for entry in manifest.files:
        path = folder / entry.name
        if path.is_symlink() or not path.is_file():
            raise BundleError(f"{path}: is no plain file; copy the bundle again from where it was built")
        if path.stat().st_size != entry.size_bytes or file_sha256(path) != entry.sha256:
            raise BundleError(f"{path}: was changed (its hash is not the manifest's); copy the bundle again")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest alone, which fits its own digest; whether the files are what it says is for `check_manifest`."""
    path = folder / MANIFEST
    try:
        if path.exists() and not path.is_file():  # a pipe, say, that would be waited for
            raise BundleError(f"{path}: is no plain file; copy the bundle again from where it was built")
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with open(handle, "rb") as stream:
            content = stream.read(_MAX_BYTES + 1)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror}); give a folder of `deploypipe release`") from None
    if len(content) > _MAX_BYTES:
        raise BundleError(f"{path}: is larger than {_MAX_BYTES:,} bytes; copy the bundle again")
    try:
        manifest = from_json(Manifest, content, str(path))
    except ConfigError as error:
        raise BundleError(f"{error}; copy the bundle again") from None
    if manifest.format != FORMAT:
        raise BundleError(f"{path}: format {manifest.format!r} is not {FORMAT!r}; release the run again")
    if manifest.digest != _digest(manifest.name, manifest.files) or content != _as_bytes(manifest):
        raise BundleError(f"{path}: was changed (it does not have its own digest); copy the bundle again")
    for name in (manifest.name, *(entry.name for entry in manifest.files)):
        if problem := name_problem(name, max_bytes=2 * MAX_NAME_BYTES + 1):  # a bundle is named pipeline-target
            raise BundleError(f"{path}: the name {problem.partition('; ')[0]}; do not use this bundle")
    return manifest


def version_number(text: str) -> int | None:
    """What a registry calls a version; None where it is not a plain number from 1 to MAX_VERSION."""
    is_plain = text.isascii() and text.isdecimal() and not text.startswith("0") and len(text) < 10
    return int(text) if is_plain else None


def _digest(name: str, entries: Sequence[FileEntry]) -> str:
    content = {"format": FORMAT, "name": name, "files": [asdict(entry) for entry in entries]}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _as_bytes(manifest: Manifest) -> bytes:
    return (json.dumps(asdict(manifest), indent=1, sort_keys=True) + "\n").encode()
