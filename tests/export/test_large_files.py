"""A network whose weights lie in a second file goes through export, slicing, bench and verify, above 2 GiB too."""

import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deploypipe.benchmark.bench_file import bench_file
from deploypipe.errors import ModelError
from deploypipe.export.graph_slicing.sliced_files import slice_file
from deploypipe.export.graph_slicing.template import open_template
from deploypipe.export.onnx_export.export_onnx import export_onnx
from deploypipe.export.onnx_export.golden_samples import write_golden
from deploypipe.pruning.surgery.apply_plan import apply_plan
from deploypipe.pruning.surgery.plan import make_plan
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.recipe import Export
from deploypipe.records import ScoreTable
from deploypipe.target import Target
from deploypipe.verify import verify

TARGET = Target(runtime="onnxruntime", name="here")
WIDTH = 1024
MAX_PEAK_GIB = 12  # 10.8 were measured, with all that other tests had left in the process


class Words(nn.Module):
    """A table of words and two layers: many bytes, little to compute."""

    def __init__(self, num_words: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_words, WIDTH, _weight=torch.rand(num_words, WIDTH))
        self.hidden, self.head = nn.Linear(WIDTH, 64), nn.Linear(64, 10)

    def forward(self, ids: Tensor) -> Tensor:
        output: Tensor = self.head(torch.relu(self.hidden(self.table(ids).mean(1))))
        return output


@pytest.mark.parametrize(
    ("num_words", "export"),
    [
        (100, Export(single_file_mib=0)),
        pytest.param(2**19 + 1, Export(), marks=pytest.mark.slow),  # one tensor of 2 GiB and 4 KiB
    ],
)
def test_weights_in_a_second_file_from_export_to_verify(num_words: int, export: Export, tmp_path: Path) -> None:
    model, ids = Words(num_words).eval(), torch.randint(num_words, (4, 6))
    structures = list_structures(model, ids, keep=("table",))
    (group,) = structures.groups
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    template = tmp_path / "template.onnx"
    dense = export_onnx(model, [(ids, None)], shipped / "model.onnx", export, template=template)
    assert dense.size_bytes > 4 * num_words * WIDTH
    write_golden(shipped, {"model.onnx": dense}, [(ids, None)])
    assert verify(shipped).is_same

    scores = ScoreTable(scorer="given", channels={group.name: tuple(map(float, range(group.num_units)))})
    plan = make_plan(structures, scores, {group.name: group.num_units // 2}, [])
    pruned, path = apply_plan(model, plan), tmp_path / "sliced.onnx"
    opened = open_template(template, model, {dense.input_names[0]: ids.numpy()})
    sliced = slice_file(opened, model, pruned, plan, [(ids, None)], path, export)
    assert sliced.reason == ""
    assert 4 * num_words * WIDTH < sliced.size_bytes < dense.size_bytes

    rng = np.random.default_rng(0)
    inputs = {dense.input_names[0]: rng.integers(num_words, size=(1, 6))}
    result = bench_file(path, TARGET, inputs=inputs, parts=("latency",), num_samples=80)
    assert result.file.size_bytes == sliced.size_bytes and result.file.latency is not None

    shutil.copyfile(path.with_name("sliced.onnx.data"), shipped / "model.onnx.data")  # the data of another file
    with pytest.raises(ModelError, match=r"model\.onnx\.data"):
        verify(shipped)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    assert peak < MAX_PEAK_GIB * 2**20
