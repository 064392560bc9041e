"""Read the golden samples' tensors from a safetensors file with numpy alone."""

import json
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from deploypipe.errors import ModelError

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_MAX_HEADER_BYTES, _MAX_TENSOR_BYTES = 2**24, 2**30  # of golden.safetensors, which holds a few samples
_DTYPES = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1", "BOOL": "?"}
_DTYPES |= {"U64": "u8", "U32": "u4", "U16": "u2", "U8": "u1"}


def tensor_name(case: int, model: str, name: str) -> str:
    """The name of an input (`model` empty) or of a model's output in golden.safetensors."""
    return f"{model or 'input'}/{case}/{name}"


def read_tensors(path: Path) -> dict[str, Array]:
    """Read a safetensors file; ModelError if it is not one, or larger than golden samples are."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            header_size = int.from_bytes(stream.read(8), "little")
            if header_size > min(_MAX_HEADER_BYTES, size - 8) or size > _MAX_TENSOR_BYTES:
                raise ValueError(f"{size} bytes with a header of {header_size} are not golden samples")
            header = json.loads(stream.read(header_size))
            header.pop("__metadata__", None)
            content = memoryview(stream.read(_MAX_TENSOR_BYTES))
        return {name: _read_tensor(content, entry) for name, entry in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{path}: is not a safetensors file ({type(error).__name__}: {error}); copy it again"
        ) from None


def _read_tensor(content: memoryview, entry: dict[str, Any]) -> Array:
    begin, end = entry["data_offsets"]
    dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), entry["shape"]
    if (
        not 0 <= begin <= end <= len(content)
        or prod(shape) * dtype.itemsize != end - begin
        or min(shape, default=0) < 0
    ):
        raise ValueError(f"shape {shape} does not fit the bytes {begin} to {end}")
    return np.frombuffer(content[begin:end], dtype).reshape(shape)
