"""A machine that runs out of something: one line says what, what is kept and how to go on; and the run goes on."""

import os
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny_pipeline as tiny
import torch
from onnx import helper
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from deploypipe import compress
from deploypipe.cli import app
from deploypipe.errors import DeploypipeError, ExhaustedError, RunFolderError
from deploypipe.files.atomic import write_atomically
from deploypipe.files.exhausted_resources import find_exhaustion
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.records import Event, Started
from deploypipe.runs.result import RunResult


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def full(disk: Path) -> Iterator[None]:
    filler = disk / "filler"
    with filler.open("wb") as stream:
        try:
            while True:
                stream.write(bytes(4096))
                stream.flush()
        except OSError:
            stream.raw.close()
    yield
    filler.unlink()


@contextmanager
def limited(kind: int, amount: int) -> Iterator[None]:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (amount, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def run(
    folder: Path, at: str = "", do: Callable[[], object] = lambda: None, model: nn.Module | None = None
) -> RunResult:
    """A run in `folder` at whose stage `at` something happens."""

    def notify(event: Event) -> None:
        if event == Started(stage=at):
            do()

    model = model or tiny.build_model()
    return compress(model, tiny.load_data(), tiny.task(), tiny.recipe(), tiny.target(), folder, notify=notify)


def test_a_run_goes_on_after_all_that_a_machine_can_run_out_of(disk: Path) -> None:
    folder = disk / "run"
    num_open = len(os.listdir("/proc/self/fd"))
    faults: list[tuple[str, Any, str]] = [
        ("score", lambda: full(disk), "the disk is full; free some space"),
        (
            "search",
            lambda: limited(resource.RLIMIT_NOFILE, num_open),
            "too many files are open",
        ),
        (
            "finetune",
            lambda: limited(resource.RLIMIT_FSIZE, 1000),
            "a file would be larger than this system allows",
        ),
    ]
    done: set[str] = set()
    for stage, fault, told in faults:
        entered = fault()
        try:
            with pytest.raises(DeploypipeError) as stopped:
                run(folder, stage, entered.__enter__)
        finally:
            entered.__exit__(None, None, None)
        assert isinstance(stopped.value, ExhaustedError), stopped.value
        assert str(stopped.value).startswith(str(folder)) and told in str(stopped.value), stopped.value
        assert str(stopped.value).endswith("run the same command again: it goes on after the last finished stage")
        assert not [path for path in folder.rglob(".*.part")]
        records = {path.name for path in folder.glob("[0-9][0-9]-*.json")}
        assert done < records  # what was finished is kept, and more was since
        done = records
    result = run(folder)
    assert {time.stage for time in result.stages if time.was_cached} >= {"observe", "score"}
    assert result.search and not (folder / "filler").exists()


def test_a_folder_that_is_deleted_under_the_run(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="run: was deleted or moved while the run was at work in it"):
        run(tmp_path / "run", "score", lambda: shutil.rmtree(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


class Greedy(nn.Module):
    """Asks for more memory than there is, on batches larger than `most`."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.inner, self.most = tiny.Network(), most

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + (torch.empty(2**46)[0] if len(x) > self.most else 0)


@pytest.mark.parametrize("most", [0, 2, 64])  # at the first look, while tracing, on val
def test_memory_that_is_used_up_is_nobodys_fault(most: int, tmp_path: Path) -> None:
    with pytest.raises(ExhaustedError, match="out of memory; end other programs"):
        run(tmp_path / "run", model=Greedy(most).eval())


class LateGreedy(nn.Module):
    """Asks for more memory than there is, from a forward pass on."""

    passes_left = 0

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny.Network()

    def forward(self, x: Tensor) -> Tensor:
        LateGreedy.passes_left -= 1
        if LateGreedy.passes_left < 0:
            torch.empty(2**46)
        return self.inner(x)


def test_memory_that_is_used_up_is_no_reason_to_keep_a_layer() -> None:
    model, inputs = LateGreedy().eval(), torch.zeros(2, 1, 6, 6)
    for number in range(100):
        LateGreedy.passes_left = number
        try:
            found = list_structures(model, inputs)
        except Exception as error:
            assert find_exhaustion(error), error
            continue
        break
    assert number > 4 and found.groups and not [row for row in found.frozen if "memory" in row.reason]


def large_tensor() -> object:
    return torch.empty(2**46)


def large_array() -> object:
    return np.empty(2**46)


@pytest.mark.parametrize("fail", [large_tensor, large_array])
def test_what_libraries_make_of_used_up_memory_is_known(fail: Callable[[], object]) -> None:
    with pytest.raises(Exception) as raised:
        fail()
    found = find_exhaustion(raised.value)
    assert found and "out of memory" in found[0]
    assert find_exhaustion(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


@pytest.mark.parametrize(
    "write",
    [
        lambda path: save_file({"x": torch.zeros(2**20)}, path),
        lambda path: torch.save(torch.zeros(2**20), path),
        lambda path: path.write_bytes(bytes(2**20)),
        lambda path: np.savez(path, x=np.zeros(2**20)),
        lambda path: onnx.save(helper.make_model(helper.make_graph([], "x" * 2**20, [], [])), path),
    ],
)
def test_what_libraries_make_of_a_full_disk_is_known(write: Callable[[Path], object], disk: Path) -> None:
    with full(disk), pytest.raises(Exception) as raised:
        write(disk / "x.npz")
    found = find_exhaustion(raised.value)
    assert found and "the disk is full" in found[0], raised.value


def test_a_command_says_it_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipe.py").write_text(
        "from tiny_pipeline import *\ndef load_data(): raise OSError(28, 'No space left on device', 'cache.bin')\n"
    )
    (tmp_path / "cpu.toml").write_text('runtime = "onnxruntime"\n')
    done = CliRunner().invoke(app, ["run", "./pipe.py", "./cpu.toml"])
    assert done.exit_code == 2
    assert done.output.splitlines()[-1] == "error: cache.bin: the disk is full; free some space"
    program = [sys.executable, "-m", "deploypipe"]
    with Path("/dev/full").open("wb") as out:
        told = subprocess.run([*program, "targets"], stdout=out, stderr=subprocess.PIPE, text=True)
    assert told.returncode == 2 and told.stderr.startswith("error: the disk is full; free some space")
    assert "Traceback" not in told.stderr
    piped = subprocess.run(f"{shlex.join(program)} targets | head -n 1", shell=True, capture_output=True, text=True)
    assert piped.stderr == ""


def test_a_machine_too_small_for_torch() -> None:
    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (300 * 2**20, 300 * 2**20))

    told = subprocess.run(
        [sys.executable, "-m", "deploypipe", "doctor"], preexec_fn=lower, capture_output=True, text=True
    )
    assert told.returncode == 2 and told.stderr.splitlines()[-1].startswith("error: ")
    assert "out of memory" in told.stderr and "Traceback" not in told.stderr


def test_nothing_half_written_is_left(tmp_path: Path) -> None:
    with limited(resource.RLIMIT_FSIZE, 1000), pytest.raises(OSError):
        write_atomically(tmp_path / "x.json", bytes(5000))
    assert list(tmp_path.iterdir()) == []
