"""Block scorers: the contract of every ranking, what each one finds, and the loop with an accuracy limit."""

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from typing import Any

import networks
import pytest
import tiny_pipeline as tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deploypipe.data import TensorBatches
from deploypipe.errors import DataError, PlanError
from deploypipe.observe.calibration_pass import observe_activations
from deploypipe.observe.pass_statistics import Moments
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.recipe import BlockMi, Constraints, Finetune, LogitDivergence, Mpruner, Observe, Repair
from deploypipe.records import DepthLog, Names, Structures
from deploypipe.scoring.blocks import BLOCK_SCORERS, rank_blocks
from deploypipe.scoring.blocks.block_families import families
from deploypipe.scoring.blocks.block_mi import choose_blocks, fast_block_select
from deploypipe.scoring.blocks.logit_divergence import divergence
from deploypipe.scoring.blocks.mpruner import cluster_blocks, clusters, mpruner_candidates
from deploypipe.scoring.blocks.mpruner_loop import mpruner, prune_depth
from deploypipe.task import Batch, Splits, classification
from deploypipe.training.finetune import finetune

REPAIRED = LogitDivergence(repair=Repair(num_samples=64))
SCORERS = (*(kind() for kind in BLOCK_SCORERS), REPAIRED)
EVERY_SCORER = pytest.mark.parametrize("scorer", SCORERS, ids=(*(s.kind for s in SCORERS[:-1]), "repaired"))


def seen(model: nn.Module, batches: list[Batch]) -> tuple[Structures, Moments]:
    structures = list_structures(model, batches[0][0])
    return structures, observe_activations(model, structures, batches, Observe())


@EVERY_SCORER
@pytest.mark.parametrize("name", ["mlp", "pad_resnet", "bottleneck", "encoder"])
def test_contract(name: str, scorer: Any) -> None:
    model, _ = networks.build(name)
    batches = [(networks.NETWORKS[name][1](), torch.zeros(4)) for _ in range(4)]
    structures, moments = seen(model, batches)
    model.train()
    values = {key: value.clone() for key, value in model.state_dict().items()}
    ranking = rank_blocks(model, structures, moments, batches, scorer, seed=3)
    assert ranking.scorer == scorer.kind
    assert list(ranking.importance) == [block.name for block in structures.blocks]
    assert all(math.isfinite(value) for value in ranking.importance.values())
    assert ranking == rank_blocks(model, structures, moments, batches, scorer, seed=3)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# --- clusters ---------------------------------------------------------------------------------------------------------


def test_clusters_by_hand() -> None:
    """3 is like 2 but not like the anchor 0, so it starts a new cluster; 5 is like 0, but 3 and 4 lie between."""
    cka = torch.eye(6)
    for a, b in [(0, 1), (0, 2), (2, 3), (3, 4), (0, 5)]:
        cka[a, b] = cka[b, a] = 0.98
    assert clusters(cka, 0.98) == ((0, 1, 2), (3, 4), (5,))
    assert clusters(cka, 0.981) == ((0,), (1,), (2,), (3,), (4,), (5,))
    assert clusters(cka, 0.0) == (tuple(range(6)),)


def test_clusters_of_nothing_and_of_constant_outputs() -> None:
    assert clusters(torch.zeros(0, 0), 0.9) == ()
    assert clusters(torch.zeros(2, 2), 0.9) == ((0,), (1,))  # a constant output is not like itself


def test_candidates_are_never_first_members() -> None:
    found = (("a", "b", "c", "d"), ("e",), ("f", "g"))
    assert [mpruner_candidates(found, stride) for stride in (1, 2, 3)] == [
        ("b", "c", "d", "g"),
        ("b", "d", "g"),
        ("b", "g"),
    ]
    assert mpruner_candidates((), 1) == ()


