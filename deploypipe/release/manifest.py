"""`manifest.json`: name, hash and size of every file of a bundle."""

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
from deploypipe.verification.golden_json import shown

MANIFEST, SIGNATURE = "manifest.json", "signature.json"
FORMAT = "deploypipe-bundle-1"
MAX_VERSION = 999_999_999
_MAX_BYTES = 2**24
_SHOWN_DIGITS = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    format: str
    name: str  # pipeline and target: bundles of one name are versions of each other
    files: tuple[FileEntry, ...]  # all except this file and the signature, sorted by name
    digest: str  # sha256 of the above; identifies the bundle

    @property
    def tag(self) -> str:
        """The first 12 digits of the digest."""
        return self.digest[:_SHOWN_DIGITS]

    @property
    def folder(self) -> str:
        """The name of the bundle's folder."""
        return f"{self.name}-{self.tag}"


def write_manifest(folder: Path, name: str) -> Manifest:
    """Write the manifest of all files in `folder`, which must have no folders in it."""
    entries = [
        FileEntry(name=path.name, sha256=file_sha256(path), size_bytes=path.stat().st_size)
        for path in sorted(folder.iterdir())
        if path.name not in (MANIFEST, SIGNATURE)
    ]
    manifest = Manifest(format=FORMAT, name=name, files=tuple(entries), digest=_digest(name, entries))
    write_atomically(folder / MANIFEST, _as_bytes(manifest))
    return manifest


def check_manifest(folder: Path) -> Manifest:
    """Check that every file matches the manifest and that there are no others. Only the manifest is parsed.

    BundleError names the first file that differs. An attacker who can change a file can change the manifest too; only a
    signature protects against that (`signing`).
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
            raise BundleError(f"{path}: is not a plain file; copy the bundle again from where it was built")
        if path.stat().st_size != entry.size_bytes or file_sha256(path) != entry.sha256:
            raise BundleError(f"{path}: was changed (its hash differs from the manifest's); copy the bundle again")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest and check it against its own digest. `check_manifest` also checks the files."""
    path = folder / MANIFEST
    try:
        if path.exists() and not path.is_file():  # reading a pipe, for example, would wait
            raise BundleError(f"{path}: is not a plain file; copy the bundle again from where it was built")
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
        raise BundleError(f"{path}: was changed (its digest does not fit); copy the bundle again")
    for name in (manifest.name, *(entry.name for entry in manifest.files)):
        if problem := name_problem(name, max_bytes=2 * MAX_NAME_BYTES + 1):  # a bundle is named pipeline-target
            raise BundleError(f"{path}: the name {problem.partition('; ')[0]}; do not use this bundle")
    return manifest


def version_number(text: str) -> int | None:
    """The number of a registry's version; None if the text is not a plain number from 1 to MAX_VERSION."""
    is_plain = text.isascii() and text.isdecimal() and not text.startswith("0") and len(text) < 10
    return int(text) if is_plain else None


def _digest(name: str, entries: Sequence[FileEntry]) -> str:
    content = {"format": FORMAT, "name": name, "files": [asdict(entry) for entry in entries]}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _as_bytes(manifest: Manifest) -> bytes:
    return (json.dumps(asdict(manifest), indent=1, sort_keys=True) + "\n").encode()
