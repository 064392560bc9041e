"""A registry that somebody else can write to: odd files are errors, and a bundle is of the name asked for."""

import json
import os
import shutil
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import fsspec
import pytest
from releasable_run import write_run
from typer.testing import CliRunner

from deploypipe.cli import app
from deploypipe.errors import BundleError
from deploypipe.release.bundle import make_bundle
from deploypipe.release.manifest import MANIFEST, check_manifest
from deploypipe.release.registries import object_registry
from deploypipe.release.registries.registry import promote, resolve

NAME = "digits-x86_cpu"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released")
    write_run(folder / "run")
    return make_bundle(folder / "run", folder / "bundles")


@pytest.fixture
def registry(bundle: Path, tmp_path: Path) -> Path:
    promote(bundle, str(tmp_path / "registry"), "production")
    return tmp_path / "registry"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b'{"production": 1e999}', id="infinite"),
        pytest.param(b'{"production": NaN}', id="NaN"),
        pytest.param(b'{"production": null}', id="null"),
        pytest.param(b'{"production": true}', id="bool"),
        pytest.param(b'{"production": 1.0}', id="float"),
        pytest.param(b'{"production": "1"}', id="text"),
        pytest.param(b'{"production": -1}', id="negative"),
        pytest.param(b'{"production": 0}', id="zero"),
        pytest.param(b'{"production": [1]}', id="list"),
        pytest.param(b'{"production": ' + b"9" * 5000 + b"}", id="digits"),
        pytest.param(b'{"production": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", id="deep"),
        pytest.param(b'{"production": 1, "production": 1}', id="twice"),
        pytest.param(b'{"\\u001b[2J": 1, "production": 1}', id="escape"),
        pytest.param(b'{"../../x": 1, "production": 1}', id="path"),
        pytest.param(b'{"\\ud800": 1, "production": 1}', id="surrogate"),
        pytest.param(b"[1]", id="no object"),
        pytest.param(b"\xff\xfe", id="bytes"),
        pytest.param(b"", id="empty"),
        pytest.param(b'{"production": 1}' + b" " * 2**21, id="huge"),
    ],
)
def test_an_odd_file_of_aliases_is_an_error(content: bytes, registry: Path, bundle: Path) -> None:
    (registry / NAME / "aliases.json").write_bytes(content)
    done = CliRunner().invoke(app, ["verify", f"{registry}/{NAME}@production"])
    assert done.exit_code == 2
    [line] = done.stderr.splitlines()
    assert "aliases.json: not understood" in line and "promote again" in line and len(line) < 500
    with pytest.raises(BundleError, match="not understood"):
        promote(bundle, str(registry), "production")


def test_a_promotion_writes_nothing_outside(bundle: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for kind in ("link", "pipe"):
        home = tmp_path / kind / NAME
        home.mkdir(parents=True)
        (home / ".lock").symlink_to(precious) if kind == "link" else os.mkfifo(home / ".lock")
        with pytest.raises(BundleError, match=r"\.lock: is not a plain file"):
            promote(bundle, str(home.parent), "production")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "registry").mkdir()
    (tmp_path / "registry" / NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="is a link"):
        promote(bundle, str(tmp_path / "registry"), "production")
    with pytest.raises(BundleError, match="models: alone"):
        promote(bundle, "models:/x", "production")
    assert precious.read_text() == "mine" and not list((tmp_path / "elsewhere").iterdir())


def test_odd_neighbours_are_not_versions(registry: Path) -> None:
    for name in ("007", "-1", "\u0663", "9" * 30, "x"):
        (registry / NAME / name).mkdir()
    (registry / NAME / "2").write_text("a file")
    assert check_manifest(resolve(f"{registry}/{NAME}@production"))


