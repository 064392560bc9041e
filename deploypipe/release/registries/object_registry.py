"""A registry in an object store (S3, GCS, Azure, ...), through fsspec.

Layout: ROOT/NAME/bundles/DIGEST/*, ROOT/NAME/versions/NUMBER with a digest, ROOT/NAME/aliases/ALIAS with a number. Each
small object is written in one request. A bundle's manifest is uploaded after its other files, then its version, and the
alias last: an interrupted promotion publishes nothing.
"""

import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from deploypipe.errors import BundleError, NoVersionError
from deploypipe.files.object_stores import open_store
from deploypipe.release.manifest import MANIFEST, Manifest, version_number
from deploypipe.text.masked_addresses import masked
from deploypipe.text.safe_names import name_problem

_MAX_BYTES = 128  # of an alias or a version
_DEAD_AFTER = timedelta(days=1)  # an upload whose last file is older was interrupted


def promote(bundle: Path, manifest: Manifest, root: str, alias: str) -> int:
    """Upload the bundle unless it is there, and point `alias` to its version. BundleError if the store refuses."""
    with open_store(root, BundleError) as (store, path):
        home = f"{path}/{manifest.name}"
        versions = _versions(store, home)
        _remove_leftovers(store, home, {manifest.digest, *versions.values()})
        known = [number for number, digest in versions.items() if digest == manifest.digest]
        if not known:
            _upload(store, bundle, f"{home}/bundles/{manifest.digest}")
        number = min(known) if known else _claim(store, home, manifest.digest, max(versions, default=0) + 1)
        store.pipe_file(f"{home}/aliases/{alias}", str(number).encode())
        return number


def download(address: str, alias: str, folder: Path) -> tuple[Path, str]:
    """Download the bundle of ROOT/NAME and an alias to a new folder inside `folder`; return it and its digest.

    NoVersionError if there is none, BundleError if the store refuses.
    """
    with open_store(address, BundleError) as (store, home):
        try:
            content = store.cat_file(f"{home}/aliases/{alias}", start=0, end=_MAX_BYTES)
        except FileNotFoundError:
            raise NoVersionError(
                f"{masked(address)}@{alias}: there is no alias {alias!r}; set it with `deploypipe promote`"
            ) from None
        number = version_number(content.decode("ascii", "replace"))
        if number is None:
            raise BundleError(
                f"{masked(address)}@{alias}: the alias holds {content[:40]!a}, which is not a version number; "
                "promote again"
            )
        try:
            digest = _digest(store, f"{home}/versions/{number}")
        except FileNotFoundError:
            raise BundleError(
                f"{masked(address)}@{alias}: points to version {number}, which is gone; promote another one"
            ) from None
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise BundleError(f"{masked(address)}@{alias}: version {number} holds no digest; promote another one")
        local = folder / "bundle"
        local.mkdir()
        for remote in store.find(f"{home}/bundles/{digest}", maxdepth=1):
            name = remote.rpartition("/")[2]
            if problem := name_problem(name):
                raise BundleError(f"{masked(address)}@{alias}: holds a file whose name {problem}; promote again")
            store.get_file(remote, str(local / name))
        return local, digest


def _versions(store: Any, home: str) -> dict[int, str]:
    try:
        found = store.ls(f"{home}/versions", detail=False)
    except FileNotFoundError:
        return {}
    numbered = {number: at for at in found if (number := version_number(at.rstrip("/").rpartition("/")[2]))}
    return {number: _digest(store, at) for number, at in numbered.items()}


def _digest(store: Any, at: str) -> str:
    content = store.cat_file(at, start=0, end=_MAX_BYTES)
    if not re.fullmatch(rb"[0-9a-f]{64}", content):
        raise BundleError(f"{at}: holds {content[:40]!a}, which is not a digest; delete it and promote again")
    return str(content.decode())


def _remove_leftovers(store: Any, home: str, promoted: Iterable[str]) -> None:
    """Delete interrupted uploads without a version, if their last file is over a day old: others may be uploading."""
    found = store.find(f"{home}/bundles", detail=True)
    folders: dict[str, list[str]] = {}
    for at in found:
        folders.setdefault(at.removeprefix(f"{home}/bundles/").partition("/")[0], []).append(at)
    for digest in folders.keys() - set(promoted):
        newest = max(store.modified(at) for at in folders[digest])
        if datetime.now(UTC) - newest > _DEAD_AFTER:
            for at in folders[digest]:
                store.rm_file(at)


def _upload(store: Any, bundle: Path, there: str) -> None:
    for path in sorted(bundle.iterdir(), key=lambda path: (path.name == MANIFEST, path.name)):
        store.put_file(str(path), f"{there}/{path.name}")


def _claim(store: Any, home: str, digest: str, number: int) -> int:
    """Take the first free version number from `number` on. S3, GCS and Azure create an object only if it does not
    exist, in one request."""
    while True:
        try:
            store.pipe_file(f"{home}/versions/{number}", digest.encode(), mode="create")
            return number
        except FileExistsError:
            number += 1
