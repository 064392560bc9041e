"""Make the batch that a file is measured on: the user's own, or random values that fit the file's declaration."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import onnx

from deploypipe.errors import DataError
from deploypipe.runtimes import Array
from deploypipe.untrusted_files.onnx_file_check import check_onnx_file

_SOME_VALUES = 2  # integers of unknown use are 0 or 1: an index, a flag or a length that most graphs accept
_MAX_VALUES = 2**28  # of all random inputs
_MAX_BYTES = 2**33  # of a file with a batch
_IMAGE_VALUES = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class InputSpec:
    """One input as an ONNX file declares it."""

    name: str
    dtype: np.dtype[Any] | None  # None: a type that numpy or the runtime's Python interface lacks
    shape: tuple[int | str, ...]  # an axis of any size is its name, or "" if it has none
    num_values: int  # integers from 0 up to this, exclusive, are safe

    def __str__(self) -> str:
        sizes = ", ".join(str(size) or "?" for size in self.shape)
        return f"{self.name} {self.dtype or 'of another type'} [{sizes}]"


def read_specs(path: Path) -> tuple[InputSpec, ...]:
    """Read the inputs of an ONNX file. ModelError if the file is absent, damaged or hostile."""
    check_onnx_file(path)
    graph = onnx.load(path, load_external_data=False).graph
    constants = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    return tuple(
        InputSpec(
            name=value.name,
            dtype=_dtype(value.type),
            shape=tuple(
                dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else dim.dim_param
                for dim in value.type.tensor_type.shape.dim
            ),
            num_values=_num_values(graph, value.name, constants),
        )
        for value in graph.input
        if value.name not in constants  # before IR version 4 weights were inputs too
    )


def make_inputs(
    path: Path, specs: Sequence[InputSpec], batch_size: int, shapes: Mapping[str, Sequence[int]], *, seed: int = 0
) -> dict[str, Array]:
    """Make random values: normal floats, integers in the range that the graph is known to accept, masks of ones.

    A first axis of any size gets `batch_size`. `shapes` holds whole shapes by input. DataError if a size is unknown, or
    a shape does not fit.
    """
    unknown = sorted(set(shapes) - {spec.name for spec in specs})
    if unknown:
        raise DataError(f"{path}: there is no input {', '.join(unknown)}; it takes {_listed(specs)}")
    open_ = [
        spec for spec in specs if spec.name not in shapes and any(isinstance(size, str) for size in spec.shape[1:])
    ]
    if open_:
        examples = " ".join(f"--shape {spec.name}={'x'.join(_example(spec, batch_size))}" for spec in open_)
        raise DataError(
            f"{path}: takes {_listed(open_)}, which have axes of any size other than the batch; set them, for example "
            f"{examples}, or give --inputs FILE"
        )
    odd = [spec for spec in specs if spec.dtype is None]
    if odd:
        raise DataError(f"{path}: random values cannot be made for {_listed(odd)}; give --inputs FILE")
    generator = np.random.default_rng(seed)
    made: dict[str, Array] = {}
    for spec in specs:
        declared = tuple(batch_size if isinstance(size, str) else size for size in spec.shape)
        shape = tuple(shapes.get(spec.name, declared))
        count = prod(shape) + sum(array.size for array in made.values())
        if count > _MAX_VALUES:
            raise DataError(
                f"{path}: inputs up to {spec.name} of shape {list(shape)} would have {count:,} values, and at most "
                f"{_MAX_VALUES:,} are allowed; give a smaller --shape, or --inputs FILE"
            )
        made[spec.name] = _make(spec, shape, generator)
    check_inputs(path, specs, made)
    return made


def load_inputs(path: Path) -> dict[str, Array]:
    """Load named arrays from .npz or .safetensors. DataError if the file is absent, of another kind, or damaged."""
    try:
        if path.suffix == ".safetensors":
            from safetensors import SafetensorError
            from safetensors.numpy import load_file

            try:
                return dict(load_file(path))
            except SafetensorError as error:
                raise ValueError(str(error)) from None
        archive = np.load(path, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise ValueError("one array without a name")
        with archive:
            unpacked = sum(entry.file_size for entry in archive.zip.infolist())
            if unpacked > _MAX_BYTES:
                raise ValueError(f"{unpacked:,} bytes unpacked, and at most {_MAX_BYTES:,} are allowed")
            arrays = {name: archive[name] for name in archive.files}
        if odd := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
            raise ValueError(f"{odd[0]!r} in it is not an array")
        return arrays
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None
    except (ValueError, EOFError, BadZipFile, MemoryError) as error:
        raise DataError(
            f"{path}: holds no named arrays ({str(error).partition(chr(10))[0]}); write it with numpy.savez or "
            "safetensors.numpy.save_file, one array for each input"
        ) from None


def check_inputs(path: Path, specs: Sequence[InputSpec], inputs: Mapping[str, Array]) -> None:
    """DataError that lists every misfit, if the file at `path` does not accept these arrays."""
    wrong = [f"{spec.name} is missing" for spec in specs if spec.name not in inputs]
    wrong += [f"there is no input {name}" for name in inputs if name not in {spec.name for spec in specs}]
    for spec in specs:
        if spec.name in inputs:
            array = inputs[spec.name]
            fits = len(array.shape) == len(spec.shape) and all(
                seen > 0 and (isinstance(size, str) or size == seen)
                for size, seen in zip(spec.shape, array.shape, strict=True)
            )
            if not fits or (spec.dtype is not None and array.dtype != spec.dtype):
                wrong.append(f"{spec.name} is {array.dtype} {list(array.shape)}")
    if wrong:
        raise DataError(
            f"{path}: takes {_listed(specs) or 'no inputs'}, and {'; '.join(wrong)}; give inputs that fit (two files "
            "are compared on the same)"
        )


def has_open_batch(specs: Sequence[InputSpec]) -> bool:
    """Whether the first axis of every input may have any size."""
    return bool(specs) and all(spec.shape and isinstance(spec.shape[0], str) for spec in specs)


def _make(spec: InputSpec, shape: tuple[int, ...], generator: np.random.Generator) -> Array:
    assert spec.dtype is not None  # the caller checked
    if spec.dtype.kind == "f":
        return np.asarray(generator.standard_normal(shape), dtype=spec.dtype)
    if spec.dtype.kind == "b" or "mask" in spec.name.lower():
        return np.ones(shape, dtype=spec.dtype)
    most = int(np.iinfo(spec.dtype).max) + 1
    return np.asarray(generator.integers(min(spec.num_values, most), size=shape), dtype=spec.dtype)


def _num_values(graph: onnx.GraphProto, name: str, constants: Mapping[str, tuple[int, ...]]) -> int:
    """Rows of the smallest table that the input, or a cast of it, indexes; else a number by the input's type."""
    names = {name}
    rows = []
    for node in graph.node:  # in the order of execution
        if node.op_type in ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze") and node.input[0] in names:
            names.add(node.output[0])
        if node.op_type == "Gather" and node.input[1] in names and constants.get(node.input[0]):
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            rows.append(constants[node.input[0]][axis])
    if rows:
        return max(1, min(rows))
    types = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    return _IMAGE_VALUES if types[name] == onnx.TensorProto.UINT8 else _SOME_VALUES


def _dtype(declared: onnx.TypeProto) -> np.dtype[Any] | None:
    """The type, if its values can be drawn: floats, integers, booleans; else None."""
    if not declared.HasField("tensor_type"):
        return None
    try:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(declared.tensor_type.elem_type))
    except (KeyError, ValueError):
        return None
    return dtype if dtype.kind in "fiub" and dtype.isbuiltin == 1 else None


def _example(spec: InputSpec, batch_size: int) -> list[str]:
    return [str(batch_size if i == 0 else 128) if isinstance(s, str) else str(s) for i, s in enumerate(spec.shape)]


def _listed(specs: Sequence[InputSpec]) -> str:
    return ", ".join(map(str, specs))
