"""`deploypipe verify DIR`, or `python -m deploypipe.verify DIR`: check that model files still give the same outputs.

Needs only numpy and onnxruntime, so that it runs on the device that the files were made for. DIR holds golden.json (the
list of files, with sizes, sha256 and tolerances), golden.safetensors (samples, and the outputs of each model file on
the machine that made it) and the model files. Every file's hash is checked before any of them is parsed. golden.json
itself is trusted: whoever can change it can change everything.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deploypipe.errors import DeploypipeError, ModelError
from deploypipe.records import FileEntry, Parity
from deploypipe.text.printable_text import printable
from deploypipe.text.safe_names import name_problem
from deploypipe.untrusted_files.limited_process import ProcessLimits, run_limited
from deploypipe.untrusted_files.onnx_file_check import check_onnx_file
from deploypipe.verification.golden_json import GOLDEN, TENSORS, GoldenModel, read_golden, shown
from deploypipe.verification.read_safetensors import Array, read_tensors, tensor_name

EXIT_SAME, EXIT_DIFFERENT, EXIT_UNUSABLE = 0, 1, 2
HEADER = ("file", "precision", "max error", "allowed", "top-1", "verdict")

_MODEL_SUFFIXES = (".onnx", ".ort")
_USUAL = ProcessLimits()
_LIMITS_REMEDY = "do not use it, or raise --time-limit or --memory-limit"


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """The comparison of one model file's outputs here with the stored ones."""

    model: GoldenModel
    parity: Parity | None  # None: the number, shape or type of outputs differs
    is_same: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    replays: tuple[Replay, ...]
    notes: tuple[str, ...]

    @property
    def is_same(self) -> bool:
        return all(replay.is_same for replay in self.replays)


def verify(folder: Path, limits: ProcessLimits = _USUAL) -> Verification:
    """Replay the golden samples of `folder`, each model file in a process of its own with these limits.

    Every stored sample and output must be used, and every model in the folder is checked. ModelError if the folder is
    incomplete or changed, or if a model does not load here or exceeds a limit of time or memory.
    """
    content = read_golden(folder)
    for entry in content.files:
        _check_hash(folder, entry)
    known = {entry.name for entry in content.files}
    if lost := {TENSORS, *(model.file for model in content.models)} - known:
        raise ModelError(f"{folder / GOLDEN}: lists no hash of {shown(sorted(lost))}; copy the folder again")
    for model in content.models:
        if lost := set(check_onnx_file(folder / model.file).data) - known:
            raise ModelError(f"{folder / model.file}: needs {shown(sorted(lost))}, which {GOLDEN} does not list")
    others = sorted(path.name for path in folder.iterdir() if path.name not in {*known, GOLDEN})
    unchecked = {name for name in others if name.lower().endswith(_MODEL_SUFFIXES)}
    unchecked |= {name for name in known if name.lower().endswith(_MODEL_SUFFIXES)} - {m.file for m in content.models}
    if unchecked:
        raise ModelError(
            f"{folder}: {GOLDEN} has no outputs for the model {shown(sorted(unchecked))}; remove it, or copy the "
            "folder again"
        )
    tensors = read_tensors(folder / TENSORS)
    used: set[str] = set()
    replays = tuple(_replay(folder, model, content.num_cases, used, limits) for model in content.models)
    if unused := sorted(tensors.keys() - used):
        raise ModelError(
            f"{folder / TENSORS}: holds {shown(unused)}, which no model reads or returns; copy the folder again"
        )
    return Verification(replays=replays, notes=(f"not listed, not checked: {shown(others)}",) if others else ())


def golden_inputs(folder: Path, batch_size: int) -> dict[str, Array]:
    """A batch of the stored samples, repeated if there are fewer. Raises like `verify`."""
    inputs = golden_case(folder)
    return {name: np.resize(array, (batch_size, *array.shape[1:])) for name, array in inputs.items()}


