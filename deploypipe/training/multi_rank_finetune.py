"""Fine-tune on all ranks: rank 0 sends the plan and weights, the others replay the plan and train along."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from deploypipe.errors import RanksError
from deploypipe.files.hashing import digest
from deploypipe.networks.fingerprints import model_fingerprint
from deploypipe.networks.model_wrappers import unwrapped
from deploypipe.pruning.surgery.apply_plan import apply_plan
from deploypipe.pruning.surgery.saved_network import own_weights
from deploypipe.pruning.surgery.slim_attention import with_slim_attention
from deploypipe.recipe import Finetune
from deploypipe.records import Notify, PruningPlan, TrainLog, silent
from deploypipe.split_fingerprints import fingerprint
from deploypipe.task import Splits, Task, num_samples
from deploypipe.training.finetune import finetune
from deploypipe.training.ranks import ALONE, Ranks


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """One fine-tuning that rank 0 sends to the others."""

    plan: PruningPlan
    weights: dict[str, Tensor]  # of the repaired network
    settings: Finetune
    seed: int
    accelerator: str


def agree(ranks: Ranks, model: nn.Module, splits: Splits, source: str) -> None:
    """Raise RanksError on all ranks unless pipeline, network and data are the same, and batches large enough."""
    if ranks.count == 1:
        return
    ranks.check_equal(
        {"pipeline": digest(source), "network": model_fingerprint(model), "data": fingerprint(splits)},
        "start all of them with the same code, weights and data, and draw nothing without a seed",
    )
    with torch.random.fork_rng(devices=[]):
        first = next(iter(splits.train), None)
    if first and num_samples(first[0]) < ranks.count:
        raise RanksError(
            f"the train split gives batches of {num_samples(first[0])} samples to {ranks.count} ranks; start fewer "
            "ranks, or make the batches larger"
        )


def finetune_together(
    pruned: nn.Module,
    plan: PruningPlan,
    dense: nn.Module,
    splits: Splits,
    task: Task,
    settings: Finetune,
    *,
    checkpoint: Path | None = None,
    teacher_outputs: Path | None = None,
    seed: int = 0,
    notify: Notify = silent,
    ranks: Ranks = ALONE,
    accelerator: str = "auto",
) -> tuple[nn.Module, TrainLog]:
    """Run `finetune` on all ranks. Called on rank 0 while the others run `serve`. `plan` turned `dense` into `pruned`.

    RanksError on all ranks if the plan gives another network on one of them, or if one has ended.
    """
    if ranks.count > 1:
        ranks.tell(_Job(plan=plan, weights=own_weights(pruned), settings=settings, seed=seed, accelerator=accelerator))
        _replay(ranks, dense, plan)
    with ranks.watched():
        return finetune(
            pruned,
            dense,
            splits,
            task,
            settings,
            checkpoint=checkpoint,
            teacher_outputs=teacher_outputs,
            seed=seed,
            notify=notify,
            ranks=ranks,
            accelerator=accelerator,
        )


def serve(ranks: Ranks, model: nn.Module, splits: Splits, task: Task) -> None:
    """The work of a rank other than 0: train what rank 0 sends, until rank 0 dismisses it or ends.

    RanksError as in `finetune_together`.
    """
    model = unwrapped(model)
    dense = with_slim_attention(model).cpu().eval()
    while job := _next_job(ranks):
        pruned = _replay(ranks, dense, job.plan)
        pruned.load_state_dict(job.weights)
        with ranks.watched():
            finetune(
                pruned,
                dense,
                splits,
                task,
                job.settings,
                seed=job.seed,
                ranks=ranks,
                accelerator=job.accelerator,
            )


def dismiss(ranks: Ranks) -> None:
    """End `serve` on the other ranks: rank 0 has nothing more to train."""
    ranks.tell(None)


def _next_job(ranks: Ranks) -> _Job | None:
    nothing: _Job | None = None
    try:
        return ranks.tell(nothing)
    except RanksError:  # rank 0 has said why it ended, or torchrun will
        return None


def _replay(ranks: Ranks, dense: nn.Module, plan: PruningPlan) -> nn.Module:
    pruned = apply_plan(dense, plan)
    ranks.check_equal(
        {"network after the plan": model_fingerprint(pruned)}, "install the same versions of deploypipe and torch"
    )
    return pruned
