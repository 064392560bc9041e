"""Write a few real samples next to the model files, with the files' own outputs, for `deploypipe verify` to replay."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from deploypipe.errors import DataError, ModelError
from deploypipe.files.atomic import write_atomically
from deploypipe.files.hashing import file_sha256
from deploypipe.networks.batch_trees import tensors
from deploypipe.records import FileEntry, Golden, ModelFile
from deploypipe.runtimes import Array
from deploypipe.runtimes.int8_arithmetic import saturates_here
from deploypipe.runtimes.named_arrays import feed
from deploypipe.runtimes.onnxruntime import OnnxRuntime
from deploypipe.task import Batch, has_batch_axis, num_samples, take
from deploypipe.text import strict_json
from deploypipe.verification.golden_json import FORMAT, GOLDEN, TENSORS, TOLERANCES, GoldenModel
from deploypipe.verification.read_safetensors import tensor_name

NUM_SAMPLES = 4  # of each of the first batches that differ in shape
_MAX_CASES = 3


def write_golden(folder: Path, files: Mapping[str, ModelFile], batches: Sequence[Batch]) -> Golden:
    """Run each of `files` (name in `folder` -> what it is) on samples of `batches`; write golden.json and its tensors.

    So a few real samples are shipped. Raises DataError without batches, ModelError if a file does not load or its
    outputs are not finite.
    """
    cases = _choose_cases(batches)
    arrays: dict[str, Array] = {}
    for name, file in files.items():
        # 8-bit sums may saturate on this machine; by the file's own arithmetic they do not.
        is_plain = file.precision == "fp16" or (file.precision == "int8" and saturates_here())
        with OnnxRuntime(is_plain=is_plain).open(folder / name, num_threads=1) as session:
            for i, inputs in enumerate(cases):
                named = feed(inputs, file.input_names)
                arrays |= {tensor_name(i, "", key): value for key, value in named.items()}
                for key, value in zip(session.output_names, session.run(named), strict=True):
                    if not np.isfinite(value).all():
                        raise ModelError(f"{folder / name}: its output {key!r} holds NaN or infinity")
                    arrays[tensor_name(i, name, key)] = np.ascontiguousarray(value)
    write_atomically(folder / TENSORS, save(arrays))
    entries = [entry for name, file in files.items() for entry in _entries(folder, name, file)]
    entries.append(_entry(folder / TENSORS))
    models = [
        GoldenModel(file=name, precision=file.precision, max_abs_error=TOLERANCES[file.precision])
        for name, file in files.items()
    ]
    content = {
        "format": FORMAT,
        "files": [asdict(entry) for entry in entries],
        "models": [asdict(model) for model in models],
        "num_cases": len(cases),
    }
    write_atomically(folder / GOLDEN, (strict_json.dumps(content, indent=2) + "\n").encode())
    return Golden(
        files=(*entries, _entry(folder / GOLDEN)), models=tuple(files), num_samples=sum(map(num_samples, cases))
    )


def _choose_cases(batches: Sequence[Batch]) -> list[Any]:
    """The first samples of the first batch, and of later batches whose samples have another shape."""
    cases: dict[str, Any] = {}
    for inputs, _ in batches:
        case = take(inputs, NUM_SAMPLES)
        size = num_samples(case)
        shapes = str([tuple(v.shape[1:] if has_batch_axis(v, size) else v.shape) for v in tensors(case)])
        if shapes not in cases and len(cases) < _MAX_CASES and num_samples(case):
            cases[shapes] = case
    if not cases:
        raise DataError("golden samples are drawn from the calibration batches, and there is none with a sample in it")
    return list(cases.values())


def _entries(folder: Path, name: str, file: ModelFile) -> list[FileEntry]:
    entry = _entry(folder / name)
    if entry.sha256 != file.sha256:
        raise ModelError(f"{folder / name}: changed after it was exported; export it again")
    return [entry, *file.data]


def _entry(path: Path) -> FileEntry:
    return FileEntry(name=path.name, sha256=file_sha256(path), size_bytes=path.stat().st_size)