def golden_case(folder: Path, model: str = "") -> dict[str, Array]:
    """The first stored case: its inputs, or a model file's outputs for them. Raises like `verify`."""
    first = tensor_name(0, model, "")
    tensors = read_tensors(folder / TENSORS)
    return {name.removeprefix(first): array for name, array in tensors.items() if name.startswith(first)}


def cells(verification: Verification) -> list[tuple[str, ...]]:
    """The rows of a table under HEADER."""
    return [
        (
            replay.model.file,
            replay.model.precision,
            f"{replay.parity.max_abs_error:.2g}" if replay.parity else "other shapes",
            f"{replay.model.max_abs_error:.2g}",
            f"{agreement:.1%}" if replay.parity and (agreement := replay.parity.top1_agreement) is not None else "-",
            "same" if replay.is_same else "DIFFERENT",
        )
        for replay in verification.replays
    ]


def _check_hash(folder: Path, entry: FileEntry) -> None:
    path = folder / entry.name
    if problem := name_problem(entry.name):
        raise ModelError(f"{folder / GOLDEN}: the file name {problem.partition('; ')[0]}; do not use it")
    if path.is_symlink() or not path.is_file():
        raise ModelError(f"{path}: {'is a link' if path.is_symlink() else 'is missing'}; copy the folder again")
    size = path.stat().st_size
    with path.open("rb") as stream:
        is_whole = size == entry.size_bytes and hashlib.file_digest(stream, "sha256").hexdigest() == entry.sha256
    if not is_whole:
        how = f"has {size} bytes instead of {entry.size_bytes}" if size != entry.size_bytes else "was changed"
        raise ModelError(f"{path}: {how} (its sha256 differs from {GOLDEN}); copy the folder again")


def _replay(folder: Path, model: GoldenModel, num_cases: int, used: set[str], limits: ProcessLimits) -> Replay:
    """Run a model on the stored samples in a limited process of its own; add the tensors it uses to `used`.

    A crash or an endless graph then ends neither this process nor the machine.
    """
    path = folder / model.file
    memory = "" if limits.memory_mib is None else str(limits.memory_mib)
    command = ["-m", "deploypipe.verification.replay", str(folder), model.file, model.precision, str(num_cases), memory]
    outcome = run_limited(command, limits)
    if outcome.problem:
        raise ModelError(f"{path}: cannot be run here: {outcome.problem}; {_LIMITS_REMEDY}")
    found = json.loads(outcome.written)
    if found["problem"]:
        raise ModelError(f"{path}: {found['problem']}")
    used.update(found["used"])
    parity = Parity(**found["parity"]) if found["parity"] else None
    return Replay(
        model=model, parity=parity, is_same=parity is not None and parity.max_abs_error <= model.max_abs_error
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code: 0 the same, 1 different, 2 unusable."""
    parser = argparse.ArgumentParser(prog="python -m deploypipe.verify", description="Replay golden samples.")
    parser.add_argument("folder", type=Path, metavar="DIR", help=f"folder with {GOLDEN}")
    parser.add_argument("--time-limit", type=float, default=_USUAL.seconds, metavar="SECONDS", help="for each file")
    parser.add_argument("--memory-limit", type=int, metavar="MIB", help="for each file; Linux only")
    asked = parser.parse_args(arguments)
    if not 0 < asked.time_limit < 1e6 or not 0 < (asked.memory_limit or 1) < 2**30:
        parser.error("a limit must be > 0, such as --time-limit 120 or --memory-limit 2048")
    try:
        verification = verify(asked.folder, ProcessLimits(seconds=asked.time_limit, memory_mib=asked.memory_limit))
    except DeploypipeError as error:
        sys.stderr.write(f"error: {printable(str(error))}\n")
        return EXIT_UNUSABLE
    rows = [HEADER, *cells(verification)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    sys.stdout.write("\n".join([*lines, *(f"note: {printable(note)}" for note in verification.notes), ""]))
    return EXIT_SAME if verification.is_same else EXIT_DIFFERENT


if __name__ == "__main__":
    sys.exit(main())
