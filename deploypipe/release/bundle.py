"""The release bundle: the model and its evidence, in one folder named by its content."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from deploypipe.errors import BundleError
from deploypipe.files.hashing import file_sha256
from deploypipe.files.json_records import to_json, to_plain
from deploypipe.records import FileEntry, Verdict
from deploypipe.release.bill_of_materials import bill_of_materials
from deploypipe.release.decide_again import decide_today
from deploypipe.release.manifest import SIGNATURE, check_manifest, write_manifest
from deploypipe.release.model_card import model_card
from deploypipe.release.provenance import provenance
from deploypipe.report.html import render_report
from deploypipe.runs.load_network import BUNDLE_RESULT
from deploypipe.runs.result import RunResult, load_result, result_json
from deploypipe.runtimes.engine_file import load_record
from deploypipe.text import strict_json
from deploypipe.text.safe_names import name_problem

REPORT = BUNDLE_RESULT
MODEL, ENGINE = "model.onnx", "model.engine"


def make_bundle(
    run: Path | str, out: Path | str, *, sign: Callable[[Path], None] | None = None, now: datetime | None = None
) -> Path:
    """Write the bundle of a finished run into `out`, and return its folder.

    sign: writes the signature into a bundle's folder, such as `partial(signing.sign, private_key=path)`. now: timezone
    aware, the present by default. The same run gives the same bytes, except for the signature. The folder appears whole
    or not at all; a folder that exists is checked and kept. Raises BundleError if the gate holds the run as of `now`,
    or if a file was changed after the run.
    """
    run, out = Path(run), Path(out)
    result = load_result(run)
    decision = decide_today(run, result, now or datetime.now(UTC))
    if decision.verdict is not Verdict.SHIP:
        raise BundleError(f"{run}: the gate holds this run: {decision.reason}")
    hashes = _check_files(run, result)
    model_files = _model_files(result)
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out, prefix=".release.") as scratch:
        folder = Path(scratch) / "bundle"
        folder.mkdir()
        for name in hashes:
            shutil.copyfile(run / name, folder / name)
        for name, text in _documents(result, model_files).items():
            (folder / name).write_text(text, encoding="utf-8")
        manifest = write_manifest(folder, bundle_name(result))
        for entry in manifest.files:
            if hashes.get(entry.name, entry.sha256) != entry.sha256:
                raise _changed(run / entry.name)
        final = out / manifest.folder
        if sign:
            sign(folder)
        try:
            folder.rename(final)
        except OSError:  # it was released before, or just now by another process
            check_manifest(final)
            if sign and not (final / SIGNATURE).exists():
                sign(final)
        return final


def bundle_name(result: RunResult) -> str:
    """The name of a run's bundle; bundles of one name are versions of each other. BundleError for an invalid name."""
    if problem := name_problem(result.pipeline):
        raise BundleError(f"the run's pipeline has a name that cannot be a folder: {problem}")
    return f"{result.pipeline}-{result.target.name or result.target.runtime}"


def load_bundle(folder: Path) -> RunResult:
    """Check a bundle's files against its manifest, and read its report."""
    check_manifest(folder)
    return load_result(folder, REPORT)


def check_run(run: Path) -> None:
    """Raise BundleError for the first golden file of a finished run that differs from what its result records."""
    result = load_result(run)
    _require_hashes(run, {entry.name: entry.sha256 for entry in result.golden.files} if result.golden else {})


def _check_files(run: Path, result: RunResult) -> dict[str, str]:
    """The hash of each file that ships; BundleError for a file that is not what the run measured."""
    if result.golden is None:
        raise BundleError(f"{run}: was made by an older version and has no golden samples; run it again")
    hashes = {entry.name: entry.sha256 for entry in result.golden.files}
    if result.weights:
        hashes[result.weights.name] = result.weights.sha256
    measured = result.benchmark.compressed.file.sha256
    if result.engine:
        if measured != result.engine.sha256:
            raise _changed(run / ENGINE)
        measured = result.engine.onnx_sha256
        hashes[ENGINE] = result.engine.sha256
        if load_record(run / ENGINE) != replace(result.engine, path=ENGINE, log=f"{ENGINE}.log"):
            raise _changed(run / f"{ENGINE}.json")
        hashes[f"{ENGINE}.json"] = file_sha256(run / f"{ENGINE}.json")
    if hashes.get(MODEL) != measured:
        raise _changed(run / MODEL)
    _require_hashes(run, hashes)
    return hashes


def _require_hashes(run: Path, hashes: dict[str, str]) -> None:
    for name, sha256 in hashes.items():
        if problem := name_problem(name):
            raise BundleError(f"{run}: lists a file whose name {problem}; run it again")
        if not (run / name).is_file() or file_sha256(run / name) != sha256:
            raise _changed(run / name)


def _changed(path: Path) -> BundleError:
    return BundleError(f"{path}: is not the file that was measured; run it again with the same command")


def _model_files(result: RunResult) -> list[FileEntry]:
    weights = {entry.name for entry in result.benchmark.compressed.file.data}
    files = result.golden.files if result.golden else ()
    return [entry for entry in files if entry.name == MODEL or entry.name in weights]


def _documents(result: RunResult, model_files: list[FileEntry]) -> dict[str, str]:
    documents = {
        REPORT: result_json(result).decode(),
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
    return strict_json.dumps(plain, indent=1) + "\n"