class Residual(nn.Module):
    """x + a small change."""

    def __init__(self, width: int, scale: float = 0.05) -> None:
        super().__init__()
        self.read, self.write = nn.Linear(width, width), nn.Linear(width, width)
        with torch.no_grad():
            self.write.weight *= scale
            self.write.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.write(F.relu(self.read(x)))


class EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(Residual(8) for _ in range(3))
        self.decoder = nn.ModuleList(Residual(8) for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.encoder, *self.decoder]:
            x = block(x)
        return self.head(x)


def test_encoder_and_decoder_are_different_families() -> None:
    torch.manual_seed(0)
    structures, moments = seen(EncoderDecoder(), [(torch.randn(64, 8), torch.zeros(64))])
    found = cluster_blocks(structures, moments, 0.5)
    assert found == (("encoder.0", "encoder.1", "encoder.2"), ("decoder.0", "decoder.1", "decoder.2"))


def test_stages_are_different_families() -> None:
    """The next stage is wider or, at the same width, smaller; the CKA of their outputs does not matter."""
    model = networks.PadResNet(blocks=3)
    structures, moments = seen(model, [(torch.randn(16, 3, 8, 8), torch.zeros(16))])
    by_stage = [tuple(f"stages.{stage}.{i}" for i in range(stage > 0, 3)) for stage in range(3)]
    assert families(structures, moments) == tuple(by_stage)
    torch.manual_seed(0)
    blocks = [tiny.Block(4) for _ in range(4)]
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), *blocks[:2], nn.AvgPool2d(2), *blocks[2:])
    model.extend([nn.Flatten(), nn.Linear(4 * 9, 2)])
    structures, moments = seen(model, [(torch.rand(16, 1, 8, 8), torch.zeros(16))])
    assert families(structures, moments) == (("2", "3"), ("5", "6"))


# --- what each ranking finds ------------------------------------------------------------------------------------------


class Deeper(nn.Module):
    """The trained tiny network with inserted blocks of its own kind that change hardly anything."""

    def __init__(self, num_planted: int) -> None:
        super().__init__()
        trained: Any = tiny.build_model()
        planted = [tiny.Block(8) for _ in range(num_planted)]
        with torch.no_grad():
            for block in planted:
                block.bn2.weight.fill_(0.01)
        self.stem, self.head = trained.stem, trained.head
        self.blocks = nn.Sequential(trained.blocks[0], *planted, trained.blocks[1])
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.blocks(F.relu(self.stem(x))), 2).flatten(1))


@pytest.fixture(scope="module")
def splits() -> Splits:
    return tiny.load_data()


@EVERY_SCORER
def test_a_redundant_block_is_detected(scorer: Any, splits: Splits) -> None:
    model = Deeper(1)
    structures, moments = seen(model, list(splits.calib))
    importance = rank_blocks(model, structures, moments, splits.calib, scorer).importance
    assert len(importance) == 3
    first, second = sorted(importance, key=lambda name: importance[name])[:2]
    assert first == "blocks.1"
    is_repaired = getattr(scorer, "repair", None) is not None  # then little is lost without any of them
    assert importance[first] < (0.9 if is_repaired else 0.2) * importance[second]


