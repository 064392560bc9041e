"""MPruner's loop: remove blocks, train, and compare accuracy with the dense network; on failure remove fewer."""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from deploypipe.benchmark.accuracy import evaluate_module
from deploypipe.compute_device import find_device
from deploypipe.networks.fingerprints import model_fingerprint
from deploypipe.networks.model_copies import copied
from deploypipe.observe.calibration_pass import observe_activations
from deploypipe.pruning.repair.least_squares_repair import repair
from deploypipe.pruning.surgery.apply_plan import apply_plan
from deploypipe.pruning.surgery.plan import make_plan
from deploypipe.recipe import Mpruner, Recipe
from deploypipe.records import DepthLog, DepthRow, Names, Notify, Progress, ScoreTable, Structures, silent
from deploypipe.scoring.blocks.mpruner import cluster_blocks, mpruner_candidates
from deploypipe.task import Splits, Task, take_calib

Network = TypeVar("Network")
_ROUNDING = 1e-9  # rounding error in percentage points of a difference of two accuracies


def prune_depth(
    dense: nn.Module,
    structures: Structures,
    splits: Splits,
    task: Task,
    settings: Mpruner,
    recipe: Recipe,
    *,
    train: Callable[[nn.Module], nn.Module] | None = None,
    notify: Notify = silent,
) -> tuple[nn.Module, DepthLog]:
    """Find the shallowest network whose accuracy on val is at most `settings.max_drop_pp` below the dense network's.

    train: returns a trained copy of a repaired network (usually `training.finetune`); None: repair alone. `dense` is
    left unchanged. At least as many blocks stay as `structures.constraints` requires. Cost of an iteration: a pass over
    calib, a repair, the training, and a pass over val.
    """
    calib = take_calib(splits.calib, max(recipe.observe.num_samples, recipe.repair.num_samples))
    device = find_device(recipe.device).device
    shared: dict[str, Any] = {
        "real_tokens": task.real_tokens,
        "seed": recipe.seed,
        "notify": notify,
        "device": device,
    }

    def left(model: nn.Module) -> Structures:
        """The remaining blocks. Channel groups are left out, so that the calibration pass skips them."""
        blocks = tuple(b for b in structures.blocks if not isinstance(model.get_submodule(b.name), nn.Identity))
        return replace(structures, model_fingerprint=model_fingerprint(model), groups=(), blocks=blocks)

    def analyse(model: nn.Module) -> tuple[Names, ...]:
        blocks = left(model)
        moments = observe_activations(model, blocks, calib, recipe.observe, **shared)
        return cluster_blocks(blocks, moments, settings.threshold)

    def remove_and_train(model: nn.Module, names: Names) -> nn.Module:
        # Repaired towards the network before this cut, not the dense one, so the gain of earlier training stays.
        plan = make_plan(left(model), ScoreTable(scorer=settings.kind, channels={}), {}, names)
        pruned, _ = repair(model, apply_plan(model, plan), plan, calib, recipe.repair, **shared)
        return train(pruned) if train else pruned

    def evaluate(model: nn.Module) -> float:
        return float(evaluate_module(model, splits.val, task, device=device).mean())

    num_removable = len(structures.blocks) - structures.constraints.least_blocks
    return mpruner(
        copied(dense), settings, analyse, remove_and_train, evaluate, num_removable=num_removable, notify=notify
    )


def mpruner(
    dense: Network,
    settings: Mpruner,
    analyse: Callable[[Network], tuple[Names, ...]],
    remove_and_train: Callable[[Network, Names], Network],
    evaluate: Callable[[Network], float],
    *,
    num_removable: int = sys.maxsize,
    notify: Notify = silent,
) -> tuple[Network, DepthLog]:
    """The loop itself. None of the three functions may change its argument, so a roll-back just keeps the best network.

    After a success the new network is analysed again at the same stride. After a failure the next stride is tried,
    unless it would remove the same blocks. Ends when no cluster has a second member, `max_stride` failed, or
    `num_removable` blocks are removed.
    """
    best, stride = dense, settings.stride
    dense_accuracy = best_accuracy = evaluate(dense)
    found = analyse(dense)
    rows: list[DepthRow] = []
    removed: Names = ()
    refused: Names = ()
    while stride <= settings.max_stride and any(len(cluster) > 1 for cluster in found):
        names = mpruner_candidates(found, stride)[: num_removable - len(removed)]
        if not names:
            break
        accuracy, accepted, reason = None, False, "the same blocks as at the previous stride"
        if names != refused:
            tried = remove_and_train(best, names)
            accuracy = evaluate(tried)
            drop_pp = 100 * (dense_accuracy - accuracy)
            accepted = drop_pp <= settings.max_drop_pp + _ROUNDING
            reason = f"accuracy falls by {drop_pp:.2f} pp; {settings.max_drop_pp:g} are allowed"
        rows.append(
            DepthRow(
                iteration=len(rows) + 1,
                stride=stride,
                clusters=found,
                removed=names,
                accuracy=accuracy,
                accepted=accepted,
                reason=reason,
            )
        )
        notify(Progress(stage="depth", done=len(rows), message=reason))
        if accepted and accuracy is not None:
            best, best_accuracy, removed = tried, accuracy, removed + names
            found = analyse(best)
        else:
            refused, stride = names, stride + 1
    reason = "no block is similar to the one before it"
    if stride > settings.max_stride:
        reason = f"refused at stride {settings.max_stride}"
    elif any(len(cluster) > 1 for cluster in found):
        reason = "recipe.constraints.least_blocks asks for the blocks that are left"
    return best, DepthLog(
        rows=tuple(rows),
        dense_accuracy=dense_accuracy,
        accuracy=best_accuracy,
        removed=removed,
        reason=reason,
    )
