"""A registry of bundles: numbered versions, and aliases such as "production" that point to one.

A registry is `models:` (the MLflow server that MLFLOW_TRACKING_URI names), an address in an object store (`s3://...`),
or a plain folder: FOLDER/NAME/VERSION/BUNDLE and FOLDER/NAME/aliases.json. A version appears whole or not at all, and
never changes.
"""

import fcntl
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from deploypipe.errors import BundleError, NoVersionError
from deploypipe.files.atomic import write_atomically
from deploypipe.files.cache_folder import cache_folder
from deploypipe.release.bundle import load_bundle
from deploypipe.release.manifest import MANIFEST, MAX_VERSION, Manifest, check_manifest, read_manifest, version_number
from deploypipe.text import strict_json
from deploypipe.text.masked_addresses import masked, masked_reference
from deploypipe.text.safe_names import MAX_NAME_BYTES, name_problem

_MLFLOW, _IN_STORE, _FOLDER = "models:", "://", "file://"
_ALIASES, _LOCK = "aliases.json", ".lock"
_MAX_BYTES = 2**20  # of the aliases


def promote(bundle: Path | str, registry: Path | str, alias: str) -> int:
    """Copy the bundle in, unless it is there, point `alias` to it, and return the number of its version.

    The same call again changes nothing. Raises BundleError if a file differs from the bundle's manifest, or if the
    server does not respond.
    """
    if problem := name_problem(alias):
        raise BundleError(f"the alias {problem}")
    bundle, registry = Path(bundle), str(registry).removeprefix(_FOLDER)
    manifest = check_manifest(bundle)
    if registry.rstrip("/") == _MLFLOW:
        from deploypipe.release.registries import mlflow_registry

        return mlflow_registry.promote(bundle, manifest, load_bundle(bundle), alias)
    if registry.startswith(_MLFLOW):
        raise BundleError(f"{masked(registry)}: is not a registry; write {_MLFLOW} alone, and set MLFLOW_TRACKING_URI")
    if _IN_STORE in registry:
        from deploypipe.release.registries import object_registry

        return object_registry.promote(bundle, manifest, registry, alias)
    home = Path(registry) / manifest.name
    if home.is_symlink():
        raise BundleError(f"{home}: is a link, which would put a version elsewhere; use a plain folder")
    with _locked(home):
        _remove_leftovers(home)
        number = _find(home, manifest.digest) or _add(home, bundle)
        aliases = {**_aliases(home), alias: number}
        write_atomically(home / _ALIASES, (strict_json.dumps(aliases, indent=1) + "\n").encode())
    return number


def resolve(reference: str) -> Path:
    """The bundle's folder for a reference: the folder itself, or REGISTRY/NAME@ALIAS.

    NoVersionError if the registry has no such alias, BundleError if there is no bundle. Bundles on a server are
    downloaded to the cache.
    """
    reference = reference.removeprefix(_FOLDER)
    path, _, alias = reference.rpartition("@")
    _check_names(reference, path, alias)
    if not path and is_remote(reference):
        raise BundleError(f"{masked(reference)}: has no alias; write it like {masked(reference)}@production")
    if path.startswith(_MLFLOW):
        from deploypipe.release.registries import mlflow_registry

        return _downloaded(mlflow_registry.download, path.removeprefix(_MLFLOW).strip("/"), alias)
    if _IN_STORE in path:
        from deploypipe.release.registries import object_registry

        return _downloaded(object_registry.download, path, alias)
    if not path or Path(reference).is_dir():
        if not (Path(reference) / MANIFEST).is_file():
            raise BundleError(f"{masked(reference)}: is not a bundle; give its folder, or REGISTRY/NAME@ALIAS")
        return Path(reference)
    home = Path(path)
    aliases = _aliases(home)
    if alias not in aliases:
        known = ", ".join(sorted(aliases)) or "none"
        raise NoVersionError(
            f"{masked_reference(reference)}: there is no alias {alias!r} (known: {known}); set it with "
            "`deploypipe promote`"
        )
    number, versions = aliases[alias], _versions(home)
    if number not in versions:
        raise BundleError(f"{reference}: points to version {number}, which is gone; promote another one")
    _require_name(read_manifest(versions[number]), home.resolve().name, reference)
    return versions[number]


