"""golden.json: the model files of a folder, the hash of each file, and how far outputs may differ.

Standard library only: `deploypipe.verify` needs nothing else but numpy and onnxruntime. A file that lists nothing,
lists something twice, or has larger tolerances than the product is an error: a check that checks nothing would pass.
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
# How far a file's outputs may differ between machines, which have other kernels, other orders of summation and, in
# int8, another rounding at each layer. Relative to an output's largest magnitude.
TOLERANCES = {"fp32": 1e-3, "fp16": 1e-2, "int8": 5e-2}

_MAX_BYTES = 2**24
_MAX_SHOWN = 5
_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldenModel:
    """One model file, and how far its outputs may be from the stored ones."""

    file: str
    precision: str
    max_abs_error: float  # relative to the largest magnitude of the same output


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldenContent:
    """The contents of golden.json."""

    files: tuple[FileEntry, ...]
    models: tuple[GoldenModel, ...]
    num_cases: int


def read_golden(folder: Path) -> GoldenContent:
    """Read `folder`'s golden.json; ModelError if it is missing or not valid."""
    path = folder / GOLDEN
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):  # reading a pipe would wait
            raise ValueError("it is not a plain file")
        with path.open("rb") as stream:
            content = stream.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES} bytes")
        return _parse(json.loads(content, parse_constant=_no_number, object_pairs_hook=_without_repeats))
    except FileNotFoundError:
        raise ModelError(f"{folder}: has no {GOLDEN}; give the folder that `deploypipe run` wrote") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{path}: not understood ({type(error).__name__}: {error}); copy the folder again") from None


def shown(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = len(names) - _MAX_SHOWN
    return ", ".join(names[:_MAX_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _parse(content: Any) -> GoldenContent:
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']!r} is not {FORMAT!r}")
    golden = _typed(content, format=str, files=list, models=list, num_cases=int)
    files = tuple(FileEntry(**_typed(entry, name=str, sha256=str, size_bytes=int)) for entry in golden["files"])
    models = tuple(
        GoldenModel(**_typed(entry, file=str, precision=str, max_abs_error=float)) for entry in golden["models"]
    )
    _require_distinct("files", [file.name for file in files])
    _require_distinct("models", [model.file for model in models])
    if golden["num_cases"] < 1:
        raise ValueError(f"num_cases must be >= 1, got {golden['num_cases']}")
    for file in files:
        if len(file.sha256) != 64 or not _HEX.issuperset(file.sha256) or file.size_bytes < 0:
            raise ValueError(f"{file.name}: {file.sha256!r} with {file.size_bytes} bytes is not the sha256 of a file")
    for model in models:
        _require_tolerance(model)
    return GoldenContent(files=files, models=models, num_cases=golden["num_cases"])


def _typed(content: dict[str, Any], **types: type) -> dict[str, Any]:
    """The values of a JSON object that must have exactly these keys with these types."""
    for name, wanted in types.items():
        if type(content[name]) is not wanted:
            raise ValueError(f"{name} is {content[name]!r}")
    if unknown := sorted(content.keys() - types.keys()):
        raise ValueError(f"unknown key {shown(unknown)}")
    return {name: content[name] for name in types}


def _require_distinct(key: str, names: list[str]) -> None:
    if not names:
        raise ValueError(f"{key} is empty, so nothing would be checked")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{key} lists {shown(repeated)} more than once")


def _require_tolerance(model: GoldenModel) -> None:
    largest = TOLERANCES.get(model.precision)
    if largest is None:
        raise ValueError(f"{model.file}: precision must be one of {', '.join(TOLERANCES)}, got {model.precision!r}")
    if not (math.isfinite(model.max_abs_error) and 0 <= model.max_abs_error <= largest):
        raise ValueError(
            f"{model.file}: max_abs_error must be from 0 to {largest} in {model.precision}, got {model.max_abs_error}"
        )


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not a number")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} occurs more than once")
    return content
