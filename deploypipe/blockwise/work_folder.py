"""The folder of a blockwise run: its finished blocks, and the state from which an interrupted run resumes."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deploypipe.blockwise.prune_block import PrunedBlock, Streams
from deploypipe.errors import RunFolderError
from deploypipe.files.atomic import write_atomically
from deploypipe.files.json_records import from_json, to_json
from deploypipe.networks.streamed_weights import WeightFiles

_WORK, _ABOUT = ".work", "about.json"  # in the folder until the network is complete
_KINDS = ("dense", "pruned")


class WorkFolder:
    """The pruned blocks, and the state from which an interrupted run resumes."""

    def __init__(self, folder: Path, about: Mapping[str, str]) -> None:
        self.folder, self.path = folder, folder / _WORK
        if folder.exists() and any(folder.iterdir()) and not self.path.is_dir():
            raise RunFolderError(f"{folder} is not empty; name an empty or a new folder")
        self.path.mkdir(parents=True, exist_ok=True)
        content = to_json(dict(about)).encode()
        if (self.path / _ABOUT).is_file() and (self.path / _ABOUT).read_bytes() != content:
            raise RunFolderError(
                f"{folder} holds a run with another network, other samples or other settings; use those again, or "
                f"remove the folder"
            )
        write_atomically(self.path / _ABOUT, content)

    def finished(self, count: int) -> list[PrunedBlock]:
        """The finished blocks, up to the first unfinished one."""
        rows: list[PrunedBlock] = []
        for number in range(count):
            path = self._row(number)
            if not path.is_file():
                break
            rows.append(from_json(PrunedBlock, path.read_bytes(), str(path)))
        return rows

    def streams(self, number: int) -> Streams:
        """The inputs of the block with that number."""
        content = load_file(self._streams(number))
        count = len(content) // 2
        return [content[f"dense.{i}"] for i in range(count)], [content[f"pruned.{i}"] for i in range(count)]

    def finish(self, number: int, row: PrunedBlock, weights: dict[str, Tensor], streams: Streams) -> None:
        """Save one block. The row is written last; without it the block is unfinished."""
        save_file(weights, self._part(number))
        named = {
            f"{kind}.{i}": value.contiguous()
            for kind, own in zip(_KINDS, streams, strict=True)
            for i, value in enumerate(own)
        }
        save_file(named, self._streams(number + 1))
        write_atomically(self._row(number), to_json(row).encode())
        self._streams(number).unlink(missing_ok=True)

    def parts(self, count: int) -> list[Path]:
        return [self._part(number) for number in range(count)]

    def write_rest(self, files: WeightFiles, model: nn.Module, names: Sequence[str]) -> Path:
        """Copy the weights outside the blocks from the files, where shared weights may be stored once."""
        stored = [name for name in model.state_dict() if name in files.names]
        outside = [name for name in stored if not any(name.startswith(f"{block}.") for block in names)]
        path = self.folder / "weights-outside.safetensors"
        save_file(files.read(outside), path)
        return path

    def remove(self) -> None:
        shutil.rmtree(self.path)

    def _part(self, number: int) -> Path:
        return self.folder / f"weights-{number:05d}.safetensors"

    def _streams(self, number: int) -> Path:
        return self.path / f"streams-{number:05d}.safetensors"

    def _row(self, number: int) -> Path:
        return self.path / f"block-{number:05d}.json"
