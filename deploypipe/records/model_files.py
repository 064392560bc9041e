"""Model files: ONNX, converted, and engines."""

import hashlib
from dataclasses import dataclass, field
from typing import Literal

from deploypipe.records.interval import Interval
from deploypipe.records.structures import Names


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """One file and its expected contents."""

    name: str  # without a folder
    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """How far outputs are from the expected ones, over all samples; each figure is that of the worst output."""

    max_abs_error: float  # relative to the largest magnitude of the same output
    mean_abs_error: float  # relative, too
    cosine: float  # of each output as one long vector; 1: same direction
    top1_agreement: float | None  # share of samples, for a first output (n, classes); else None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFile:
    path: str  # relative to the run folder
    sha256: str
    size_bytes: int  # with the files in `data`
    precision: str
    opset: int
    max_abs_error: float  # against eager, on real batches
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    data: tuple[FileEntry, ...] = ()  # files next to it with weights too large for one file; move them with it
    parity: Parity | None = None  # against eager, on real batches
    from_dense: Parity | None = None  # the network itself against the dense one, both in eager torch
    tested_sizes: dict[str, tuple[int, int]] = field(default_factory=dict)  # dynamic axis -> least, largest in `parity`

    @property
    def identity(self) -> str:
        """One hash of the file and of those in `data`: a graph whose weights lie elsewhere may be that of others."""
        if not self.data:
            return self.sha256
        return hashlib.sha256("".join([self.sha256, *(entry.sha256 for entry in self.data)]).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class CandidateFile:
    """The fp32 file of a pruned network, made from the template of the dense one."""

    path: str  # relative to the folder it is in
    size_bytes: int
    reason: str = ""  # why it was exported instead; "" if it was not


@dataclass(frozen=True, kw_only=True, slots=True)
class FloatLayer:
    """A node that a conversion left in fp32."""

    layer: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """The result of one way to choose ranges, with every layer in 8 bits, on samples not used to calibrate."""

    method: str
    mean_abs_error: float  # against the fp32 file, as in `Parity`
    accuracy: float | None  # None: it was not measured


@dataclass(frozen=True, kw_only=True, slots=True)
class Converted:
    """A file in another precision than fp32, and how it was made."""

    file: ModelFile  # its errors are against the fp32 file, on real samples
    num_layers: int  # nodes that can be converted: all that compute (fp16), or convolutions and products (int8)
    num_converted: int
    kept_float: tuple[FloatLayer, ...]
    runtime: str = ""  # whose recipe int8 followed
    # Kernels that an int8 file may run on. "exact": they add 8-bit products in 32 bits (x86 with VNNI, ARM, GPUs).
    # "any": its weights have 7 bits, so that kernels that add pairs in 16 bits (x86 without VNNI) do not saturate.
    int8_arithmetic: Literal["", "exact", "any"] = ""
    num_calib_samples: int = 0
    method: str = ""  # of `calibrations`, the one chosen
    calibrations: tuple[Calibration, ...] = ()
    is_bias_corrected: bool = False
    accuracy_fp32: float | None = None  # by the same judge as `accuracy`
    accuracy: float | None = None
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionRow:
    """One precision of the target: its file, or the reason why there is none."""

    precision: str
    file: ModelFile | None
    conversion: Converted | None = None  # None for fp32
    latency_ratio: Interval | None = None  # to fp32, interleaved; None if it was not timed
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionChoice:
    """All precisions of the target for one network, and the one that ships."""

    rows: tuple[PrecisionRow, ...]  # fp32 first
    chosen: str
    reason: str

    @property
    def row(self) -> PrecisionRow:
        """The row of the precision that ships."""
        return next(row for row in self.rows if row.precision == self.chosen)

    @property
    def file(self) -> ModelFile:
        """The file that ships."""
        return next(row.file for row in self.rows if row.precision == self.chosen and row.file)


@dataclass(frozen=True, kw_only=True, slots=True)
class Golden:
    """Real samples and the outputs of a folder's model files for them, for `deploypipe verify`."""

    files: tuple[FileEntry, ...]  # all that the folder must hold, golden.json last
    models: tuple[str, ...]
    num_samples: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineKey:
    """The versions and hardware that an engine was built for. It runs only on a machine where all of them match."""

    library: str  # tensorrt, tensorrt-rtx
    version: str
    compute_capabilities: Names  # "8.9"; one, unless it was built ahead of time for several
    driver: str  # of the GPU it was built on, or the Jetson's L4T; "" where it was built ahead of time
    platform: str  # "Linux x86_64"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLayer:
    """One layer of an engine, and the ONNX nodes that it computes."""

    name: str
    kind: str
    output_types: Names
    nodes: Names


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineFile:
    """A TensorRT engine. It is executable code: only a file with this hash is loaded, and only if `key` fits."""

    path: str  # next to this record
    sha256: str
    size_bytes: int
    onnx_sha256: str  # of the file to rebuild it from
    key: EngineKey
    precision: str  # of the ONNX file
    flags: Names  # BuilderFlags in force, the library's own defaults among them
    profile: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]  # dynamic inputs: min, opt, max
    build_seconds: float
    layers: tuple[EngineLayer, ...]
    layers_source: str  # where the table comes from, or why it is empty
    log: str  # name of the builder's log, next to this record
