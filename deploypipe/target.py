"""What one device is and what it allows: `targets/*.toml`."""

import re
from dataclasses import dataclass, field, fields
from typing import Literal, TypeAlias

from deploypipe.text.field_bounds import above, real, require, require_text, require_texts, shown, whole
from deploypipe.text.safe_names import name_problem

RELATIVE = "x"
Runtime: TypeAlias = Literal["onnxruntime", "tensorrt", "tensorrt-rtx", "eager"]
Provider: TypeAlias = Literal["cpu", "cuda", "tensorrt", "openvino", "coreml", "qnn"]
Precision: TypeAlias = Literal["fp32", "fp16", "int8"]
Range: TypeAlias = tuple[int, int, int]  # least, the one to be fast at, most

_ALL_PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
# What a (runtime, provider) takes. The CoreML provider has no QuantizeLinear or DequantizeLinear
# (onnxruntime.ai/docs/execution-providers/CoreML-ExecutionProvider.html, supported operators).
_PRECISIONS: dict[tuple[str, str], tuple[Precision, ...]] = {
    ("eager", "cpu"): ("fp32", "fp16"),
    ("eager", "cuda"): ("fp32", "fp16"),
    ("onnxruntime", "cpu"): _ALL_PRECISIONS,
    ("onnxruntime", "cuda"): _ALL_PRECISIONS,
    ("onnxruntime", "tensorrt"): _ALL_PRECISIONS,
    ("onnxruntime", "openvino"): _ALL_PRECISIONS,
    ("onnxruntime", "coreml"): ("fp32", "fp16"),
    ("onnxruntime", "qnn"): _ALL_PRECISIONS,
    ("tensorrt", "cpu"): _ALL_PRECISIONS,
    ("tensorrt-rtx", "cpu"): _ALL_PRECISIONS,
}
_MEMORY_UNITS = {"MiB": 2**20, "KiB": 2**10, "GiB": 2**30}
_MAX_BATCH = 128  # of an engine, where a target does not say: what accuracy is usually measured with
_MAX_NUMBER = 1e12  # in any unit
_MAX_DIM = 2**24  # of a dynamic axis
_MAX_BATCH_SIZE = 2**20
_LIMIT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*")

