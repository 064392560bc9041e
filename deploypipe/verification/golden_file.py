"""golden.json: which model files a folder holds, with the hash of each file and how far answers may differ.

Standard library only, like all that `deploypipe.verify` needs beside numpy and onnxruntime. A file that lists nothing,
says something twice, or allows more than the product allows, is refused: it would let a check pass that checks nothing.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploypipe.errors import ModelError
from deploypipe.records import FileEntry

GOLDEN, TENSORS = "golden.json", "golden.safetensors"
FORMAT = "deploypipe-golden-1"
# How far one file's answers on one machine may be from those on another: other kernels, other orders of summation, and
# in int8 another rounding at each layer. Relative to an output's largest magnitude.
TOLERANCES = {"fp32": 1e-3, "fp16": 1e-2, "int8": 5e-2}

_MAX_BYTES = 2**24
_MAX_SHOWN = 5
_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldenModel:
    """One model file, and how far its answers may be from those stored."""

    file: str
    precision: str
    max_abs_error: float  # relative to the largest magnitude of the same output


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldenContent:
    """What golden.json says."""

    files: tuple[FileEntry, ...]
    models: tuple[GoldenModel, ...]
    num_cases: int


def read_golden(folder: Path) -> GoldenContent:
    """Read `folder`'s golden.json; ModelError where it is absent, or says too little, too much or nothing sensible."""
    path = folder / GOLDEN
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):  # a pipe would be waited for
            raise ValueError("it is no plain file")
        with path.open("rb") as stream:
            content = stream.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ValueError(f"more than {_MAX_BYTES} bytes are too many")
        return _parse(json.loads(content, parse_constant=_no_number, object_pairs_hook=_without_repeats))
    except FileNotFoundError:
        raise ModelError(f"{folder}: holds no {GOLDEN}; give the folder that `deploypipe run` filled") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{path}: not understood ({type(error).__name__}: {error}); copy the folder again") from None


def shown(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = len(names) - _MAX_SHOWN
    return ", ".join(names[:_MAX_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _parse(content: Any) -> GoldenContent:
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']!r} is not {FORMAT!r}")
    told = _typed(content, format=str, files=list, models=list, num_cases=int)
    files = tuple(FileEntry(**_typed(entry, name=str, sha256=str, size_bytes=int)) for entry in told["files"])
    models = tuple(
        GoldenModel(**_typed(entry, file=str, precision=str, max_abs_error=float)) for entry in told["models"]
    )
    _require_distinct("files", [file.name for file in files])
    _require_distinct("models", [model.file for model in models])
    if told["num_cases"] < 1:
        raise ValueError(f"num_cases must be >= 1, got {told['num_cases']}")
    for file in files:
        if len(file.sha256) != 64 or not _HEX.issuperset(file.sha256) or file.size_bytes < 0:
            raise ValueError(f"{file.name}: {file.sha256!r} with {file.size_bytes} bytes is no sha256 of a file")
    for model in models:
        _require_tolerance(model)
    return GoldenContent(files=files, models=models, num_cases=told["num_cases"])


def _typed(content: dict[str, Any], **types: type) -> dict[str, Any]:
    """The values of a JSON object that has these keys, of these types, and no others."""
    for name, wanted in types.items():
        if type(content[name]) is not wanted:
            raise ValueError(f"{name} is {content[name]!r}")
    if unknown := sorted(content.keys() - types.keys()):
        raise ValueError(f"unknown key {shown(unknown)}")
    return {name: content[name] for name in types}


def _require_distinct(key: str, names: list[str]) -> None:
    if not names:
        raise ValueError(f"{key} is empty, so that nothing would be checked")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{key} lists {shown(repeated)} more than once")


def _require_tolerance(model: GoldenModel) -> None:
    most = TOLERANCES.get(model.precision)
    if most is None:
        raise ValueError(f"{model.file}: precision {model.precision!r} is none of {', '.join(TOLERANCES)}")
    if not (math.isfinite(model.max_abs_error) and 0 <= model.max_abs_error <= most):
        raise ValueError(
            f"{model.file}: max_abs_error must be between 0 and {most} in {model.precision}, got {model.max_abs_error}"
        )


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} is given more than once")
    return content
