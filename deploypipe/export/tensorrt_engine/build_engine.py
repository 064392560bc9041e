"""Build a TensorRT engine from an ONNX file, in a process of its own: for TensorRT 10.x, 11.x and TensorRT-RTX.

The file decides the precision: half-precision weights, Q/DQ nodes. If the library's networks are not strongly typed
(10.x), the builder gets the flags that let it follow the file, and no others.
"""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import onnx
from google.protobuf.message import DecodeError

from deploypipe.errors import ConfigError, ModelError, RuntimeUnavailableError
from deploypipe.files.atomic import place_file, write_atomically
from deploypipe.files.cache_folder import cache_folder
from deploypipe.files.hashing import digest, file_sha256
from deploypipe.files.json_records import to_json
from deploypipe.records import EngineFile, EngineKey, EngineLayer, ModelFile, Names
from deploypipe.runtimes.engine_file import SUFFIX, load_record, platform_of, record_path
from deploypipe.runtimes.tensorrt_libraries import Library, load_library
from deploypipe.runtimes.this_machine import Machine, this_machine
from deploypipe.target import Precision, Target
from deploypipe.untrusted_files.limited_process import child_environment

Shape: TypeAlias = tuple[int, ...]
Profile: TypeAlias = dict[str, tuple[Shape, Shape, Shape]]

_CHILD = Path(__file__).with_name("engine_child.py")
_SECONDS = 3600.0
_NUM_NODES = 3  # named in an error
_LAYER = re.compile(r"^Name: (.*?), LayerType: (.*?), Inputs: (.*)$")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """The engine that the child process must build."""

    runtime: str
    onnx: str
    engine: str
    answer: str
    profile: Profile
    precisions: tuple[Precision, ...]
    compute_capabilities: Names
    workspace_bytes: int
    timing_cache: str  # "": none


def build_engine(onnx_path: Path, target: Target, folder: Path) -> EngineFile:
    """Build `onnx_path` for `target`, whose runtime is TensorRT or TensorRT-RTX, into `folder`.

    Leaves NAME.engine, NAME.engine.json (the record that is returned; without it an engine is not loaded) and
    NAME.engine.log, after the ONNX file's own NAME; a failed build leaves the log alone.

    Raises RuntimeUnavailableError if the library is missing, or needs a GPU that is missing; ConfigError if the target
    lacks a dynamic axis, or names a compute capability that the library does not know; ModelError if the file cannot
    be built. That error names the node at fault and its operator; in files of `export_onnx` a node is named after its
    layer.
    """
    _, library = load_library(target.runtime)
    machine = this_machine()
    capabilities = _capabilities(target, library, machine)
    proto = _read(onnx_path)
    folder.mkdir(parents=True, exist_ok=True)
    engine = folder / f"{onnx_path.stem}{SUFFIX}"
    log = engine.with_name(f"{engine.name}.log")
    for old in (engine, record_path(engine), log):
        old.unlink(missing_ok=True)
    precisions = stored_precisions(proto)
    with TemporaryDirectory(dir=folder, prefix=f".{engine.name}.") as scratch:
        job = _Job(
            runtime=target.runtime,
            onnx=str(onnx_path.resolve()),
            engine=str(Path(scratch) / engine.name),
            answer=str(Path(scratch) / "answer.json"),
            profile=make_profile(proto, target),
            precisions=precisions,
            compute_capabilities=capabilities,
            workspace_bytes=target.workspace_bytes or 0,
            timing_cache=str(_timing_cache(library, machine)) if library.has_timing_cache else "",
        )
        answer = _run_child(job, log)
        if "error" in answer:
            raise ModelError(_failure(onnx_path, target, answer, log))
        built = Path(job.engine)
        record = EngineFile(
            path=engine.name,
            sha256=file_sha256(built),
            size_bytes=built.stat().st_size,
            onnx_sha256=file_sha256(onnx_path),
            key=EngineKey(
                library=target.runtime,
                version=answer["version"],
                compute_capabilities=capabilities,
                driver="" if library.ahead_of_time else machine.driver,
                platform=platform_of(machine),
            ),
            precision=precisions[0],
            flags=tuple(answer["flags"]),
            profile=job.profile,
            build_seconds=round(answer["seconds"], 3),
            layers=parse_layers(answer["layers"]),
            layers_source=answer["layers_source"],
            log=log.name,
        )
        built.replace(engine)
    write_atomically(record_path(engine), to_json(record).encode())
    return record


