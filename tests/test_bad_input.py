"""Whatever a user gets wrong is one clear line and exit code 2, and nothing is written: the whole program each time."""

import fcntl
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deploypipe.cli import app

TARGET = 'runtime = "onnxruntime"\nnum_latency_samples = 200\n[budget]\nmacs = "0.5x"\n'

# What stands in for a part of the pipeline, by what is wrong with it.
GOOD = """
import torch
from torch import nn
from tiny_pipeline import *
import tiny_pipeline as tiny
"""
FROZEN = "def build_model(): return Network().eval().requires_grad_(False)\n"
NAN_WEIGHTS = """
def build_model():
    model = Network().eval()
    with torch.no_grad():
        model.blocks[1].conv1.weight[0, 0, 0, 0] = float("nan")
    return model
"""
NAN_DATA = """
def load_data():
    good = tiny.load_data()
    x, y = images(64, seed=1)
    x[0] = float("nan")
    return Splits(calib=TensorBatches(x, y, 64), train=good.train, val=good.val, test=good.test)
"""
LATE_NAN_DATA = NAN_DATA.replace("x[0]", "x[40]")
EMPTY = """
def load_data():
    good = tiny.load_data()
    return Splits(**{"calib": good.calib, "train": good.train, "val": good.val, "test": good.test, "SPLIT": []})
"""
UNPAIRED = EMPTY.replace("[]", "[torch.zeros(2, 1, 6, 6)]")
OTHER_SHAPE = EMPTY.replace("[]", "[(torch.zeros(2, 3, 6, 6), torch.zeros(2))]")
TWO_OUTPUTS = """
class Two(Network):
    def forward(self, x):
        y = super().forward(x)
        return {"scores": y, "more": y}
def build_model(): return Two().eval()
"""
ONE_NUMBER = """
class One(Network):
    def forward(self, x): return super().forward(x)[:, 0]
def build_model(): return One().eval()
"""
MEAN_METRIC = "def task(): return Task(loss=F.cross_entropy, metric=lambda y, t: (y.argmax(1) == t).float().mean())\n"
WIDE_DISTILLATION_LOSS = """
def task():
    return Task(loss=F.cross_entropy, metric=classification().metric, distillation_loss=lambda a, b, _: (a - b).sum(1))
"""
BROKEN_METRIC = "def task(): return Task(loss=F.cross_entropy, metric=lambda y, t: y.no_such())\n"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "cpu.toml").write_text(TARGET, encoding="utf-8")
    (tmp_path / "a_file").write_text("", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEPLOYPIPE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def invoke(home: Path, source: str, *arguments: str) -> Any:
    (home / "pipe.py").write_text(GOOD + source, encoding="utf-8")
    return CliRunner().invoke(app, ["run", "./pipe.py", *(arguments or ("./cpu.toml", "--out", "out"))])


def told(done: Any) -> str:
    assert done.exit_code == 2, (done.output, done.exception)
    lines = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in done.output and "bug in deploypipe" not in done.output, done.output
    return str(lines[0])


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("del recipe\n", ["pipe.py", "no function recipe()", "return Recipe()"]),
        ("def task(): return 3\n", ["pipe.py", "task() returned a int", "classification()"]),
        ("def build_model(): pass\n", ["build_model() returned nothing"]),
        ("def load_data(): return iter([])\n", ["load_data() returned", "Splits("]),
        ("def build_model(): return nn.Linear(2, 'x')\n", ["pipe.py, line", "build_model() raised TypeError"]),
        (EMPTY.replace("SPLIT", "calib"), ["calib split is empty", "load_data()"]),
        (EMPTY.replace("SPLIT", "train"), ["train split is empty"]),
        (EMPTY.replace("SPLIT", "val"), ["val split is empty"]),
        (EMPTY.replace("SPLIT", "test"), ["test split is empty"]),
        (UNPAIRED.replace("SPLIT", "val"), ["val split", "it is not a pair (inputs, target)", "write Pairs(loader"]),
        (OTHER_SHAPE.replace("SPLIT", "calib"), ["Network fails on two samples", "(2, 3, 6, 6)", "build_model()"]),
        (OTHER_SHAPE.replace("SPLIT", "test"), ["test split", "(2, 3, 6, 6)"]),
        (NAN_DATA, ["holds NaN or infinity", "calib"]),
        (NAN_WEIGHTS, ["weight 'blocks.1.conv1.weight' holds NaN"]),
        (FROZEN, ["frozen", "requires_grad_(True)"]),
        (TWO_OUTPUTS, ["logits, one tensor", 'a dict of ["scores"], ["more"]', "Task(loss=..., metric=...)"]),
        (ONE_NUMBER, ["logits, one tensor", "shape ['n']"]),
        (MEAN_METRIC, ["one value per sample"]),
        (WIDE_DISTILLATION_LOSS, ["task().distillation_loss returned a tensor of shape (2,)", "one finite number"]),
        (BROKEN_METRIC, ["pipe.py, line", "no_such"]),
    ],
)
def test_wrong_pipeline(source: str, said: list[str], home: Path) -> None:
    line = told(invoke(home, source))
    assert all(text in line for text in said), line
    assert not (home / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("macs", "mcas", ["cpu.toml: budget.mcas: unknown key", "macs"]),
        ("num_latency_samples", "latency_samples", ["cpu.toml: latency_samples: unknown key", "num_latency_samples"]),
        ('"0.5x"', '"0.5"', ["cpu.toml: budget", "'0.5' is not a number with a unit", "0.5x"]),
        ('"0.5x"', "0.5", ["cpu.toml: budget.macs", "0.5"]),
        ('"0.5x"', '"0x"', ["cpu.toml: budget", "above zero"]),
        ("200", "-1", ["cpu.toml", "num_latency_samples must be >= 200, got -1"]),
        (
            '"onnxruntime"',
            '"onnxruntime"\nprovider = "qnn"',
            ["target 'cpu'", "QNNExecutionProvider is not in", "pip install onnxruntime-qnn"],
        ),
        ('"onnxruntime"', '"eager"', ["target 'cpu': runtime", "loads .pt2 programs", "write 'onnxruntime'"]),
        ("runtime", 'precisions = ["int4"]\nruntime', ["cpu.toml: precisions", "'int4'", "fp16"]),
        ('"onnxruntime"', '"openvino"', ["cpu.toml: runtime", "openvino", "onnxruntime"]),
        ("runtime", "[", ["cpu.toml", "is not TOML"]),
    ],
)
def test_wrong_target(old: str, new: str, said: list[str], home: Path) -> None:
    (home / "cpu.toml").write_text(TARGET.replace(old, new, 1), encoding="utf-8")
    line = told(invoke(home, ""))
    assert all(text in line for text in said), line
    assert not (home / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "serach.num_trials=3"], ["--set: serach.num_trials", "search"]),
        (["--set", "search.num_trails=3"], ["--set: search.num_trails", "num_trials"]),
        (["--set", "search.num_trials=-3"], ["search: num_trials must be >= 1, got -3"]),
        (["--set", "search.num_trials=0"], ["search: num_trials must be >= 1, got 0"]),
        (["--set", "finetune.num_epochs=-1"], ["finetune: num_epochs must be >= 0, got -1"]),
        (["--set", "repair.num_samples=0"], ["repair: num_samples must be >= 1, got 0"]),
        (["--set", "observe.num_samples=0"], ["observe: num_samples must be >= 2, got 0"]),
        (["--set", "score.kind=mip"], ["score", "mip"]),
        (["--set", "target.budget.macs=lots"], ["--set target: budget", "'lots' is not a number with a unit"]),
        (["--out", "a_file"], ["a_file: is a file", "--out"]),
        (["--out", "a_file/below"], ["a_file/below", "--out"]),
        (["--out", "/proc/nowhere"], ["/proc/nowhere: cannot be written", "--out"]),
        (["--shared", "a_file"], ["a_file: is a file", "--shared"]),
    ],
)
def test_wrong_arguments(arguments: list[str], said: list[str], home: Path) -> None:
    out = [] if "--out" in arguments else ["--out", "out"]
    line = told(invoke(home, "", "./cpu.toml", *arguments, *out))
    assert all(text in line for text in said), line
    assert not (home / "out").exists()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ('keep=["stm"]', ["recipe: keep: 'stm' matches no module", "the nearest names are: stem"]),
        (
            'constraints.uniform=["blocks.*.cnv1"]',
            [
                "recipe: constraints.uniform: 'blocks.*.cnv1' matches no channel group",
                "blocks.0.conv1",
                "blocks.1.conv1",
            ],
        ),
        ('constraints.least={"blocks.*" = 9}', ["constraints.least", "9 units of 'blocks.0.conv1', which has 8"]),
        ("constraints.least_blocks=3", ["constraints.least_blocks", "only 2", "write 2 or less"]),
    ],
)
def test_constraints_that_cannot_be_met_end_a_run_before_its_first_stage(
    setting: str, said: list[str], home: Path
) -> None:
    line = told(invoke(home, "", "./cpu.toml", "--out", "out", "--set", setting))
    assert all(text in line for text in said), line
    assert not list((home / "out").glob("*.json"))
    scored = CliRunner().invoke(app, ["score", "./pipe.py", "--set", setting])
    assert told(scored) == line


