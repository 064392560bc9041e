"""The release bundle: all that ships, and all that is asked about it later, in one folder named by its content."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from deploypipe.errors import BundleError
from deploypipe.jsonio import to_json, to_plain
from deploypipe.records import FileEntry, Verdict
from deploypipe.release.bom import bill_of_materials
from deploypipe.release.card import model_card
from deploypipe.release.manifest import SIGNATURE, check_manifest, write_manifest
from deploypipe.release.provenance import provenance
from deploypipe.report.html import render_report
from deploypipe.runs import RunResult, file_sha256, load_result

REPORT = "report.json"
MODEL, ENGINE = "model.onnx", "model.engine"


def release(run: Path, out: Path, *, sign: Callable[[Path], None] | None = None) -> Path:
    """Write the bundle of a finished run into `out`, and return its folder.

    sign: writes the signature into a bundle's folder, such as `partial(signing.sign, private_key=path)`. The same run
    gives the same bytes, but for the signature. The folder appears whole or not at all; where it is there
    already it is checked and left. Raises BundleError where the gate holds the run, or a file was changed after it.
    """
    result = load_result(run)
    if result.decision.verdict is not Verdict.SHIP:
        raise BundleError(f"{run}: the gate holds this run: {result.decision.reason}")
    model_files = _check_files(run, result)
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out, prefix=".release.") as scratch:
        folder = Path(scratch) / "bundle"
        folder.mkdir()
        for entry in result.golden.files if result.golden else ():
            shutil.copyfile(run / entry.name, folder / entry.name)
        if result.engine:
            for name in (ENGINE, f"{ENGINE}.json"):
                shutil.copyfile(run / name, folder / name)
        for name, text in _documents(result, model_files).items():
            (folder / name).write_text(text, encoding="utf-8")
        manifest = write_manifest(folder, bundle_name(result))
        final = out / manifest.folder
        if sign:
            sign(folder)
        try:
            folder.rename(final)
        except OSError:  # it was released before, or just now by somebody else
            check_manifest(final)
            if sign and not (final / SIGNATURE).exists():
                sign(final)
        return final


def bundle_name(result: RunResult) -> str:
    """Bundles of one name are versions of one another."""
    return f"{result.pipeline}-{result.target.name or result.target.runtime}"


def load_bundle(folder: Path) -> RunResult:
    """The report of a bundle whose files are what its manifest says."""
    check_manifest(folder)
    return load_result(folder, REPORT)


def _check_files(run: Path, result: RunResult) -> list[FileEntry]:
    """The files of the model; all that ships has to be what the run left."""
    if result.golden is None:
        raise BundleError(f"{run}: was made by an older version and has no golden samples; run it again")
    entries = {entry.name: entry.sha256 for entry in result.golden.files}
    if result.engine:
        entries[ENGINE] = result.engine.sha256
    for name, sha256 in entries.items():
        if not (run / name).is_file() or file_sha256(run / name) != sha256:
            raise BundleError(f"{run / name}: is not the file that was measured; run it again with the same command")
    weights = {entry.name for entry in result.benchmark.compressed.file.data}
    return [entry for entry in result.golden.files if entry.name in (*result.golden.models, *weights)]


def _documents(result: RunResult, model_files: list[FileEntry]) -> dict[str, str]:
    documents = {
        REPORT: to_json(result) + "\n",
        "report.html": render_report(result),
        "README.md": model_card(result),
        "recipe.json": _pretty(to_plain(result.recipe)),
        "target.json": _pretty(to_plain(result.target)),
        "provenance.json": _pretty(provenance(result, model_files)),
        "bom.cdx.json": bill_of_materials(result, model_files),
    }
    if result.search:
        documents["plan.json"] = to_json(result.search.trials[result.search.best].plan) + "\n"
    return documents


def _pretty(plain: Any) -> str:
    return json.dumps(plain, indent=1, sort_keys=True) + "\n"
