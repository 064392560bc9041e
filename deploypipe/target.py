"""A target: one device and the budgets of a model on it. Read from `targets/*.toml`."""

import re
from dataclasses import dataclass, field, fields
from typing import Literal, TypeAlias

from deploypipe.budgets import BUDGETS
from deploypipe.text.field_bounds import above, real, require, require_text, require_texts, shown, whole
from deploypipe.text.safe_names import name_problem

RELATIVE = "x"
NO_LIMIT = 1000.0  # times the dense figure: a limit from here on bounds nothing
Runtime: TypeAlias = Literal["onnxruntime", "tensorrt", "tensorrt-rtx", "eager"]
Provider: TypeAlias = Literal["cpu", "cuda", "tensorrt", "openvino", "coreml", "qnn"]
Precision: TypeAlias = Literal["fp32", "fp16", "int8"]
Range: TypeAlias = tuple[int, int, int]  # smallest, usual (files are tuned for it), largest

_ALL_PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
# The precisions that each (runtime, provider) can run. The CoreML provider has no QuantizeLinear or DequantizeLinear
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
_MEMORY_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_MAX_BATCH = 128  # of an engine whose target gives no range; accuracy is usually measured with this size
_MAX_NUMBER = 1e12  # in any unit
_MAX_DIM = 2**24  # of a dynamic axis
_MAX_BATCH_SIZE = 2**20
_LIMIT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """An upper bound: `value` in its budget's own unit, or as a share of the dense model's figure."""

    value: float
    is_relative: bool

    @property
    def bounds_nothing(self) -> bool:
        """Whether it is so loose that it is none, as in a fast development run."""
        return self.is_relative and self.value >= NO_LIMIT

    def absolute(self, dense: float) -> float:
        """The bound in the budget's own unit, given the dense model's figure."""
        return self.value * dense if self.is_relative else self.value