def test_a_bundle_of_another_name_is_refused(registry: Path, tmp_path: Path) -> None:
    """Sound and perhaps signed, but of another product: who can write to the registry put it there."""
    (tmp_path / "registry" / NAME).rename(tmp_path / "registry" / "faces-x86_cpu")
    with pytest.raises(BundleError, match=f"points to a bundle of '{NAME}', not of 'faces-x86_cpu'"):
        resolve(f"{registry}/faces-x86_cpu@production")


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from deploypipe.release.registries.registry import promote
whole = {shutil: shutil.copytree, Path: Path.replace}
def die(*arguments, **options):
    if WHERE is shutil:
        whole[shutil](*arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(WHERE, "NAME", die)
promote(Path(sys.argv[1]), sys.argv[2], "production")
"""


@pytest.mark.parametrize(("where", "name"), [("shutil", "copytree"), ("Path", "replace")])
def test_a_killed_promotion_leaves_nothing_for_ever(where: str, name: str, bundle: Path, tmp_path: Path) -> None:
    registry, home = tmp_path / "registry", tmp_path / "registry" / NAME
    code = KILLED.replace("WHERE", where).replace("NAME", name)
    killed = subprocess.run([sys.executable, "-c", code, str(bundle), str(registry)], capture_output=True, timeout=100)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = {path.name for path in home.iterdir()} - {".lock", "1"}
    assert len(left) == 1 and next(iter(left)).startswith("."), left
    assert promote(bundle, str(registry), "production") == 1
    assert {path.name for path in home.iterdir()} == {".lock", "1", "aliases.json"}


@pytest.fixture
def store(bundle: Path) -> str:
    """A registry in fsspec's store in memory."""
    fsspec.filesystem("memory").rm("/registry", recursive=True) if fsspec.filesystem("memory").exists(
        "/registry"
    ) else None
    promote(bundle, "memory://registry", "production")
    return "memory://registry"


@pytest.mark.parametrize(
    ("at", "content", "said"),
    [
        ("aliases/production", b"1e999", "not a version number"),
        ("aliases/production", b"9" * 10_000, "not a version number"),
        ("aliases/production", b"\xff\x1b[2J", "not a version number"),
        ("aliases/production", b"0", "not a version number"),
        ("versions/1", b"../../other", "not a digest"),
        ("versions/1", b"", "not a digest"),
    ],
)
def test_odd_objects_of_a_store(
    at: str, content: bytes, said: str, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEPLOYPIPE_CACHE", str(tmp_path))
    fsspec.filesystem("memory").pipe_file(f"/registry/{NAME}/{at}", content)
    with pytest.raises(BundleError, match=said) as caught:
        resolve(f"{store}/{NAME}@production")
    assert len(str(caught.value)) < 300


def test_a_stores_uploads_that_broke_off_are_removed_once_they_are_old(
    bundle: Path, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, home = fsspec.filesystem("memory"), f"/registry/{NAME}"
    memory.pipe_file(f"{home}/bundles/{'a' * 64}/model.onnx", b"part of a bundle")
    promote(bundle, store, "production")
    assert memory.exists(f"{home}/bundles/{'a' * 64}/model.onnx")  # somebody may be at it
    monkeypatch.setattr(object_registry, "_DEAD_AFTER", timedelta(0))
    promote(bundle, store, "staging")
    [left] = memory.ls(f"{home}/bundles", detail=False)
    assert left.endswith(check_manifest(bundle).digest)
    monkeypatch.setenv("DEPLOYPIPE_CACHE", str(tmp_path))
    (tmp_path / "bundles" / ".download.killed").mkdir(parents=True)
    assert check_manifest(resolve(f"{store}/{NAME}@staging"))
    assert not (tmp_path / "bundles" / ".download.killed").exists()


def test_a_damaged_bundle_in_the_cache_is_downloaded_again(
    bundle: Path, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEPLOYPIPE_CACHE", str(tmp_path))
    model = resolve(f"{store}/{NAME}@production") / "model.onnx"
    model.write_bytes(b"damaged")
    assert (resolve(f"{store}/{NAME}@production") / "model.onnx").read_bytes() == (bundle / "model.onnx").read_bytes()


def test_a_stores_bundle_of_another_name_is_refused(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEPLOYPIPE_CACHE", str(tmp_path))
    fsspec.filesystem("memory").mv(f"/registry/{NAME}", "/registry/faces-x86_cpu", recursive=True)
    with pytest.raises(BundleError, match=f"points to a bundle of '{NAME}', not of 'faces-x86_cpu'"):
        resolve(f"{store}/faces-x86_cpu@production")


def test_names_in_a_manifest_are_plain(bundle: Path, tmp_path: Path) -> None:
    from deploypipe.records import FileEntry
    from deploypipe.release.manifest import _digest, read_manifest

    for name in ("a\nb", "a\x1b[2J", "a\u202eb", "../a", "a/b", ""):
        folder = tmp_path / "bundle"
        shutil.copytree(bundle, folder, dirs_exist_ok=True)
        plain = json.loads((folder / MANIFEST).read_text())
        plain["files"][0]["name"] = name
        plain["digest"] = _digest(plain["name"], [FileEntry(**entry) for entry in plain["files"]])
        (folder / MANIFEST).write_text(json.dumps(plain, indent=1, sort_keys=True) + "\n")
        with pytest.raises(BundleError) as caught:
            read_manifest(folder)
        assert "name" in str(caught.value) and str(caught.value).isprintable()
