"""A file that computes something else is refused, and the first module that differs is named."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from deploypipe.errors import DataError, ParityError
from deploypipe.export.onnx_export.export_onnx import export_onnx
from deploypipe.export.onnx_export.mismatch_bisection import find_mismatch_of_files
from deploypipe.export.onnx_export.parity import compare_networks, limit_of, require_parity
from deploypipe.numerics.output_differences import difference
from deploypipe.recipe import Export
from deploypipe.records import Parity


class Odd(nn.Module):
    """A layer whose exported form is another one: what a wrong translation looks like from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        scaled = x * self.scale
        return scaled * 1.5 if torch.compiler.is_exporting() else scaled


class Branches(nn.Module):
    """Two branches, of which the one computed first is wrong and the other is longer."""

    def __init__(self, odd: nn.Module) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 6), odd, nn.Linear(6, 6), nn.Tanh())
        self.second = nn.Sequential(*(nn.Linear(6, 6) for _ in range(5)))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.first(x) + self.second(x))
        return logits


class Repeated(nn.Module):
    """One module called three times, then the wrong one; batch norm disappears into the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv1d(2, 2, 3, padding=1), nn.BatchNorm1d(2), nn.GELU()
        self.odd = Odd()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.act(self.norm(self.conv(x)))
        y = self.act(self.norm(self.conv(self.act(y))))
        return {"fine": y, "wrong": torch.sigmoid(self.odd(y)) + 1}


class AtTheEnd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y.exp() if torch.compiler.is_exporting() else y


@pytest.mark.parametrize(
    ("model", "x", "place"),
    [
        (Branches(Odd()), torch.randn(8, 6), r"module 'first.1' \(ONNX Mul\)"),
        (Repeated(), torch.randn(8, 2, 6), r"module 'odd' \(ONNX Mul\)"),
        (AtTheEnd(), torch.randn(8, 6), r"the network's own forward\(\) \(ONNX Exp\)"),
    ],
    ids=["branches", "repeated calls", "no module"],
)
def test_the_first_module_that_differs_is_named(
    model: nn.Module, x: Tensor, place: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ParityError, match=rf"differs from the network by .*; .*they first differ in {place}, by \d"):
        export_onnx(model, [(x, None)], tmp_path / "m.onnx", Export())
    assert not list(tmp_path.iterdir()) and capfd.readouterr() == ("", "")
    assert not any(module._forward_hooks for module in model.modules())


def test_the_first_difference_of_two_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Branches(nn.ReLU()), torch.randn(8, 6)
    good, bad = tmp_path / "good.onnx", tmp_path / "bad.onnx"
    export_onnx(model, [(x, None)], good, Export())
    assert find_mismatch_of_files(good, good, x, 1e-6) is None
    proto = onnx.load(good)
    for weight in proto.graph.initializer:
        if weight.name == "second.2.bias":
            weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) + 1, weight.name))
    onnx.save(proto, bad)
    found = find_mismatch_of_files(good, bad, x, 1e-2)
    assert found and (found.module, found.op_type) == ("second.2", "Gemm")


def test_pruned_against_dense() -> None:
    torch.manual_seed(0)
    dense, x = nn.Linear(6, 3).train(), torch.randn(50, 6)
    pruned = nn.Linear(6, 3)
    pruned.load_state_dict({name: 1.01 * value for name, value in dense.state_dict().items()})
    parity = compare_networks(dense, pruned, [(x[:20], None), (x[20:], None)])
    assert parity.max_abs_error == pytest.approx(0.01, rel=1e-4) and parity.cosine == pytest.approx(1)
    assert parity.top1_agreement == 1 and dense.training
    with pytest.raises(DataError, match="NaN"):
        compare_networks(nn.Sequential(dense, nn.Linear(3, 3), Nan()), pruned, [(x, None)])


class Nan(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.nan


def test_difference_is_that_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    wanted = [[rng.normal(size=(n, 4)), rng.normal(size=(n, 2, 3))] for n in (5, 7)]
    seen = [[array + 0.1 * rng.normal(size=array.shape) for array in batch] for batch in wanted]
    parity = difference(wanted, seen)
    pairs = [[np.concatenate([batch[i].ravel() for batch in side]) for side in (wanted, seen)] for i in range(2)]
    assert parity.max_abs_error == pytest.approx(max(abs(a - b).max() / abs(a).max() for a, b in pairs))
    assert parity.mean_abs_error == pytest.approx(max(abs(a - b).mean() / abs(a).max() for a, b in pairs))
    assert parity.cosine == pytest.approx(min(a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs))
    same = [w[0].argmax(1) == s[0].argmax(1) for w, s in zip(wanted, seen, strict=True)]
    assert parity.top1_agreement == pytest.approx(np.concatenate(same).mean())


def test_difference_at_its_edges() -> None:
    zero, one = np.zeros((2, 3)), np.ones((2, 3))
    assert difference([[zero]], [[zero]]) == Parity(max_abs_error=0, mean_abs_error=0, cosine=1, top1_agreement=1)
    assert difference([[one]], [[zero]]).cosine == 0
    broken = difference([[one], [one]], [[one * np.nan], [one]])
    assert np.isnan(broken.max_abs_error) and np.isnan(broken.cosine)
    assert difference([[np.zeros((0, 3))]], [[np.zeros((0, 3))]]).max_abs_error == 0


def test_limits_fit_the_precision() -> None:
    settings = Export()
    assert [limit_of(settings, p) for p in ("fp32", "fp16", "int8")] == [1e-3, 1e-2, 0.3]
    parity = Parity(max_abs_error=5e-3, mean_abs_error=1e-3, cosine=1.0, top1_agreement=0.8)
    for precision, message in {
        "fp32": r"the limit is 0\.001.*max_abs_error$",
        "fp16": "an agreement of 90.00%",
    }.items():
        with pytest.raises(ParityError, match=message):
            require_parity(parity, settings, Path("m.onnx"), precision)
    require_parity(replace(parity, top1_agreement=0.95), settings, Path("m.onnx"), "fp16")
    with pytest.raises(ParityError, match=r"nan.*max_abs_error_int8"):
        require_parity(replace(parity, max_abs_error=float("nan")), settings, Path("m.onnx"), "int8")