def parse_limit(name: str, text: str) -> Limit:
    """Parse `"0.5x"` or `"4.0 ms"`. Raises ValueError with the units that the budget `name` takes."""
    units = BUDGETS[name].units
    match = _LIMIT.fullmatch(text)
    if not match or match[2] not in {RELATIVE, *units}:
        example = f"'0.5x' of the dense model or '4 {next(iter(units))}'"
        problem = f"{name} = {shown(text)} is not a number with a unit"
        raise ValueError(f"{problem}; write {example} (units: x, {', '.join(units)})")
    number = float(match[1])
    if number <= 0:
        raise ValueError(f"{name} must be above zero, got {shown(text)}; write a positive number")
    if number > _MAX_NUMBER:
        raise ValueError(f"{name} = {shown(text)} is too large; write {_MAX_NUMBER:g} or less")
    if match[2] == RELATIVE:
        return Limit(value=number, is_relative=True)
    return Limit(value=number * units[match[2]], is_relative=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Upper bounds that the compressed model must meet. None: no bound.

    A budget given as text is `"0.5x"` (of the dense model, measured in the same run) or a number with a unit;
    `deploypipe.budgets.BUDGETS` holds one row for each of them.
    """

    latency_p50: str | None = None  # median latency of the file
    peak_memory: str | None = None  # of a process that runs the file; of the GPU, if the file runs there
    file_size: str | None = None  # of the file
    params: str | None = None  # number of parameters
    macs: str | None = None  # multiply-accumulates of one sample
    accuracy_drop_pp: float = 1.0  # percentage points, for the upper end of the paired interval
    slice_drop_pp: float | None = None  # the same for each slice (class) of the task
    latency_regression: float = 1.05  # times the latency of the previous release, if the gate is given one
    max_age_days: float | None = None  # of the measurements, when the gate runs again

    def __post_init__(self) -> None:
        self._require_limits()
        require(
            self,
            accuracy_drop_pp=real(0, 1e6),  # a metric that is not a share has its own scale
            slice_drop_pp=real(0, 1e6),
            latency_regression=above(0, 1e6),
            max_age_days=above(0, 100_000),
        )

    def limits(self) -> dict[str, Limit]:
        """The bounds that are set, by budget name."""
        return {name: parse_limit(name, text) for name, text in self._texts().items()}

    def _texts(self) -> dict[str, str]:
        texts = {f.name: getattr(self, f.name) for f in fields(self) if f.name in BUDGETS}
        return {name: text for name, text in texts.items() if text is not None}

    def _require_limits(self) -> None:
        """Raise one ValueError for all limits that cannot be read, one a line."""
        problems = []
        for name, text in self._texts().items():
            try:
                parse_limit(name, text)
            except ValueError as error:
                problems.append(str(error))
        if problems:
            raise ValueError("\n".join(problems))

    @staticmethod
    def text_for_number(name: str, value: float) -> str:
        """What to write instead of a number without quotes and unit; "" if `name` is no limit."""
        if name not in BUDGETS:
            return ""
        unit = next(iter(BUDGETS[name].units))
        return f'write "{value:g}{RELATIVE}" (of the dense model) or "4.0 {unit}", in quotes'


def parse_memory(name: str, text: str) -> int:
    """Parse `"8 GiB"` into bytes. Raises ValueError with the known units."""
    match = _LIMIT.fullmatch(text)
    if not match or match[2] not in _MEMORY_UNITS or not 0 < float(match[1]) <= _MAX_NUMBER:
        units = ", ".join(_MEMORY_UNITS)
        raise ValueError(f"{name} = {shown(text)} is not an amount of memory; write it like '8 GiB' (units: {units})")
    return int(float(match[1]) * _MEMORY_UNITS[match[2]])


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One device: what runs the model there, how to recognise the device, and the budgets of the model.

    The fields from `machine` to `runtime_version` say which machines count as the device (empty: any). On any other
    machine an ONNX file is exported and an engine is built if possible, but nothing is measured.
    """

    runtime: Runtime  # what runs the model
    name: str = ""  # the file's stem if the target was read from a file
    description: str = ""  # for people
    provider: Provider = "cpu"  # of onnxruntime or eager torch
    provider_options: dict[str, str] = field(default_factory=dict)  # passed to onnxruntime unchanged
    allow_cpu_fallback: bool = False  # whether operators that the provider lacks may run on the CPU

    machine: str = ""  # processor family as in `uname -m`: x86_64, aarch64
    cpu_features: tuple[str, ...] = ()  # as in /proc/cpuinfo: avx512_vnni, asimddp
    board: str = ""  # part of the board's name (/proc/device-tree/model)
    is_portable: bool | None = None  # a laptop: True, a desktop or server: False
    gpu_names: tuple[str, ...] = ()  # parts of the GPU's name; one of them has to match
    compute_capabilities: tuple[str, ...] = ()  # NVIDIA's, "8.9"; TensorRT-RTX builds one engine for all of them
    runtime_version: str = ""  # prefix of the runtime's version: "10" or "10.3"
    memory: str = ""  # of the device, "8 GiB"

    precisions: tuple[Precision, ...] = ("fp32",)  # that may ship; the fastest one within the limits ships
    batch_size: int = 1  # for measuring latency and memory
    batch_range: Range | None = None  # of an engine; None: 1, batch_size, 128 (or batch_size, if larger)
    dynamic_dims: dict[str, Range] = field(default_factory=dict)  # the same for other dynamic axes, by name
    workspace: str = ""  # scratch memory of a TensorRT builder, "1 GiB"; empty: no limit
    num_threads: int = 1  # of the runtime
    cuda_graph: bool = False  # timed runs replay a CUDA graph, as a server of fixed shapes does; NVIDIA GPUs only
    channel_multiple: int = 1  # layer widths are multiples of this
    num_latency_samples: int = 400  # timed runs per file, at least
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
                raise ValueError(
                    f"compute_capabilities: {shown(capability)} is not a compute capability; write one like '8.9'"
                )
        self._check_ranges()
        self._check_memory()

    @property
    def needs_gpu(self) -> bool:
        """Whether the model runs on an NVIDIA GPU."""
        return self.runtime in ("tensorrt", "tensorrt-rtx") or self.provider in ("cuda", "tensorrt")

    @property
    def batches(self) -> Range:
        """Batch sizes that an engine is built for: smallest, usual, largest."""
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
        require_text("description", self.description, max_length=10_000)
        require_texts("cpu_features", self.cpu_features)
        require_texts("gpu_names", self.gpu_names)
        require_texts("provider_options", self.provider_options)
        require_texts("dynamic_dims", self.dynamic_dims.keys())

    def _check_provider(self) -> None:
        if (self.runtime, self.provider) not in _PRECISIONS:
            fitting = ", ".join(provider for runtime, provider in _PRECISIONS if runtime == self.runtime)
            if not self.runtime.startswith("tensorrt"):
                raise ValueError(f"provider = {self.provider!r} is not one of {self.runtime}; write one of {fitting}")
            raise ValueError(f"provider = {self.provider!r} belongs to onnxruntime; leave it out for {self.runtime}")
        if self.cuda_graph and (not self.needs_gpu or self.runtime == "eager"):
            raise ValueError("cuda_graph = true needs an NVIDIA GPU and onnxruntime or TensorRT; leave it out")
        if self.provider_options and (self.runtime != "onnxruntime" or self.provider == "cpu"):
            raise ValueError(
                "provider_options need an onnxruntime provider other than cpu; name that provider, or leave them out"
            )

    def _check_precisions(self) -> None:
        fitting = _PRECISIONS[self.runtime, self.provider]
        if not self.precisions:
            raise ValueError(f"precisions is empty; write one or more of {', '.join(fitting)}")
        if len(set(self.precisions)) < len(self.precisions):
            raise ValueError(f"precisions = {shown(self.precisions)} has duplicates; write each precision once")
        for precision in self.precisions:
            if precision not in fitting:
                on = self.runtime if self.provider == "cpu" else f"{self.runtime} with {self.provider}"
                raise ValueError(f"precisions: {on} has no {precision!r}; write {', '.join(fitting)}")

    def _check_ranges(self) -> None:
        ranges = {"batch_range": self.batches, **{f"dynamic_dims.{n}": r for n, r in self.dynamic_dims.items()}}
        for key, (smallest, usual, largest) in ranges.items():
            if not 1 <= smallest <= usual <= largest <= _MAX_DIM:
                seen = shown([smallest, usual, largest])
                remedy = f"write [smallest, usual, largest], from 1 to {_MAX_DIM}"
                raise ValueError(f"{key} = {seen} is not a range; {remedy}")
        smallest, _, largest = self.batches
        if not smallest <= self.batch_size <= largest:
            raise ValueError(f"batch_size = {self.batch_size} is outside batch_range = {[*self.batches]}; widen it")

    def _check_memory(self) -> None:
        workspace, memory = self.workspace_bytes, self.memory_bytes
        if workspace and memory and workspace > memory:
            raise ValueError(f"workspace = {self.workspace!r} is more than memory = {self.memory!r}; write less")