class RareDirection(nn.Module):
    """The output depends on one small direction, which only the second block writes; the third changes all others."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual(8) for _ in range(3))
        self.head = nn.Linear(8, 2, bias=False)
        with torch.no_grad():
            for block in self.blocks:
                block.write.weight[7] = 0
            rare: Any = self.blocks[1]
            rare.write.weight.zero_()
            rare.write.weight[7, 0] = 0.05
            self.head.weight.zero_()
            self.head.weight[:, 7] = torch.tensor([-100.0, 100.0])

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.tensor([1.0] * 7 + [0.0])
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_a_similar_but_important_block_is_detected_only_by_outputs() -> None:
    torch.manual_seed(0)
    model, batches = RareDirection(), [(torch.randn(256, 8), torch.zeros(256))]
    structures, moments = seen(model, batches)
    similar = rank_blocks(model, structures, moments, batches, Mpruner())
    assert min(similar.importance, key=lambda name: similar.importance[name]) == "blocks.1"
    assert "blocks.1" in mpruner_candidates(similar.clusters, 1)
    answers = rank_blocks(model, structures, moments, batches, LogitDivergence()).importance
    assert answers["blocks.1"] > 0.1
    assert answers["blocks.2"] == pytest.approx(0, abs=1e-9)


def test_divergence_by_hand_and_batch_by_batch() -> None:
    torch.manual_seed(0)
    dense, other, x = nn.Linear(4, 3), nn.Linear(4, 3), torch.randn(10, 4)
    with torch.no_grad():
        expected = F.kl_div((other(x) / 2).log_softmax(1), (dense(x) / 2).softmax(1), reduction="batchmean") * 4
    for size in (10, 3):
        batches = [(part, None) for part in x.split(size)]
        assert divergence(dense, other, batches, 2.0) == pytest.approx(float(expected), rel=1e-5)
    assert divergence(dense, dense, batches) == 0


def test_divergence_of_outputs_it_cannot_compare_is_an_error() -> None:
    batches = [(torch.full((2, 4), float("inf")), None)]
    with pytest.raises(DataError, match="not finite"):
        divergence(nn.Linear(4, 3), nn.Linear(4, 3), batches)
    with pytest.raises(DataError, match="one output tensor"):
        divergence(nn.LSTM(4, 3), nn.LSTM(4, 3), [(torch.randn(2, 4), None)])
    model = EncoderDecoder()
    structures, moments = seen(model, [(torch.randn(8, 8), torch.zeros(8))])
    with pytest.raises(PlanError, match="other weights"):
        rank_blocks(EncoderDecoder(), structures, moments, [(torch.randn(8, 8), None)], LogitDivergence())


# --- runs of blocks ---------------------------------------------------------------------------------------------------


def table_of(parts: tuple[Names, ...], seed: int) -> dict[Names, float]:
    """A loss for every run: random, but at least its worst member's (data processing inequality)."""
    generator = torch.Generator().manual_seed(seed)
    single = {name: float(torch.rand((), generator=generator)) for names in parts for name in names}
    lost: dict[Names, float] = {}
    for names in parts:
        for a, b in combinations(range(len(names) + 1), 2):
            run = names[a:b]
            more = float(torch.rand((), generator=generator)) * sum(single[name] for name in run)
            lost[run] = single[run[0]] if len(run) == 1 else max(single[name] for name in run) + more
    return lost


def total(parts: tuple[Names, ...], chosen: Names, lost: Mapping[Names, float]) -> float:
    whole = 0.0
    for names in parts:
        run: Names = ()
        for name in (*names, ""):
            if name in chosen:
                run = (*run, name)
            elif run:
                whole, run = whole + lost[run], ()
    return whole


def test_a_run_that_loses_much_is_exchanged_for_one_that_does_not() -> None:
    """b and c are the least important, but not both at once."""
    parts = (("a", "b", "c", "d", "e", "f"),)
    single = dict(zip("abcdef", (0.5, 0.1, 0.1, 0.6, 0.2, 0.2), strict=True))
    lost = {run: sum(single[n] for n in run) for i in range(6) for j in range(i, 6) if (run := parts[0][i : j + 1])}
    lost[("b", "c")] = 0.9
    assert fast_block_select(parts, lost.__getitem__, 2, 8) == ("e", "f")
    lost[("b", "c")] = 0.2
    assert fast_block_select(parts, lost.__getitem__, 2, 8) == ("b", "c")


@pytest.mark.parametrize("seed", range(8))
def test_selection_lies_between_the_best_singles_and_the_optimum(seed: int) -> None:
    parts = (tuple("abcde"), tuple("xyz"))
    everyone = sum(parts, ())
    lost = table_of(parts, seed)
    for count in range(1, 8):
        chosen = fast_block_select(parts, lost.__getitem__, count, 8)
        least = tuple(sorted(everyone, key=lambda name: lost[(name,)])[:count])
        best = min(total(parts, some, lost) for some in combinations(everyone, count))
        assert len(chosen) == len(set(chosen)) == count
        assert best - 1e-12 <= total(parts, chosen, lost) <= total(parts, least, lost) + 1e-12