def test_folder_of_a_run_is_not_shared(home: Path) -> None:
    assert "--shared" in told(invoke(home, "", "./cpu.toml", "--out", "out", "--shared", "./out"))
    assert not (home / "out").exists()


def test_locked_folder(home: Path) -> None:
    (home / "out").mkdir()
    with (home / "out" / "run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another run is at work here" in told(invoke(home, ""))
    assert [path.name for path in (home / "out").iterdir()] == ["run.lock"]


def test_values_that_show_up_late_leave_no_end_product(home: Path) -> None:
    line = told(invoke(home, LATE_NAN_DATA))
    assert "NaN" in line
    assert not any((home / "out" / name).exists() for name in ("model.onnx", "result.json", "report.html"))


@pytest.mark.parametrize("budget", ["macs", "peak_memory"])
def test_impossible_budget_names_the_nearest_miss(home: Path, budget: str) -> None:
    line = told(invoke(home, "", "./cpu.toml", "--out", "out", "--set", f"target.budget.{budget}=0.0001x"))
    assert f"budget.{budget}: " in line and "is out of reach" in line and "relax the budget" in line
    assert not any("observe" in path.name for path in (home / "out").iterdir())  # nothing long came before
    assert not any((home / "out" / name).exists() for name in ("model.onnx", "result.json", "report.html"))
