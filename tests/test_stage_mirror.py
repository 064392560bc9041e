"""Stages that come from elsewhere."""

import json
from pathlib import Path

import pytest

from deploypipe.errors import RunFolderError
from deploypipe.runs.stage_mirror import download_stage, upload_stage


def finished(folder: Path) -> Path:
    at = folder / "03-observe-0123"
    (at / "deep").mkdir(parents=True)
    (at / "deep" / "moments.bin").write_bytes(b"numbers")
    at.with_name(f"{at.name}.json").write_text(json.dumps({"files": {"deep/moments.bin": "hash"}}))
    return at


def test_a_stage_is_found_by_its_key(tmp_path: Path) -> None:
    upload_stage(finished(tmp_path / "run"), str(tmp_path / "there"))
    (tmp_path / "here").mkdir()
    assert download_stage("observe-4567", str(tmp_path / "there"), tmp_path / "here") is None
    found = download_stage("observe-0123", str(tmp_path / "there"), tmp_path / "here")
    assert found and (found / "deep" / "moments.bin").read_bytes() == b"numbers"


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"files": {"../../stolen": "hash"}}, "names files outside of its folder"),
        ({"files": {"/etc/passwd": "hash"}}, "names files outside of its folder"),
        ({"files": {"deep/.hidden": "hash"}}, "names files outside of its folder"),
        ({"files": {"a\0b": "hash"}}, "names files outside of its folder"),
        ({"record": 1}, "is not the record of a stage"),
    ],
)
def test_a_record_that_leads_elsewhere_is_refused(record: object, told: str, tmp_path: Path) -> None:
    at = finished(tmp_path / "there")
    at.with_name(f"{at.name}.json").write_text(json.dumps(record))
    (tmp_path / "here").mkdir()
    with pytest.raises(RunFolderError, match=told):
        download_stage("observe-0123", str(tmp_path / "there"), tmp_path / "here")
    assert list((tmp_path / "here").iterdir()) == []
