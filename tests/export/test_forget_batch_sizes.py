"""Networks that remember the sizes of their last batch, as detectors do, export to files of any size."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from deploypipe.export.onnx_export.export_onnx import export_onnx
from deploypipe.export.onnx_export.forget_batch_sizes import forget_sizes_
from deploypipe.pruning.surgery.plan import empty_plan
from deploypipe.pruning.surgery.saved_network import load_saved, save_pruned
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.recipe import Export
from deploypipe.runtimes.onnxruntime import OnnxRuntime


class Heads(nn.Module):
    """Anchors are computed again when the shape of the input changes; calls are counted."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 4, 1)
        self.shape: torch.Size | None = None
        self.anchors, self.calls, self.width = torch.empty(0), 0, 4

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.first(x).relu())
        self.calls += 1
        if self.shape != x.shape:
            self.anchors, self.shape = torch.arange(x.shape[2], dtype=torch.float32), x.shape
        return (x + self.anchors).view(-1, self.width, x.shape[2])


@pytest.mark.filterwarnings("ignore:The tensor attribute:UserWarning")
def test_files_of_a_network_that_remembers_a_shape_take_any_batch(tmp_path: Path) -> None:
    model = Heads().eval()
    batches = [(torch.randn(2, 3, n), None) for n in (6, 9)]
    model(batches[0][0])
    export_onnx(model, batches, tmp_path / "m.onnx", Export())
    with OnnxRuntime().open(tmp_path / "m.onnx", num_threads=1) as session:
        for shape in ((1, 3, 6), (5, 3, 11)):
            x = torch.randn(shape)
            (seen,) = session.run({"x": x.numpy()})
            torch.testing.assert_close(torch.from_numpy(seen), model(x).detach(), atol=1e-5, rtol=1e-4)
    save_pruned(model, empty_plan(list_structures(model, batches[0][0])), batches[0][0], tmp_path)
    x = torch.randn(5, 3, 6)
    torch.testing.assert_close(load_saved(tmp_path, trust_program=True)(x), model(x))


def test_only_what_changes_nothing_is_forgotten() -> None:
    model = Heads().eval()
    forget_sizes_(model, [torch.randn(2, 3, 6), torch.randn(3, 3, 6)])
    assert (model.shape, model.width) == (None, 4)
    assert isinstance(model.calls, int)