def test_selection_of_none_of_all_and_from_nothing() -> None:
    parts = (("a", "b"),)
    lost = table_of(parts, 0)
    assert fast_block_select(parts, lost.__getitem__, 0, 8) == ()
    assert fast_block_select(parts, lost.__getitem__, 5, 8) == ("a", "b")
    assert fast_block_select((), lost.__getitem__, 2, 8) == ()


def test_a_redundant_run_is_chosen(splits: Splits) -> None:
    structures, moments = seen(Deeper(2), list(splits.calib))
    assert choose_blocks(structures, moments, BlockMi(), 2) == ("blocks.1", "blocks.2")


# --- the loop ---------------------------------------------------------------------------------------------------------

ALL = ("a", "b", "c", "d")


def run_loop(accuracy: Mapping[str, float], **settings: Any) -> tuple[Names, DepthLog]:
    """The loop on a network that is just the names of its blocks, all alike."""
    return mpruner(
        ALL,
        Mpruner(**settings),
        lambda blocks: (blocks,),
        lambda blocks, names: tuple(b for b in blocks if b not in names),
        lambda blocks: accuracy["".join(blocks)],
    )


def test_loop_accepts_and_ends() -> None:
    best, log = run_loop({"abcd": 0.90, "a": 0.86})
    assert best == ("a",)
    assert (log.dense_accuracy, log.accuracy, log.removed) == (0.90, 0.86, ("b", "c", "d"))
    (row,) = log.rows
    assert (row.iteration, row.stride, row.clusters, row.accepted) == (1, 1, (ALL,), True)
    assert "no block" in log.reason


def test_loop_rolls_back_and_removes_less() -> None:
    """Stride 1 fails and 2 passes. Then stride 2 would remove c and fails; stride 3 would too, so it is not tried."""
    best, log = run_loop({"abcd": 0.90, "a": 0.70, "ac": 0.88})
    assert [(row.stride, row.removed, row.accuracy, row.accepted) for row in log.rows] == [
        (1, ("b", "c", "d"), 0.70, False),
        (2, ("b", "d"), 0.88, True),
        (2, ("c",), 0.70, False),
        (3, ("c",), None, False),
    ]
    assert best == ("a", "c")
    assert (log.accuracy, log.removed) == (0.88, ("b", "d"))
    assert "same blocks" in log.rows[-1].reason
    assert log.reason == "refused at stride 3"


def test_loop_returns_the_start_if_nothing_holds() -> None:
    best, log = run_loop({"abcd": 0.90, "a": 0.1, "ac": 0.1, "acd": 0.1, "ad": 0.1})
    assert best == ALL
    assert (log.accuracy, log.removed) == (0.90, ())
    assert not any(row.accepted for row in log.rows)


def test_the_accuracy_limit_is_inclusive_and_relative_to_the_dense_network() -> None:
    """Each step may lose a little, but all together at most the limit."""
    accuracy = {"abcd": 0.90, "ac": 0.87, "a": 0.85}
    assert run_loop(accuracy, stride=2)[0] == ("a", "c")
    assert run_loop(accuracy, stride=2, max_drop_pp=5.0)[0] == ("a",)


def small_recipe() -> Any:
    return replace(tiny.recipe(), finetune=Finetune(num_epochs=1, precision="fp32"))


def num_removed(model: Any) -> int:
    return sum(isinstance(block, nn.Identity) for block in model.blocks)


def spoiled_above(count: int) -> Any:
    def train(model: Any) -> nn.Module:
        if num_removed(model) > count:
            nn.init.zeros_(model.head.weight)
        return model  # type: ignore[no-any-return]

    return train


