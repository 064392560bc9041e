"""Check an engine against the record next to it (`x.engine`, `x.engine.json`) before any byte of it is deserialised.

An engine is executable code, and runs only on the device that it was built for. The record's hash detects an engine
that was damaged or exchanged. Only a signature proves who wrote them.
"""

import platform
from hashlib import sha256
from pathlib import Path

from deploypipe.errors import ConfigError, ModelError, RuntimeUnavailableError
from deploypipe.records import EngineFile, EngineKey
from deploypipe.runtimes.this_machine import Machine, this_machine

SUFFIX = ".engine"
_REBUILD = "rebuild the engine from the ONNX file on this machine (deploypipe engine BUNDLE)"


def record_path(engine: Path) -> Path:
    return engine.with_name(f"{engine.name}.json")


def read_engine(path: Path, library: str, version: str) -> bytes:
    """Read the engine's bytes, for this version of `library` to deserialise on this machine.

    ModelError, which says what differs, if the file or its record is absent or damaged, or was built for something
    else. RuntimeUnavailableError if there is no GPU.
    """
    record = load_record(path)
    content = path.read_bytes()
    if sha256(content).hexdigest() != record.sha256:
        raise ModelError(f"{path}: not the file that its record describes (its sha256 differs); {_REBUILD}")
    machine = this_machine()
    if problem := find_mismatch(record.key, library, version, machine):
        raise ModelError(f"{path}: {problem}; {_REBUILD}")
    if not machine.gpus:
        raise RuntimeUnavailableError(
            f"{path}: an engine runs on an NVIDIA GPU and none is usable here; {no_gpu_hint()}"
        )
    return content


def load_record(engine: Path) -> EngineFile:
    """Read the record of an engine; ModelError if one of the two is absent, or the record is damaged."""
    from deploypipe.files.json_records import (
        from_json,  # late: brings pydantic, which a process that measures memory need not hold
    )

    record = record_path(engine)
    for path in (engine, record):
        if not path.is_file():
            raise ModelError(
                f"{path}: there is no such file; an engine is loaded with the record next to it: {_REBUILD}"
            )
    try:
        return from_json(EngineFile, record.read_bytes(), str(record))
    except ConfigError as error:
        raise ModelError(f"{record}: not the record of an engine ({error.problem}); {_REBUILD}") from None


def find_mismatch(key: EngineKey, library: str, version: str, machine: Machine) -> str:
    """Why an engine with this key cannot run here; "" if nothing is known against it."""
    if (key.library, key.version) != (library, version):
        return f"was built by {key.library} {key.version}, and {library} {version} is installed here"
    if key.platform != platform_of(machine):
        return f"was built for {key.platform}, and this machine is {platform_of(machine)}"
    if not machine.gpus:
        return ""
    here = machine.gpus[0]
    if here.compute_capability not in key.compute_capabilities:
        built = ", ".join(key.compute_capabilities)
        return f"was built for compute capability {built}, and {here.name} has {here.compute_capability}"
    if key.driver and key.driver != machine.driver:
        return f"was built with driver {key.driver}, and this machine has {machine.driver}"
    return ""


def platform_of(machine: Machine) -> str:
    return f"{machine.system} {machine.architecture}"


def no_gpu_hint() -> str:
    return "on a machine with one, install its driver" if platform.system() != "Darwin" else "use another machine"
