"""Hashes of records and files."""

import hashlib
import json
from pathlib import Path

from deploypipe.files.json_records import to_plain


def digest(value: object) -> str:
    """A short hash of any record or plain JSON value."""
    plain = json.dumps(value, sort_keys=True, default=to_plain)
    return hashlib.sha256(plain.encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
