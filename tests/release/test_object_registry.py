"""A registry in an object store: what breaks off, and what happens at once."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from releasable_run import write_run
from s3_server import Store

from deploypipe.errors import BundleError
from deploypipe.release.bundle import make_bundle
from deploypipe.release.manifest import check_manifest
from deploypipe.release.registries.registry import promote, resolve

NAME = "digits-x86_cpu"


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    made = Store()
    yield made
    made.stop()


@pytest.fixture
def root(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("DEPLOYPIPE_CACHE", str(tmp_path / "cache"))
    yield f"{store.new_bucket(monkeypatch)}/registry"
    store.before_put = None


def bundle_of(folder: Path, seed: int) -> Path:
    write_run(folder / f"run-{seed}", seed=seed)
    return make_bundle(folder / f"run-{seed}", folder / "bundles")


def test_versions_and_aliases(root: str, tmp_path: Path) -> None:
    first, second = (bundle_of(tmp_path, seed) for seed in (0, 1))
    assert [promote(bundle, root, "production") for bundle in (first, second, first)] == [1, 2, 1]
    assert promote(second, root, "staging") == 2
    found = resolve(f"{root}/{NAME}@production")
    assert {p.name: p.read_bytes() for p in found.iterdir()} == {p.name: p.read_bytes() for p in first.iterdir()}
    assert check_manifest(resolve(f"{root}/{NAME}@staging")).digest == check_manifest(second).digest
    with pytest.raises(BundleError, match="no alias 'nobody'"):
        resolve(f"{root}/{NAME}@nobody")


def test_what_breaks_off_publishes_nothing(root: str, store: Store, tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, 0)
    objects = len(list(bundle.iterdir())) + 2  # a version and an alias
    for good in range(objects):
        left = iter(range(good))

        def refuse_later(left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise PermissionError

        store.before_put = refuse_later
        with pytest.raises(BundleError, match="no more objects"):
            promote(bundle, root, "production")
        with pytest.raises(BundleError, match="no alias"):
            resolve(f"{root}/{NAME}@production")
    store.before_put = None
    assert promote(bundle, root, "production") == 1
    assert check_manifest(resolve(f"{root}/{NAME}@production"))


def test_promotions_at_once_take_different_versions(root: str, store: Store, tmp_path: Path) -> None:
    first, second = (bundle_of(tmp_path, seed) for seed in (0, 1))

    def promote_another() -> None:
        store.before_put = None
        assert promote(second, root, "production") == 1

    store.before_put = promote_another  # while the first one uploads, and after it has looked for a free number
    assert promote(first, root, "production") == 2
    assert check_manifest(resolve(f"{root}/{NAME}@production")).digest == check_manifest(first).digest


def test_a_version_that_is_gone(root: str, tmp_path: Path) -> None:
    promote(bundle_of(tmp_path, 0), root, "production")
    files, path = fsspec.url_to_fs(root)
    files.rm(f"{path}/{NAME}/versions/1")
    with pytest.raises(BundleError, match="version 1, which is gone"):
        resolve(f"{root}/{NAME}@production")


def test_what_was_changed_in_the_store_is_refused(root: str, tmp_path: Path) -> None:
    promote(bundle_of(tmp_path, 0), root, "production")
    files, path = fsspec.url_to_fs(root)
    [model] = [at for at in files.find(path) if at.endswith("model.onnx")]
    files.pipe_file(model, b"another model")
    with pytest.raises(BundleError, match="was changed"):
        resolve(f"{root}/{NAME}@production")


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("nowhere://ada:hunter2@bucket/registry", "Protocol not known: nowhere"),
        ("s3://ada:hunter2@bucket/registry?token=hunter2", r"Invalid bucket name \"\*\*\*@bucket\""),
        ("s3://no-such-bucket/registry", "bucket does not exist"),
    ],
)
def test_stores_that_cannot_be_used(address: str, reason: str, root: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=reason) as told:
        promote(bundle_of(tmp_path, 0), address, "production")
    assert "bucket/registry" in str(told.value) and "hunter2" not in str(told.value)


def test_a_file_address_is_a_folder(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, 0)
    assert promote(bundle, f"file://{tmp_path}/registry", "production") == 1
    assert resolve(f"file://{tmp_path}/registry/{NAME}@production") == resolve(f"{tmp_path}/registry/{NAME}@production")