def runnable(path: Path, target: Target) -> Path:
    """The file that the target's runtime opens: the ONNX file, or an engine that is built next to it."""
    if not is_built(target):
        return path
    engine = path.with_suffix(SUFFIX)
    return engine if engine.is_file() else path.parent / build_engine(path, target, path.parent).path


def is_built(target: Target) -> bool:
    """Whether the target's runtime opens engines instead of ONNX files."""
    return target.runtime in ("tensorrt", "tensorrt-rtx")


def as_model_file(file: ModelFile, engine: EngineFile) -> ModelFile:
    """The record of the engine as the measured file: its own path, hash and size, else the ONNX file's fields."""
    return replace(file, path=engine.path, sha256=engine.sha256, size_bytes=engine.size_bytes, data=())


def place_engine(source: Path, folder: Path, name: str) -> None:
    """Place an engine and its log in `folder` under a stable name, with a record that fits."""
    record = load_record(source)
    log = f"{name}.log"
    place_file(source, folder / name)
    place_file(source.with_name(record.log), folder / log)
    write_atomically(record_path(folder / name), to_json(replace(record, path=name, log=log)).encode())


# --- inputs of a build ------------------------------------------------------------------------------------------------


def stored_precisions(proto: onnx.ModelProto) -> tuple[Precision, ...]:
    """The precisions a file computes in, narrowest first."""
    found: list[Precision] = []
    if any(node.op_type == "DequantizeLinear" for node in proto.graph.node):
        found.append("int8")
    types = {tensor.data_type for tensor in proto.graph.initializer}
    types |= {value.type.tensor_type.elem_type for value in proto.graph.input}
    if onnx.TensorProto.FLOAT16 in types:
        found.append("fp16")
    return tuple(found) or ("fp32",)


def make_profile(proto: onnx.ModelProto, target: Target) -> Profile:
    """(smallest, usual, largest) shape of every input that has a dynamic axis.

    Axis 0 is the batch. Any other axis takes its range from the target, by its name; ConfigError if there is none.
    """
    weights = {tensor.name for tensor in proto.graph.initializer}
    profile: Profile = {}
    for value in proto.graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name in weights or all(dim.HasField("dim_value") for dim in dims):
            continue
        ranges = [_range(value.name, axis, dim, target) for axis, dim in enumerate(dims)]
        smallest, usual, largest = (tuple(sizes[i] for sizes in ranges) for i in range(3))
        profile[value.name] = (smallest, usual, largest)
    return profile


def _range(name: str, axis: int, dim: Any, target: Target) -> tuple[int, int, int]:
    if dim.HasField("dim_value"):
        return dim.dim_value, dim.dim_value, dim.dim_value
    if dim.dim_param in target.dynamic_dims:
        return target.dynamic_dims[dim.dim_param]
    if axis == 0:
        return target.batches
    axis_name = dim.dim_param or "NAME"
    raise ConfigError(
        f"target {target.name!r}" if target.name else "target",
        "dynamic_dims",
        f"input {name!r} has a dynamic axis {axis} ({dim.dim_param or 'without a name'}) and no profile for it",
        f"add {axis_name} = [smallest, usual, largest] under [dynamic_dims], or export the model with that axis fixed",
    )


def _capabilities(target: Target, library: Library, machine: Machine) -> Names:
    """The compute capabilities to build for: those that the target names, if the library builds ahead of time; else
    that of the GPU here."""
    if library.ahead_of_time and target.compute_capabilities:
        for capability in target.compute_capabilities:
            if capability not in library.ahead_of_time:
                raise ConfigError(
                    f"target {target.name!r}" if target.name else "target",
                    "compute_capabilities",
                    f"{target.runtime} cannot build for {capability}",
                    f"write some of {', '.join(library.ahead_of_time)}, or use runtime = 'tensorrt'",
                )
        return target.compute_capabilities
    if machine.gpus:
        return (machine.gpus[0].compute_capability,)
    remedy = "name compute_capabilities in the target" if library.ahead_of_time else "build it on the device itself"
    raise RuntimeUnavailableError(f"{target.runtime} builds for a local GPU, and none is usable here; {remedy}")


