"""A repair in segments and small batches gives what one batch of all samples gives, and its memory is predicted."""

import subprocess
import sys

import pytest
import torch
from networks import PadResNet
from pretend_gpu import pretend_gpu
from torch import Tensor, nn

from deploypipe.memory_budget import GIB, LiveBytes, allowed_bytes, tree_bytes
from deploypipe.pruning.repair.fit_to_memory import fit_repair, repair_text
from deploypipe.pruning.repair.least_squares_repair import repair
from deploypipe.pruning.surgery.apply_plan import apply_plan
from deploypipe.pruning.surgery.plan import make_plan
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.recipe import Repair
from deploypipe.records import PruningPlan, RepairFit, RepairReport, RepairSegment
from deploypipe.scoring.magnitude import score_magnitudes
from deploypipe.task import Batch


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 64, batch_first=True, norm_first=True)
        self.layers, self.fc = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(x).mean(1))


def cut(model: nn.Module, inputs: Tensor, share: float = 0.5) -> tuple[nn.Module, PruningPlan]:
    """The network with a share of the units of every group."""
    structures = list_structures(model, inputs[:2])
    widths = {group.name: max(1, int(group.num_units * share)) for group in structures.groups}
    plan = make_plan(structures, score_magnitudes(model, structures), widths, (), 1)
    return apply_plan(model, plan), plan


def case(kind: str, count: int = 48, size: int = 16) -> tuple[nn.Module, list[Batch]]:
    torch.manual_seed(0)
    model, inputs = (
        (PadResNet(), torch.randn(count, 3, size, size)) if kind == "cnn" else (Encoder(), torch.randn(count, size, 16))
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)
    return model.eval(), [(part, torch.zeros(len(part))) for part in inputs.split(20)]


def repaired(kind: str, settings: Repair, **more: object) -> tuple[nn.Module, RepairReport]:
    model, batches = case(kind)
    pruned, plan = cut(model, batches[0][0])
    return repair(model, pruned, plan, batches, settings, **more)  # type: ignore[arg-type]


EVERYWHERE = Repair(num_samples=48, positions_per_sample=256)


@pytest.mark.parametrize("kind", ["cnn", "transformer"])
@pytest.mark.parametrize("batch_size", [7, 48])
def test_segments_and_small_batches_give_what_one_batch_gives(kind: str, batch_size: int) -> None:
    whole, report = repaired(kind, EVERYWHERE)
    names = [row.module for row in report.rows]
    parts = (names[:3], names[3:6], names[6:])
    segments = tuple(
        RepairSegment(layers=tuple(part), num_samples=48, positions_per_sample=256) for part in parts if part
    )
    other, seen = repaired(kind, EVERYWHERE, fit=RepairFit(segments=segments, batch_size=batch_size))
    assert [row.module for row in seen.rows] == [row.module for row in report.rows]
    torch.testing.assert_close(
        [row.error_after for row in seen.rows], [row.error_after for row in report.rows], rtol=1e-4, atol=1e-7
    )
    torch.testing.assert_close(dict(other.state_dict()), dict(whole.state_dict()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["cnn", "transformer"])
def test_the_memory_of_one_batch_is_predicted_from_two_samples(kind: str) -> None:
    settings = Repair(num_samples=48, positions_per_sample=4)
    model, batches = case(kind, size=48)
    pruned, plan = cut(model, batches[0][0], 0.9)
    predicted = fit_repair(model, batches, settings, 10 * GIB)
    with LiveBytes() as live:
        repair(model, pruned, plan, batches, settings)
    assert not predicted.segments and predicted.num_bytes == predicted.whole_bytes
    assert live.peak <= predicted.num_bytes <= 1.8 * live.peak


def test_with_less_memory_early_layers_get_fewer_samples_at_more_positions() -> None:
    settings = Repair(num_samples=256, positions_per_sample=4)
    model, batches = case("cnn", 256)
    whole = fit_repair(model, batches, settings, GIB)
    assert not whole.segments and repair_text(whole) == ""
    fits = [fit_repair(model, batches, settings, int(whole.whole_bytes * share)) for share in (0.8, 0.6, 0.5)]
    for share, fit in zip((0.8, 0.6, 0.5), fits, strict=True):
        assert fit.num_bytes <= whole.whole_bytes * share
        counts = [segment.num_samples for segment in fit.segments]
        assert counts == sorted(counts) and all(s.num_samples * s.positions_per_sample >= 1024 for s in fit.segments)
    assert fits[-1].segments[0].num_samples < 256 and fits[-1].segments[-1].num_samples == 256
    assert repair_text(fits[-1]).startswith(f"{fits[-1].segments[0].num_samples} samples at ")


def test_a_gpu_gets_networks_and_batches_and_gives_the_result_back() -> None:
    settings = Repair(num_samples=48, positions_per_sample=4)
    expected, report = repaired("cnn", settings)
    with pretend_gpu() as gpu:
        there, seen = repaired("cnn", settings, device=gpu)
    assert seen == report
    for name, tensor in there.state_dict().items():
        assert type(tensor) is Tensor and torch.equal(tensor, expected.state_dict()[name]), name


def test_live_bytes_counts_storages_once_until_the_last_reference_is_gone() -> None:
    weight = torch.ones(100, 100)
    with LiveBytes() as live:
        first = torch.zeros(1000)
        view, weights = first[:10], weight.t()
        second = first + 1
        assert live.now == 8000 and len(weights) == 100  # the weights were there before
        del first
        assert live.now == 8000
        del view, second
        assert live.now == 0 and live.peak == 8000
    assert tree_bytes({"a": weight, "b": 3}) == 40_000


def test_auto_takes_half_of_what_is_free_and_never_more_than_four_and_a_half_gib(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = torch.device("cpu")
    for free, expected in ((64 * GIB, 9 * GIB // 2), (6 * GIB, 3 * GIB)):
        monkeypatch.setattr("deploypipe.memory_budget.free_memory", lambda free=free: free)
        assert allowed_bytes(None, cpu) == expected
    assert allowed_bytes(1.5, cpu) == 3 * GIB // 2


TAKE_TURNS = """
import os, threading
from pathlib import Path
import torch
from deploypipe.memory_budget import shared_heap

def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def work(turn):
    held = [torch.zeros(2**12) for _ in range(2**9)]  # 16 KiB each: from the heap
    del held
    turn.set()
    done.wait()

done, turns = threading.Event(), [threading.Event() for _ in range(12)]
threads = [threading.Thread(target=work, args=(turn,)) for turn in turns]
before = resident_bytes()
with shared_heap():
    for thread, turn in zip(threads, turns):
        thread.start()
        turn.wait()
    print(resident_bytes() - before)
    done.set()
    for thread in threads:
        thread.join()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, and glibc alone has many heaps")
def test_threads_that_take_turns_share_one_heap() -> None:
    """Each thread frees 8 MiB and waits: the next one gets them again, and the process does not grow.

    In a process of its own: other tests' threads have left heaps in this one.
    """
    grown = subprocess.run([sys.executable, "-c", TAKE_TURNS], capture_output=True, text=True, check=True).stdout
    assert int(grown) < 4 * 2**23  # not 12 times as much