def run_depth(model: nn.Module, splits: Splits, settings: Mpruner, train: Any = None) -> tuple[Any, DepthLog]:
    structures = list_structures(model, next(iter(splits.calib))[0])
    return prune_depth(model, structures, splits, classification(), settings, small_recipe(), train=train)


def test_depth_removes_redundant_blocks(splits: Splits) -> None:
    dense = Deeper(2)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    events: list[str] = []
    structures = list_structures(dense, next(iter(splits.calib))[0])
    pruned, log = prune_depth(
        dense,
        structures,
        splits,
        classification(),
        Mpruner(max_drop_pp=1.0),
        small_recipe(),
        train=lambda m: finetune(m, dense, splits, classification(), small_recipe().finetune)[0],
        notify=lambda event: events.append(event.stage),
    )
    assert {"blocks.1", "blocks.2"} <= set(log.removed)
    assert num_removed(pruned) == len(log.removed)
    assert log.accuracy >= log.dense_accuracy - 0.01
    assert {"observe", "repair", "depth"} <= set(events)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


def test_depth_escalates_and_rolls_back(splits: Splits) -> None:
    """With all four blocks in one cluster, removing three or two is too much; removing one is not."""
    settings = Mpruner(threshold=0.001, max_drop_pp=10.0)
    pruned, log = run_depth(Deeper(2), splits, settings, spoiled_above(1))
    assert [(row.stride, len(row.removed), row.accepted) for row in log.rows] == [
        (1, 3, False),
        (2, 2, False),
        (3, 1, True),
        (3, 1, False),
    ]
    assert num_removed(pruned) == 1
    assert log.accuracy >= log.dense_accuracy - 0.1


def test_depth_keeps_as_many_blocks_as_the_recipe_requires(splits: Splits) -> None:
    dense, settings = Deeper(2), Mpruner(threshold=0.001, max_drop_pp=100.0)
    structures = list_structures(dense, next(iter(splits.calib))[0], constraints=Constraints(least_blocks=3))
    pruned, log = prune_depth(dense, structures, splits, classification(), settings, small_recipe())
    assert len(structures.blocks) - num_removed(pruned) == 3
    assert "least_blocks" in log.reason


def test_depth_returns_the_dense_network_if_nothing_holds(splits: Splits) -> None:
    dense = Deeper(1)
    same, log = run_depth(dense, splits, Mpruner(), spoiled_above(0))
    assert log.rows
    assert log.removed == ()
    assert same is not dense
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in same.state_dict().items())


class OneBlock(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(6, 8), block, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(F.relu(self.stem(x))))


@pytest.mark.parametrize(("block", "found"), [(nn.ReLU(), ()), (Residual(8), (("block",),))])
def test_no_block_and_one_block(block: nn.Module, found: tuple[Names, ...]) -> None:
    torch.manual_seed(0)
    model, data = OneBlock(block), TensorBatches(torch.randn(32, 6), torch.randint(0, 3, (32,)), 16)
    splits = Splits(calib=data, train=data, val=data, test=data)
    structures, moments = seen(model, list(data))
    ranking = rank_blocks(model, structures, moments, data, Mpruner())
    assert ranking.clusters == found
    assert choose_blocks(structures, moments, BlockMi(), 1) == sum(found, ())
    _, log = run_depth(model, splits, Mpruner())
    assert (log.rows, log.removed, log.reason) == ((), (), "no block is similar to the one before it")
    assert log.accuracy == log.dense_accuracy


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Mpruner, {"threshold": 98}),
        (Mpruner, {"stride": 0}),
        (Mpruner, {"max_stride": 1, "stride": 2}),
        (BlockMi, {"noise": 0.0}),
        (BlockMi, {"num_exact": 0}),
        (LogitDivergence, {"temperature": 0.0}),
        (LogitDivergence, {"num_samples": 0}),
    ],
)
def test_settings_out_of_range_are_refused(kind: Any, settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        kind(**settings)
