"""A program or a pickle from elsewhere is not run, whatever entrance it comes through, unless a person says so."""

import io
import json
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from releasable_run import write_run
from torch import nn
from typer.testing import CliRunner

from deploypipe.benchmark.input_batches import load_inputs
from deploypipe.cli import app
from deploypipe.errors import DataError, ModelError
from deploypipe.files.hashing import file_sha256
from deploypipe.networks.streamed_weights import WeightFiles
from deploypipe.pruning.surgery.plan import empty_plan
from deploypipe.pruning.surgery.saved_network import load_saved, save_pruned
from deploypipe.pruning.tracing.bug_report import reproduce
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.release.bundle import make_bundle

RUNNER = CliRunner()


class Exploit:
    """Unpickled, it makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def pickled(trace: Path) -> bytes:
    stream = io.BytesIO()
    torch.save(Exploit(trace), stream)
    return stream.getvalue()


def in_the_samples(parts: dict[str, bytes], trace: Path) -> None:
    """Where torch falls back to unrestricted unpickling."""
    (name,) = [name for name in parts if "sample_inputs" in name]
    parts[name] = pickled(trace)


def in_an_expression(parts: dict[str, bytes], trace: Path) -> None:
    """No pickle at all: torch evaluates the sizes of a program as Python."""
    (name,) = [name for name in parts if name.endswith("models/model.json")]
    text = parts[name].decode()
    (size,) = set(re.findall(r'"expr_str": "(Symbol\(.*?\))"', text))
    parts[name] = text.replace(size, f"__import__('pathlib').Path({str(trace)!r}).touch() or {size}").encode()


PLANTS = [in_the_samples, in_an_expression]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "pruned"
    model = build_model()
    inputs = torch.zeros(2, 4)
    save_pruned(model, empty_plan(list_structures(model, inputs)), inputs, folder)
    return folder


def build_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def plant(saved: Path, folder: Path, trace: Path, where: Callable[[dict[str, bytes], Path], None]) -> Path:
    """A saved network whose program carries the exploit, and whose hashes are right: they prove nothing."""
    shutil.copytree(saved, folder)
    program = folder / "model.pt2"
    with zipfile.ZipFile(program) as archive:
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    where(parts, trace)
    with zipfile.ZipFile(program, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    hashes = json.loads((folder / "hashes.json").read_text(encoding="utf-8"))
    hashes["model.pt2"] = file_sha256(program)
    (folder / "hashes.json").write_text(json.dumps(hashes), encoding="utf-8")
    return program


@pytest.fixture(params=PLANTS, ids=lambda where: where.__name__)
def planted(request: pytest.FixtureRequest, saved: Path, tmp_path: Path) -> tuple[Path, Path]:
    """(program, the file that its exploit makes)."""
    trace = tmp_path / "it-ran"
    return plant(saved, tmp_path / "pruned", trace, request.param), trace


def test_only_who_says_so_loads_a_program(
    planted: tuple[Path, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    program, trace = planted
    is_first = request.node.callspec.params["planted"] is PLANTS[0]
    refusal = r"model\.pt2: a \.pt2 program can run any code.*"
    with pytest.raises(ModelError, match=refusal + r"load_pruned\(folder, build_model\)"):
        load_saved(program.parent)
    assert isinstance(load_saved(program.parent, build_model), nn.Module)

    target = tmp_path / "eager.toml"
    target.write_text('runtime = "eager"\n', encoding="utf-8")
    np.savez(tmp_path / "x.npz", input=np.zeros((1, 4), dtype=np.float32))
    bench = ["bench", str(program), str(target), "--inputs", str(tmp_path / "x.npz")]
    for parts in ("latency", "memory")[: 1 + is_first]:  # in this process, and in one of its own
        refused = RUNNER.invoke(app, [*bench, "--parts", parts])
        assert refused.exit_code == 2
        assert "--trust-program" in refused.output.replace("\n", " ")

    report = tmp_path / "report"
    report.mkdir()
    shutil.copy(program, report / "module.pt2")
    shutil.copy(program.parent / "weights.safetensors", report / "inputs.safetensors")
    with pytest.raises(ModelError, match=r"module\.pt2: a \.pt2 program .* trust_program=True"):
        reproduce(report)
    assert not trace.exists()

    RUNNER.invoke(app, [*bench, "--parts", "latency", "--trust-program"])  # the exploit is a real one
    assert trace.exists()


def test_a_program_in_a_run_or_a_bundle_is_bytes_to_all_commands(saved: Path, tmp_path: Path) -> None:
    pytest.importorskip("cyclonedx", reason="bills of materials need cyclonedx-python-lib")
    trace = tmp_path / "it-ran"
    program = plant(saved, tmp_path / "pruned", trace, in_the_samples)
    run = tmp_path / "run"
    write_run(run)
    (run / "07-finetune-0123456789abcdef").mkdir()
    shutil.copy(program, run / "07-finetune-0123456789abcdef" / "model.pt2")
    shutil.copy(program, run / "model.pt2")
    bundle = make_bundle(run, tmp_path / "bundles")
    registry = str(tmp_path / "registry")
    for command, code in (
        (["verify", str(run)], 0),
        (["verify", str(bundle)], 0),
        (["promote", str(bundle), "--registry", registry], 0),
        (["gate", str(run)], 0),
    ):
        assert RUNNER.invoke(app, command).exit_code == code, command
    shutil.copy(program, bundle / "model.pt2")  # not in the manifest
    for command in (["verify", str(bundle)], ["promote", str(bundle), "--registry", registry]):
        assert RUNNER.invoke(app, command).exit_code == 2, command
    assert not trace.exists()


@pytest.mark.parametrize("dump", [pickled, lambda trace: pickle.dumps(Exploit(trace))], ids=["torch", "pickle"])
def test_a_pickle_in_place_of_tensors_is_an_error(dump: Callable[[Path], bytes], saved: Path, tmp_path: Path) -> None:
    trace = tmp_path / "it-ran"
    shutil.copytree(saved, tmp_path / "pruned")
    weights = tmp_path / "pruned" / "weights.safetensors"
    for name in ("w.safetensors", "w.npz", "w.npy", "w.pt"):
        (tmp_path / name).write_bytes(dump(trace))
        with pytest.raises(ModelError, match=r"w\.\w+: cannot be read as safetensors"):
            WeightFiles(tmp_path / name)
        with pytest.raises(DataError, match=r"w\.\w+: holds no named arrays"):
            load_inputs(tmp_path / name)
    hashes = json.loads((tmp_path / "pruned" / "hashes.json").read_text(encoding="utf-8"))
    weights.write_bytes(dump(trace))
    hashes["weights.safetensors"] = file_sha256(weights)
    (tmp_path / "pruned" / "hashes.json").write_text(json.dumps(hashes), encoding="utf-8")
    with pytest.raises(ModelError, match=r"weights\.safetensors is not a safetensors file"):
        load_saved(tmp_path / "pruned", build_model)
    np.savez(tmp_path / "objects.npz", x=np.array([Exploit(trace)], dtype=object))
    with pytest.raises(DataError, match=r"objects\.npz: holds no named arrays"):
        load_inputs(tmp_path / "objects.npz")
    assert not trace.exists()


def test_programs_have_one_door_and_pickles_none() -> None:
    code = {path: path.read_text(encoding="utf-8") for path in Path("deploypipe").rglob("*.py")}
    doors = [path.name for path, text in code.items() if re.search(r"\b(export|jit)\.load\(|torch\.load\(", text)]
    assert sorted(doors) == ["load_torch_program.py"]
    assert not [path for path, text in code.items() if re.search(r"import pickle|allow_pickle=True|joblib", text)]
