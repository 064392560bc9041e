"""Run golden samples through one model file, started by `verify` as
`python -m deploypipe.verification.replay DIR FILE PRECISION NUM_CASES MEMORY_MIB`.

`verify` limits its time; it limits its own memory. Writes one line of JSON: why the file does not run (`problem`), or
how far its outputs are from the stored ones (`parity`; null if their shapes differ). The hashes of all files were
checked before.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from deploypipe.errors import DeploypipeError
from deploypipe.installed_packages import load_onnxruntime
from deploypipe.numerics.output_differences import difference
from deploypipe.untrusted_files.limited_process import end_with_parent, limit_memory
from deploypipe.verification.golden_json import TENSORS
from deploypipe.verification.read_safetensors import Array, read_tensors, tensor_name


def main(folder: Path, file: str, precision: str, num_cases: int, memory_mib: int | None) -> dict[str, Any]:
    """{"problem": text, "parity": the fields of a `Parity` or None, "used": the names of the tensors it uses}."""
    onnxruntime = load_onnxruntime()
    tensors = read_tensors(folder / TENSORS)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    if precision == "fp16":  # see `runtimes.onnxruntime.OnnxRuntime`
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    limit_memory(memory_mib)
    expected, seen = [], []
    used: set[str] = set()
    try:
        session = onnxruntime.InferenceSession(str(folder / file), options, providers=["CPUExecutionProvider"])
        outputs = [output.name for output in session.get_outputs()]
        inputs = [value.name for value in session.get_inputs()]
        for case in range(num_cases):
            feed = {name: tensors[tensor_name(case, "", name)] for name in inputs}
            expected.append([tensors[tensor_name(case, file, name)] for name in outputs])
            used.update(tensor_name(case, "", name) for name in inputs)
            used.update(tensor_name(case, file, name) for name in outputs)
            seen.append(session.run(outputs, feed))
    except KeyError as error:
        return {"problem": f"{TENSORS} has no {error} for it; copy the folder again"}
    except Exception as error:  # onnxruntime raises many classes
        line = str(error).partition("\n")[0] or type(error).__name__
        return {"problem": f"onnxruntime {onnxruntime.__version__} cannot run it here ({line})"}
    if problem := _problem_of(expected):
        return {"problem": problem}
    fits = all(
        isinstance(got, np.ndarray) and want.shape == got.shape and want.dtype == got.dtype
        for wanted, found in zip(expected, seen, strict=True)
        for want, got in zip(wanted, found, strict=True)
    )
    parity = asdict(difference(expected, seen)) if fits and expected else None
    return {"problem": "", "parity": parity, "used": sorted(used)}


def _problem_of(expected: list[list[Array]]) -> str:
    """Why the stored outputs cannot be compared with; empty if they can."""
    arrays = [array for outputs in expected for array in outputs]
    if not any(array.size for array in arrays):
        return f"{TENSORS} has no output values for it; copy the folder again"
    if not all(np.isfinite(array).all() for array in arrays):
        return f"its outputs in {TENSORS} hold NaN or infinity; copy the folder again"
    return ""


if __name__ == "__main__":
    end_with_parent()
    _folder, _file, _precision, _num_cases, _memory = sys.argv[1:]
    try:
        result = main(Path(_folder), _file, _precision, int(_num_cases), int(_memory) if _memory else None)
    except DeploypipeError as error:
        sys.exit(f"{error}")
    sys.stdout.write(json.dumps(result) + "\n")
