"""Networks whose inputs are more than samples, through a whole run: a diffusion model's time step, flags, None."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny_pipeline as tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deploypipe.errors import DataError
from deploypipe.export.onnx_export.export_onnx import export_onnx
from deploypipe.pipeline import compress
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.recipe import Export
from deploypipe.runtimes.named_arrays import feed, repack
from deploypipe.runtimes.onnxruntime import OnnxRuntime
from deploypipe.task import Splits, Task, num_samples
from deploypipe.verify import verify


class Denoiser(nn.Module):
    """Takes samples, a time step, settings in a nested dict, a flag, a word and a None."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.time = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(1, 16)
        self.second, self.last = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)

    def forward(
        self, x: Tensor, step: Tensor, settings: dict[str, Any], is_scaled: bool, mode: str, mask: Tensor | None = None
    ) -> dict[str, Any]:
        y = self.first(x) + self.time(step.float().reshape(-1, 1))[:, :, None, None]
        if is_scaled and mode == "noise" and mask is None:
            y = y * settings["scale"][0] + settings["shift"][:, None, None, None]
        y = self.last(self.second(y.relu()).relu())
        return {"noise": y, "hidden": None}


class Batches:
    """Batches of several sizes, the last of one sample, in a mapping whose order is not that of forward()."""

    def __init__(self, sizes: tuple[int, ...], seed: int) -> None:
        self.sizes, self.seed = sizes, seed

    def __iter__(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        for n in self.sizes:
            x = torch.randn(n, 3, 8, 8, generator=generator)
            yield (
                {
                    "mask": None,
                    "settings": {
                        "shift": 0.1 * torch.randn(n, generator=generator),
                        "scale": [torch.tensor([1.5])],
                        "sizes": (None, 3),
                    },
                    "is_scaled": True,
                    "step": torch.tensor(5),
                    "x": x,
                    "mode": "noise",
                },
                x.flip(1),
            )


def denoising() -> Task:
    return Task(
        loss=lambda out, target: F.mse_loss(out["noise"], target),
        metric=lambda out, target: -F.mse_loss(out["noise"], target, reduction="none").mean((1, 2, 3)),
        name="negative error",
    )


def network() -> nn.Module:
    torch.manual_seed(0)
    return Denoiser().eval()


def test_a_whole_run_carries_them_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEPLOYPIPE_CACHE", str(tmp_path / "cache"))
    splits = Splits(
        calib=Batches((16, 16, 7, 1), 1),
        train=Batches((16, 16), 2),
        val=Batches((16, 9, 1), 3),
        test=Batches((9, 1), 4),
    )
    result = compress(network(), splits, denoising(), tiny.recipe(), tiny.target(), tmp_path / "run")
    assert result.benchmark.compressed.num_macs <= 0.5 * result.benchmark.dense.num_macs
    assert verify(tmp_path / "run").is_same

    # The file answers as the network does for a batch of a size that it has never seen, and another time step.
    ((inputs, _),) = Batches((5,), 9)
    inputs["step"] = torch.tensor(3)
    with OnnxRuntime().open(tmp_path / "run" / "model.onnx", num_threads=1) as session:
        assert session.input_names == ("x", "step", "settings.shift", "settings.scale.0")
        at_3 = repack(session.output_names, session.run(feed(inputs, session.input_names)))
        at_5 = repack(session.output_names, session.run(feed(inputs | {"step": torch.tensor(5)}, session.input_names)))
    assert at_3["noise"].shape == (5, 3, 8, 8) and not torch.allclose(at_3["noise"], at_5["noise"])


@pytest.mark.parametrize("size", [1, 4])
def test_structures_are_found_with_a_batch_of_any_size(size: int) -> None:
    ((inputs, _),) = Batches((size,), 0)
    assert {group.name for group in list_structures(network(), inputs).groups} == {"first", "second"}


def test_a_constant_that_changes_from_batch_to_batch_is_named(tmp_path: Path) -> None:
    batches = list(Batches((4, 4), 0))
    batches[1][0]["mode"] = "other"
    with pytest.raises(DataError, match=r"""inputs\["mode"\] is 'noise' in the first batch and 'other' in"""):
        export_onnx(network(), batches, tmp_path / "model.onnx", Export())
    assert not list(tmp_path.iterdir())


class Attending(nn.Module):
    """Every sample reads one mask of (length, length), which has no batch axis and grows with the batch's length."""

    def __init__(self) -> None:
        super().__init__()
        self.rise, self.fall = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.as_tensor(self.fall(mask @ self.rise(x).relu()))


def test_a_member_without_a_batch_axis_may_vary_in_its_first_axis(tmp_path: Path) -> None:
    batches = [((torch.randn(3, n, 4), torch.ones(n, n).tril()), None) for n in (6, 10, 8)]
    file = export_onnx(Attending().eval(), batches, tmp_path / "model.onnx", Export())
    shapes = {i.name: i.type.tensor_type.shape.dim for i in onnx.load(tmp_path / file.path).graph.input}
    assert [d.dim_param for d in shapes["mask"]] == ["sequence", "sequence"] and shapes["x"][1].dim_param == "sequence"
    with OnnxRuntime().open(tmp_path / file.path, num_threads=1) as session:
        (answer,) = session.run({"x": np.zeros((2, 5, 4), np.float32), "mask": np.ones((5, 5), np.float32)})
    assert answer.shape == (2, 5, 4) and num_samples(batches[0][0]) == 3
