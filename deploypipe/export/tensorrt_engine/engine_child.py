"""The process that builds an engine: `engine_child.py JOB.json` writes the engine and a description of it.

A builder is native code that writes to the process's output and may crash: here it crashes only this process. JOB's
keys are those of `build_engine._Job`. The answer, at the job's `answer`, holds `error`, or what `main` returns.
"""

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from deploypipe.errors import DeploypipeError
from deploypipe.runtimes.tensorrt_libraries import Library, load_library
from deploypipe.untrusted_files.limited_process import end_with_parent

_ERRORS = ("ERROR", "INTERNAL_ERROR")
_LAYERS = "Layers:\n"
# "IBuilder::buildSerializedNetwork: Error Code 4: API Usage Error (WHAT. In validate at /_src/...)"
_PREFIX = re.compile(r"^(?:\[\S+\] )?(?:I?\w+::\w+: )?Error Code \d+: ")
_SOURCE = re.compile(r"\s*\(?In \w[^()]*? at /\S+?:\d+\)?")


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Build the engine, write it to the job's `engine`, and describe it. `error`: why it was not built."""
    trt, library = load_library(job["runtime"])
    log = _logger(trt)
    try:
        builder = trt.Builder(log)
    except TypeError:  # pybind11's word for a null pointer: 10.x and 11.x without a GPU
        return {"error": _first_error(log.lines) or "the library creates no builder here; it needs a GPU"}
    network = builder.create_network(_bits(trt.NetworkDefinitionCreationFlag, library.network_flags))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(job["onnx"]):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        nodes = [{"name": e.node_name(), "op": e.node_operator(), "reason": _shortened(e.desc())} for e in errors]
        return {"error": _first_error(log.lines) or "the file cannot be parsed", "nodes": nodes}
    config = builder.create_builder_config()
    if problem := _configure(trt, library, builder, config, job):
        return {"error": problem}
    started = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - started
    if plan is None:
        return {"error": _first_error(log.lines) or "the builder gave no reason"}
    content = bytes(plan)
    Path(job["engine"]).write_bytes(content)
    if job["timing_cache"]:
        Path(job["timing_cache"]).write_bytes(bytes(config.get_timing_cache().serialize()))
    layers, source = _layers(trt, library, log, content)
    return {
        "version": str(trt.__version__),
        "seconds": seconds,
        "flags": [name for name, flag in trt.BuilderFlag.__members__.items() if config.get_flag(flag)],
        "layers": layers,
        "layers_source": source,
    }


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[tuple[str, str]] = []

        def log(self, severity: Any, message: str) -> None:
            self.lines.append((severity.name, message))
            sys.stdout.write(f"{severity.name} {message}\n")

    return Log()


def _configure(trt: Any, library: Library, builder: Any, config: Any, job: dict[str, Any]) -> str:
    """Apply the job's settings. Return an error's text if the library rejects one, else ""."""
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for precision in job["precisions"]:
        for name in (library.precision_flags or {}).get(precision, ()):
            config.set_flag(getattr(trt.BuilderFlag, name))
    if job["workspace_bytes"]:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job["workspace_bytes"])
    if library.ahead_of_time and job["compute_capabilities"]:
        config.num_compute_capabilities = len(job["compute_capabilities"])
        for i, capability in enumerate(job["compute_capabilities"]):
            if not config.set_compute_capability(trt.ComputeCapability(int(capability.replace(".", ""))), i):
                return f"the library rejects compute capability {capability}"
    if job["timing_cache"]:
        path = Path(job["timing_cache"])
        config.set_timing_cache(config.create_timing_cache(path.read_bytes() if path.is_file() else b""), False)
    return _add_profile(builder, config, job["profile"])


def _add_profile(builder: Any, config: Any, shapes_of: dict[str, Any]) -> str:
    if not shapes_of:
        return ""
    profile = builder.create_optimization_profile()
    for name, shapes in shapes_of.items():
        profile.set_shape(name, *(tuple(shape) for shape in shapes))
    if config.add_optimization_profile(profile) < 0:
        return f"the library rejects the optimisation profile {shapes_of}"
    return ""


def _layers(trt: Any, library: Library, log: Any, content: bytes) -> tuple[str, str]:
    """(listing, source): the engine inspector's, one layer a line; if no GPU can load the engine, the log's."""
    if not library.ahead_of_time:
        engine = trt.Runtime(log).deserialize_cuda_engine(content)
        if engine is not None:
            return engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.ONELINE), (
                "engine inspector"
            )
    listings = [message for _, message in log.lines if message.startswith(_LAYERS)]
    if not listings:
        return "", "neither the engine inspector nor the build log lists layers"
    return listings[0], "build log: the inspector needs the engine loaded on a GPU"


def _bits(enum: Any, names: tuple[str, ...]) -> int:
    return sum(1 << int(getattr(enum, name)) for name in names)


def _first_error(lines: list[tuple[str, str]]) -> str:
    """The first error that the library logged, without its source positions."""
    errors = [_shortened(message) for severity, message in lines if severity in _ERRORS]
    return errors[0] if errors else ""


def _shortened(message: str) -> str:
    return _SOURCE.sub("", _PREFIX.sub("", message.strip())).strip()


if __name__ == "__main__":
    end_with_parent()
    given = json.loads(Path(sys.argv[1]).read_text())
    try:
        answer = main(given)
    except DeploypipeError as error:
        answer = {"error": str(error)}
    Path(given["answer"]).write_text(json.dumps(answer))
