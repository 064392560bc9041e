"""Build the engine of a bundle or run again for the device here, and compare it with the ONNX file's golden outputs.

An engine belongs to one library version, driver and GPU. The ONNX file next to it was compared with the network when
it was exported, and its outputs for the golden samples are stored: so the engine is compared with the network, too.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from deploypipe.errors import ConfigError
from deploypipe.export.tensorrt_engine.build_engine import build_engine, is_built
from deploypipe.numerics.output_differences import difference
from deploypipe.records import EngineFile, Parity
from deploypipe.release.bundle import MODEL, check_run, load_bundle
from deploypipe.release.manifest import MANIFEST
from deploypipe.runs.result import RunResult, load_result
from deploypipe.runtimes import Runtime, make_runtime
from deploypipe.runtimes.ability_for_target import can
from deploypipe.target import Target
from deploypipe.verification.golden_json import TENSORS, TOLERANCES, GoldenModel, read_golden
from deploypipe.verification.read_safetensors import read_tensors, tensor_name


@dataclass(frozen=True, kw_only=True, slots=True)
class RebuiltEngine:
    """An engine, and how far its outputs are from those of the ONNX file."""

    path: Path
    engine: EngineFile
    parity: Parity | None  # None: it does not run here
    max_abs_error: float  # the largest that is allowed, relative to an output's largest magnitude
    reason: str = ""  # why it was not run

    @property
    def is_same(self) -> bool:
        """Whether it runs here and gives the same outputs."""
        return self.parity is not None and self.parity.max_abs_error <= self.max_abs_error


def rebuild_engine(folder: Path, out: Path, target: Target | None = None) -> RebuiltEngine:
    """Build the engine of a bundle or finished run for `target`, by default its own, into `out`.

    ConfigError if the target runs no engines. Raises what `check_manifest`, `check_run` and `build_engine` raise.
    """
    result = _load(folder)
    target = target or result.target
    if not is_built(target):
        raise ConfigError(
            f"target {target.name!r}" if target.name else "target",
            "runtime",
            f"{target.runtime} opens ONNX files, so there is no engine to build",
            "name a target with runtime = 'tensorrt' or 'tensorrt-rtx'",
        )
    (model,) = (model for model in read_golden(folder).models if model.file == MODEL)
    engine = build_engine(folder / MODEL, target, out)
    path = out / engine.path
    # TensorRT computes fp32 in TF32, which has the mantissa of fp16.
    allowed = max(model.max_abs_error, TOLERANCES["fp16"])
    ability = can(target)
    if ability.verdict != "run":
        return RebuiltEngine(path=path, engine=engine, parity=None, max_abs_error=allowed, reason=ability.reason)
    parity = replay_golden(folder, model, path, make_runtime(target))
    return RebuiltEngine(path=path, engine=engine, parity=parity, max_abs_error=allowed)


def replay_golden(folder: Path, model: GoldenModel, file: Path, runtime: Runtime) -> Parity:
    """How far the outputs of `file` are from the stored ones of `model`, whose inputs and outputs it has.

    folder: of the golden samples.
    """
    tensors, expected, seen = read_tensors(folder / TENSORS), [], []
    with runtime.open(file, num_threads=1) as session:
        for case in range(read_golden(folder).num_cases):
            batch = {name: tensors[tensor_name(case, "", name)] for name in session.input_names}
            expected.append([tensors[tensor_name(case, model.file, name)] for name in session.output_names])
            seen.append(session.run(batch))
    return difference(expected, seen)


def _load(folder: Path) -> RunResult:
    if os.path.lexists(folder / MANIFEST):
        return load_bundle(folder)
    check_run(folder)
    return load_result(folder)
