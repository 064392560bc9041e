"""Score blocks by the change of the network's outputs without them, which hidden similarity cannot show."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from deploypipe.distillation_loss import kl_divergence_loss
from deploypipe.errors import DataError
from deploypipe.observe.pass_statistics import Moments
from deploypipe.pruning.repair.least_squares_repair import repair
from deploypipe.pruning.surgery.apply_plan import check_fingerprint, cut_out
from deploypipe.pruning.surgery.plan import empty_plan
from deploypipe.recipe import LogitDivergence
from deploypipe.records import BlockRanking, Structures
from deploypipe.task import Batch, evaluating, find_logits, forward, num_samples, take_calib


def rank_by_divergence(
    model: nn.Module,
    structures: Structures,
    moments: Moments,
    batches: Iterable[Batch],
    config: LogitDivergence,
    seed: int,
) -> BlockRanking:
    """Importance = KL(dense || without the block), each block alone, in nats per sample times temperature^2.

    Cost: two forward passes per block over `config.num_samples` samples, one batch at a time, and the repair if set.
    """
    untouched = empty_plan(structures)
    check_fingerprint(model, untouched)  # once, not for every block
    taken = take_calib(batches, config.num_samples)
    importance = {}
    for block in structures.blocks:
        plan = replace(untouched, blocks=(block.name,))
        without = cut_out(model, plan)
        if config.repair is not None:
            without, _ = repair(model, without, plan, taken, config.repair, seed=seed)
        importance[block.name] = divergence(model, without, taken, config.temperature)
    return BlockRanking(scorer=config.kind, importance=importance)


def divergence(dense: nn.Module, other: nn.Module, batches: Iterable[Batch], temperature: float = 1.0) -> float:
    """Mean over samples (and positions) of KL(dense || other) of the softened outputs, times temperature^2. float64."""
    total, count = 0.0, 0
    with evaluating(dense), evaluating(other), torch.no_grad():
        for inputs, _ in batches:
            apart = kl_divergence_loss()(_logits(other, inputs), _logits(dense, inputs), temperature)
            total += float(apart) * num_samples(inputs)
            count += num_samples(inputs)
    return max(total / count, 0.0)


def _logits(model: nn.Module, inputs: Any) -> Tensor:
    """(samples, ..., classes) float64."""
    logits = find_logits(forward(model, inputs))
    if logits is None:
        raise DataError(
            "logit_divergence needs a network with one output tensor of logits (or one called 'logits'); choose "
            "another block scorer"
        )
    if not torch.isfinite(logits).all():
        raise DataError("the network's outputs are not finite on the calibration samples; check data and model")
    return logits.double()
