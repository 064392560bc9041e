"""Checkpoints of a training: one file per epoch, written whole or not at all, with a hash of its contents."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deploypipe.errors import ConfigError
from deploypipe.files.json_records import from_json, to_json
from deploypipe.networks.tree_hashes import digest_of
from deploypipe.records import TrainLog

Checkpoint: TypeAlias = tuple[TrainLog, dict[str, Tensor]]

_LOG, _DIGEST = "log", "digest"


def store_checkpoint(folder: Path, log: TrainLog, tensors: Mapping[str, Tensor]) -> None:
    """Write the state after the last epoch of `log`, and delete older checkpoints."""
    epoch, text = len(log.epochs) - 1, to_json(log)
    part = folder / f".epoch-{epoch}.part"
    contents = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(contents, part, metadata={_LOG: text, _DIGEST: _digest(text, contents)})
    part.replace(folder / f"epoch-{epoch}.safetensors")
    for older in folder.glob("epoch-*.safetensors"):
        if older.name != f"epoch-{epoch}.safetensors":
            older.unlink()


def load_checkpoint(folder: Path) -> tuple[Checkpoint | None, str]:
    """The newest checkpoint in `folder`; None if there is none, or if it is damaged, which the text then reports."""
    files = sorted(folder.glob("epoch-*.safetensors"), key=lambda path: int(path.stem.removeprefix("epoch-")))
    if not files:
        return None, ""
    try:
        with safe_open(files[-1], framework="pt") as stored:
            metadata = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (a file, not a mapping)
        if metadata[_DIGEST] == _digest(metadata[_LOG], tensors):
            return (from_json(TrainLog, metadata[_LOG], str(files[-1])), tensors), ""
    except (OSError, SafetensorError, KeyError, ConfigError):
        pass
    return None, f"the checkpoint {files[-1].name} was damaged, so the training began again"


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    names = sorted(tensors)
    return digest_of([text, *names, *(tensors[name] for name in names)])