def _read(path: Path) -> onnx.ModelProto:
    """The file without its external data. ModelError if it is absent, damaged, or points out of its folder."""
    try:
        proto = onnx.load(path, load_external_data=False)
    except FileNotFoundError:
        raise ModelError(f"{path}: there is no such file; export the model first") from None
    except DecodeError as error:
        raise ModelError(f"{path}: not an ONNX file, or a damaged one ({error}); export the model again") from None
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and (Path(entry.value).is_absolute() or ".." in Path(entry.value).parts):
                raise ModelError(
                    f"{path}: weight {tensor.name!r} lies outside the file's folder ({entry.value}); "
                    "do not use this file: export the model again"
                )
    return proto


def _timing_cache(library: Library, machine: Machine) -> Path:
    """The file of kernel timings for this library's version and this device; others may not read it."""
    trt, _ = load_library(library.runtime)
    device = [machine.gpus[0].name, machine.gpus[0].compute_capability, machine.driver] if machine.gpus else []
    folder = cache_folder() / "timing"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{library.runtime}-{trt.__version__}-{digest(device)}.cache"


# --- the child --------------------------------------------------------------------------------------------------------


def _run_child(job: _Job, log: Path) -> dict[str, Any]:
    """Run the child and return its answer. All output of the library goes to `log`."""
    given = Path(job.answer).with_name("job.json")
    given.write_text(to_json(job), encoding="utf-8")
    # -P: the folder of the script, which holds modules with everyday names, stays out of the child's import path.
    command = [sys.executable, "-P", str(_CHILD), str(given)]
    with log.open("wb") as stream:
        try:
            done = subprocess.run(
                command, stdout=stream, stderr=stream, timeout=_SECONDS, env=child_environment(), check=False
            )
        except subprocess.TimeoutExpired:
            return {"error": f"the builder took over {_SECONDS:.0f} s"}
    if done.returncode == 0 and Path(job.answer).is_file():
        answer: dict[str, Any] = json.loads(Path(job.answer).read_text(encoding="utf-8"))
        return answer
    if done.returncode < 0:
        return {"error": f"the builder was killed by {signal.Signals(-done.returncode).name}; it may need more memory"}
    lines = log.read_text(errors="replace").strip().splitlines()
    return {"error": lines[-1] if lines else f"the builder ended with status {done.returncode}"}


def _failure(path: Path, target: Target, answer: dict[str, Any], log: Path) -> str:
    nodes = [node for node in answer.get("nodes", ()) if node["op"] or node["name"]]
    if not nodes:
        return f"{path}: {target.runtime} cannot build it: {answer['error']}; the whole log is {log}"
    failures = []
    for node in nodes[:_NUM_NODES]:
        reason = "it is not supported" if node["reason"] in ("", "false") else node["reason"]
        failures.append(f"{node['op']} {node['name']!r}: {reason}")
    more = f", and {len(nodes) - _NUM_NODES} more" if len(nodes) > _NUM_NODES else ""
    return (
        f"{path}: {target.runtime} cannot build {'; '.join(failures)}{more}; write that part of forward() with other "
        f"operators (the whole log is {log})"
    )


# --- layers of an engine ----------------------------------------------------------------------------------------------


def parse_layers(listing: str) -> tuple[EngineLayer, ...]:
    """Parse the engine inspector's one-line form, or the same listing from a builder's log."""
    return tuple(_layers(listing))


def _layers(listing: str) -> Iterator[EngineLayer]:
    for line in listing.splitlines():
        if match := _LAYER.match(line):
            outputs = match[3].partition("Outputs: [")[2].partition("], TacticName")[0]
            yield EngineLayer(
                name=match[1],
                kind=match[2],
                output_types=tuple(dict.fromkeys(re.findall(r"(?:Datatype|Format/Datatype): (\w+)", outputs))),
                nodes=tuple(re.findall(r"\[ONNX Layer: (.*?)\]", line.partition("Metadata: ")[2])),
            )
