"""Finished stages of a run where its workers find them: a folder or an object store, by fsspec."""

import json
from pathlib import Path, PurePosixPath

from fsspec.implementations.local import LocalFileSystem

from deploypipe.errors import RunFolderError
from deploypipe.files.object_stores import open_store
from deploypipe.text.safe_names import name_problem


def upload_stage(at: Path, url: str) -> None:
    """Copy a finished stage, as it lies in the run folder, unless it is there; its record last."""
    record = at.with_name(f"{at.name}.json")
    with open_store(url, RunFolderError) as (store, root):
        if store.exists(f"{root}/{record.name}"):
            return
        for path in sorted(p for p in at.rglob("*") if p.is_file()):
            there = f"{root}/{at.name}/{path.relative_to(at).as_posix()}"
            if isinstance(store, LocalFileSystem):  # object stores have no folders, and would make a bucket
                Path(there).parent.mkdir(parents=True, exist_ok=True)
            store.put_file(str(path), there)
        store.put_file(str(record), f"{root}/{record.name}")


def download_stage(key: str, url: str, folder: Path) -> Path | None:
    """Copy the stage of that key (`stage-HASH`) into `folder`, its record last; where it is, or None where nobody
    finished it. What was copied is not yet checked against its record."""
    with open_store(url, RunFolderError) as (store, root):
        found = sorted(store.glob(f"{root}/[0-9][0-9]-{key}.json"))
        if not found:
            return None
        content = store.cat_file(found[0])
        at = folder / PurePosixPath(found[0]).stem
        for name in _files_of(content, found[0]):
            (at / name).parent.mkdir(parents=True, exist_ok=True)
            store.get_file(f"{root}/{at.name}/{name}", str(at / name))
        at.mkdir(exist_ok=True)
        at.with_name(f"{at.name}.json").write_bytes(content)
        return at


def _files_of(record: bytes, name: str) -> list[str]:
    try:
        files = [str(file) for file in json.loads(record)["files"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise RunFolderError(
            f"{name}: is not the record of a stage; delete it, and repeat the run that made it"
        ) from None
    if any(name_problem(part) for file in files for part in file.split("/")):
        raise RunFolderError(f"{name}: names files outside of its folder; do not use this location")
    return files