# The units a budget may be given in, with the factor to the unit it is kept in (the one in the record's field names).
UNITS: dict[str, dict[str, float]] = {
    "latency_p50": {"ms": 1.0, "us": 1e-3, "s": 1e3},
    "peak_memory": {"MiB": 1.0, "KiB": 1 / 1024, "GiB": 1024.0},
    "file_size": {"MiB": 1.0, "KiB": 1 / 1024, "GiB": 1024.0},
    "params": {"k": 1e3, "M": 1e6, "G": 1e9},
    "macs": {"k": 1e3, "M": 1e6, "G": 1e9},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """An upper bound: `value` in the base unit of its budget, or as a fraction of the dense model's figure."""

    value: float
    is_relative: bool

    def absolute(self, dense: float) -> float:
        """The bound in the base unit, given the dense model's own figure."""
        return self.value * dense if self.is_relative else self.value


def parse_limit(name: str, text: str) -> Limit:
    """`"0.5x"` or `"4.0 ms"` -> Limit. Raises ValueError saying which units `name` takes."""
    units = UNITS[name]
    match = _LIMIT.fullmatch(text)
    if not match or match[2] not in {RELATIVE, *units}:
        example = f"'0.5x' of the dense model or '4 {next(iter(units))}'"
        problem = f"{name} = {shown(text)} is not a number with a unit"
        raise ValueError(f"{problem}; write {example} (units: x, {', '.join(units)})")
    number = float(match[1])
    if number <= 0:
        raise ValueError(f"{name} = {shown(text)} allows nothing; a budget is above zero")
    if number > _MAX_NUMBER:
        raise ValueError(f"{name} = {shown(text)} is too large; write {_MAX_NUMBER:g} or less")
    if match[2] == RELATIVE:
        return Limit(value=number, is_relative=True)
    return Limit(value=number * units[match[2]], is_relative=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Upper bounds the compressed model must meet. None: no bound.

    All but the accuracy take `"0.5x"` (of the dense model, measured in the same run) or a number with a unit.
    """

    latency_p50: str | None = None
    peak_memory: str | None = None
    file_size: str | None = None
    params: str | None = None
    macs: str | None = None
    accuracy_drop_pp: float = 1.0  # percentage points; the upper end of the paired interval must stay below
    slice_drop_pp: float | None = None  # the same for each of the task's slices (classes)
    latency_regression: float = 1.05  # times the latency of the bundle released before, where the gate is given one
    max_age_days: float | None = None  # of the measurements, when the gate is asked again

    def __post_init__(self) -> None:
        self.limits()
        require(
            self,
            accuracy_drop_pp=real(0, 1e6),  # metrics other than shares have points of their own
            slice_drop_pp=real(0, 1e6),
            latency_regression=above(0, 1e6),
            max_age_days=above(0, 100_000),
        )

    def limits(self) -> dict[str, Limit]:
        """The bounds that are set, by budget name."""
        texts = {f.name: getattr(self, f.name) for f in fields(self) if f.name in UNITS}
        return {name: parse_limit(name, text) for name, text in texts.items() if text is not None}


def parse_memory(name: str, text: str) -> int:
    """`"8 GiB"` -> bytes. Raises ValueError saying which units there are."""
    match = _LIMIT.fullmatch(text)
    if not match or match[2] not in _MEMORY_UNITS or not 0 < float(match[1]) <= _MAX_NUMBER:
        raise ValueError(f"{name} = {shown(text)} is no amount of memory; write it like '8 GiB' (units: KiB, MiB, GiB)")
    return int(float(match[1]) * _MEMORY_UNITS[match[2]])


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One device: what runs the model there, how to know the device, and how good the model has to be.

    `machine` to `runtime_version` say which machines may stand for the device (empty: any); on others an ONNX file is
    exported, an engine built where that can be done, and nothing is measured.
    """

    runtime: Runtime
    name: str = ""  # the file's stem, when it came from a file
    description: str = ""
    provider: Provider = "cpu"  # what onnxruntime (or eager torch) computes with
    provider_options: dict[str, str] = field(default_factory=dict)  # handed to onnxruntime as they are
    allow_cpu_fallback: bool = False  # may onnxruntime run on the CPU what the provider cannot?

    machine: str = ""  # processor family, as `uname -m` says it: x86_64, aarch64
    cpu_features: tuple[str, ...] = ()  # as in /proc/cpuinfo: avx512_vnni, asimddp
    board: str = ""  # part of the board's name (/proc/device-tree/model)
    is_portable: bool | None = None  # a laptop: True, a desktop or server: False
    gpu_names: tuple[str, ...] = ()  # words of the GPU's name, any of them
    compute_capabilities: tuple[str, ...] = ()  # NVIDIA's, "8.9"; TensorRT-RTX builds one engine for all of them
    runtime_version: str = ""  # the runtime's version begins with it: "10" or "10.3"
    memory: str = ""  # of the device, "8 GiB"

    precisions: tuple[Precision, ...] = ("fp32",)
    batch_size: int = 1
    batch_range: Range | None = None  # of an engine; None: 1, batch_size, 128 (or batch_size, if larger)
    dynamic_dims: dict[str, Range] = field(default_factory=dict)  # the same for other dynamic axes, by their names
    workspace: str = ""  # what a TensorRT builder may use as scratch memory, "1 GiB"; empty: all there is
    num_threads: int = 1
    channel_multiple: int = 1  # widths are kept at multiples of this
    num_latency_samples: int = 400  # at least; timed runs per file
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        if self.name and (problem := name_problem(self.name)):
            raise ValueError(f"name = {problem}")
        require(
            self,
            batch_size=whole(1, _MAX_BATCH_SIZE),
            num_threads=whole(1, 4_096),
            channel_multiple=whole(1, 4_096),
            num_latency_samples=whole(200, 10_000_000),
        )
        self._check_texts()
        self._check_provider()
        self._check_precisions()
        for capability in self.compute_capabilities:
            if not re.fullmatch(r"[0-9]{1,2}\.[0-9]", capability):
                raise ValueError(f"compute_capabilities: {shown(capability)} is none; write it like '8.9'")
        self._check_ranges()
        self._check_memory()

    @property
    def needs_gpu(self) -> bool:
        """Whether an NVIDIA GPU does the work."""
        return self.runtime in ("tensorrt", "tensorrt-rtx") or self.provider in ("cuda", "tensorrt")

    @property
    def batches(self) -> Range:
        """Batch sizes an engine is built for: least, the one to be fast at, most."""
        return self.batch_range or (1, self.batch_size, max(self.batch_size, _MAX_BATCH))

    @property
    def workspace_bytes(self) -> int | None:
        return parse_memory("workspace", self.workspace) if self.workspace else None

    @property
    def memory_bytes(self) -> int | None:
        return parse_memory("memory", self.memory) if self.memory else None

    def _check_texts(self) -> None:
        for key in ("machine", "board", "runtime_version", "memory", "workspace"):
            require_text(key, getattr(self, key))
        require_text("description", self.description, most=10_000)
        require_texts("cpu_features", self.cpu_features)
        require_texts("gpu_names", self.gpu_names)
        require_texts("provider_options", self.provider_options)
        require_texts("dynamic_dims", self.dynamic_dims.keys())

    def _check_provider(self) -> None:
        if (self.runtime, self.provider) not in _PRECISIONS:
            fitting = ", ".join(provider for runtime, provider in _PRECISIONS if runtime == self.runtime)
            if not self.runtime.startswith("tensorrt"):
                raise ValueError(f"provider = {self.provider!r} is none of {self.runtime}; write one of {fitting}")
            raise ValueError(f"provider = {self.provider!r} belongs to onnxruntime; leave it out for {self.runtime}")
        if self.provider_options and (self.runtime != "onnxruntime" or self.provider == "cpu"):
            raise ValueError(
                "provider_options: nothing takes them; name an onnxruntime provider other than cpu, or leave them out"
            )

    def _check_precisions(self) -> None:
        fitting = _PRECISIONS[self.runtime, self.provider]
        if not self.precisions:
            raise ValueError(f"precisions is empty; write one or more of {', '.join(fitting)}")
        if len(set(self.precisions)) < len(self.precisions):
            raise ValueError(f"precisions = {shown(self.precisions)} names one twice; write each once")
        for precision in self.precisions:
            if precision not in fitting:
                on = self.runtime if self.provider == "cpu" else f"{self.runtime} with {self.provider}"
                raise ValueError(f"precisions: {on} has no {precision!r}; write {', '.join(fitting)}")

    def _check_ranges(self) -> None:
        ranges = {"batch_range": self.batches, **{f"dynamic_dims.{n}": r for n, r in self.dynamic_dims.items()}}
        for key, (least, best, most) in ranges.items():
            if not 1 <= least <= best <= most <= _MAX_DIM:
                seen = shown([least, best, most])
                raise ValueError(f"{key} = {seen} is no range; write [least, usual, most], from 1 up to {_MAX_DIM}")
        least, _, most = self.batches
        if not least <= self.batch_size <= most:
            raise ValueError(f"batch_size = {self.batch_size} is outside batch_range = {[*self.batches]}; widen it")

    def _check_memory(self) -> None:
        workspace, memory = self.workspace_bytes, self.memory_bytes
        if workspace and memory and workspace > memory:
            raise ValueError(f"workspace = {self.workspace!r} is more than memory = {self.memory!r}; write less")