def _check_names(reference: str, path: str, alias: str) -> None:
    """Raise BundleError for a registry's reference whose names could lead elsewhere in the registry."""
    if not path or Path(reference).is_dir():
        return
    bundle = path.removeprefix(_MLFLOW).strip("/") if path.startswith(_MLFLOW) else path.rstrip("/").rpartition("/")[2]
    shown = masked_reference(reference)
    for what, name in (("alias", alias), ("bundle", bundle)):
        if problem := name_problem(name, max_bytes=2 * MAX_NAME_BYTES + 1):
            if shown != reference:  # the name may be a piece of what is hidden
                problem = f"cannot be one; {problem.rpartition('; ')[2]}, as in /digits-x86_cpu@production"
            raise BundleError(f"{shown}: the {what}'s name {problem}")


def is_remote(reference: str) -> bool:
    """Whether the reference is an address on a server."""
    return reference.startswith(_MLFLOW) or _IN_STORE in reference.removeprefix(_FOLDER)


def _downloaded(download: Callable[[str, str, Path], tuple[Path, str]], name: str, alias: str) -> Path:
    home = cache_folder() / "bundles"
    with _scratch(home) as scratch:
        folder, digest = download(name, alias, scratch)
        manifest = check_manifest(folder)
        _require_name(manifest, name.rpartition("/")[2], f"{masked(name)}@{alias}")
        if manifest.digest != digest:
            raise BundleError(f"{masked(name)}@{alias}: the stored bundle is not the promoted one; promote it again")
        final = home / manifest.folder
        try:
            check_manifest(final)
        except BundleError:  # it is not there, or was changed
            shutil.rmtree(final, ignore_errors=True)
            folder.rename(final)
        return final


def _require_name(manifest: Manifest, name: str, reference: str) -> None:
    """Raise BundleError unless the bundle has this name. Otherwise a signed bundle of another product could pass."""
    if manifest.name != name:
        raise BundleError(
            f"{reference}: points to a bundle of {manifest.name!r}, not of {name!r}; promote one of {name!r}, and find "
            "out who changed the registry"
        )


@contextmanager
def _scratch(home: Path) -> Iterator[Path]:
    """A new folder for a download, locked inside the block. Folders of killed downloads are removed."""
    with ExitStack() as stack:
        with _locked(home):
            for left in home.glob(".download.*"):
                with suppress(OSError), (left / _LOCK).open("w") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError: another process is at it
                    shutil.rmtree(left)
            scratch = Path(stack.enter_context(TemporaryDirectory(dir=home, prefix=".download.")))
            fcntl.flock(stack.enter_context((scratch / _LOCK).open("w")), fcntl.LOCK_EX)
        yield scratch


def _versions(home: Path) -> dict[int, Path]:
    """The bundle's folder of each version number."""
    folders = [path for path in home.iterdir() if path.is_dir()] if home.is_dir() else []
    numbered = {number: path for path in folders if (number := version_number(path.name))}
    return {
        number: bundle
        for number, path in numbered.items()
        for bundle in sorted(path.iterdir())
        if (bundle / MANIFEST).is_file()
    }


def _find(home: Path, digest: str) -> int | None:
    found = (number for number, folder in _versions(home).items() if check_manifest(folder).digest == digest)
    return min(found, default=None)


def _add(home: Path, bundle: Path) -> int:
    number = max(_versions(home), default=0) + 1
    with TemporaryDirectory(dir=home, prefix=".promote.") as scratch:
        part = Path(scratch) / str(number)
        shutil.copytree(bundle, part / bundle.name)
        check_manifest(part / bundle.name)
        part.rename(home / str(number))
    return number


def _remove_leftovers(home: Path) -> None:
    """Remove files of killed promotions. The caller holds the lock, so no other promotion is running."""
    for path in [*home.glob(".promote.*"), *home.glob(f".{_ALIASES}.*.part")]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _aliases(home: Path) -> dict[str, int]:
    path = home / _ALIASES
    if not path.is_file():
        return {}
    with path.open("rb") as stream:
        content = stream.read(_MAX_BYTES + 1)
    try:
        if len(content) > _MAX_BYTES:
            raise ValueError(f"has more than {_MAX_BYTES:,} bytes")
        aliases = strict_json.loads(content)
        if not isinstance(aliases, dict):
            raise ValueError("is not an object of aliases and version numbers")
        for alias, number in aliases.items():
            if name_problem(alias) or type(number) is not int or not 1 <= number <= MAX_VERSION:
                raise ValueError(f"{ascii(alias)[:40]} means {ascii(number)[:40]}, which is not a version number")
    except ValueError as error:
        raise BundleError(f"{path}: not understood ({error}); delete it and promote again") from None
    return aliases


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    home.mkdir(parents=True, exist_ok=True)
    path = home / _LOCK
    if path.is_symlink() or (path.exists() and not path.is_file()):  # opening it would empty another file, or wait
        raise BundleError(f"{path}: is not a plain file; find out who changed the registry, and delete it")
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
