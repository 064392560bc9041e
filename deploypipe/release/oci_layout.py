"""Write a bundle as an OCI image layout, which container registries store: an artifact with a layer for each file.

OCI image specification 1.1, "Guidelines for artifact usage"; titles as ORAS writes them, so that `oras pull` gives the
files back. `skopeo copy oci:FOLDER:TAG docker://REGISTRY/NAME:TAG` pushes it.
"""

import hashlib
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from deploypipe.errors import BundleError
from deploypipe.files.hashing import file_sha256
from deploypipe.release.manifest import MANIFEST, SIGNATURE, check_manifest
from deploypipe.text import strict_json

_ARTIFACT = "application/vnd.deploypipe.bundle.v1"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_EMPTY = "application/vnd.oci.empty.v1+json"
_TITLE, _TAG = "org.opencontainers.image.title", "org.opencontainers.image.ref.name"
_MEDIA = {".onnx": "application/onnx", ".json": "application/json", ".html": "text/html", ".md": "text/markdown"}
_OTHER = "application/octet-stream"


def write_oci(bundle: Path, out: Path) -> Path:
    """Write the layout as a new folder inside `out`, tagged by the bundle's digest, and return it.

    The same bundle gives the same bytes. The folder appears whole or not at all. Raises BundleError if the bundle was
    changed or the folder exists.
    """
    manifest = check_manifest(bundle)
    final = out / manifest.folder
    if final.exists():
        raise BundleError(f"{final}: exists already; remove it, or write to another --out")
    out.mkdir(parents=True, exist_ok=True)
    names = [*(entry.name for entry in manifest.files), MANIFEST]
    names += [SIGNATURE] if (bundle / SIGNATURE).exists() else []
    with TemporaryDirectory(dir=out, prefix=".oci.") as scratch:
        folder = Path(scratch) / "layout"
        blobs = folder / "blobs" / "sha256"
        blobs.mkdir(parents=True)
        layers = [_file(bundle / name, blobs) for name in sorted(names)]
        described = {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "artifactType": _ARTIFACT,
            "config": _blob(b"{}", _EMPTY, blobs),
            "layers": layers,
            "annotations": {_TITLE: manifest.name, "deploypipe.digest": manifest.digest},
        }
        image = _blob(_as_bytes(described), _MANIFEST, blobs)
        image["annotations"] = {_TAG: manifest.tag}
        index = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [image]}
        (folder / "index.json").write_bytes(_as_bytes(index))
        (folder / "oci-layout").write_bytes(_as_bytes({"imageLayoutVersion": "1.0.0"}))
        folder.rename(final)
    return final


def _file(path: Path, blobs: Path) -> dict[str, Any]:
    """Copy a file to the blobs; return its descriptor."""
    sha256 = file_sha256(path)
    shutil.copyfile(path, blobs / sha256)
    described = _descriptor(sha256, path.stat().st_size, _MEDIA.get(path.suffix, _OTHER))
    return {**described, "annotations": {_TITLE: path.name}}


def _blob(content: bytes, media_type: str, blobs: Path) -> dict[str, Any]:
    sha256 = hashlib.sha256(content).hexdigest()
    (blobs / sha256).write_bytes(content)
    return _descriptor(sha256, len(content), media_type)


def _descriptor(sha256: str, size: int, media_type: str) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": f"sha256:{sha256}", "size": size}


def _as_bytes(value: object) -> bytes:
    return strict_json.dumps(value, separators=(",", ":")).encode()
