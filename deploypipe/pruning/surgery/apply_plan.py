"""Apply a plan to the dense network: no tracing, no example inputs, bit-identical results every time."""

from typing import Any

from torch import nn

from deploypipe.errors import PlanError
from deploypipe.networks.fingerprints import model_fingerprint, structure_fingerprint
from deploypipe.networks.model_copies import copied
from deploypipe.networks.model_wrappers import unwrapped
from deploypipe.pruning.model_config import fit_configs, write_configs_
from deploypipe.pruning.modules.count_macs import count_macs
from deploypipe.pruning.modules.hook_computed_weights import with_plain_weights
from deploypipe.pruning.surgery.module_masking import mask_
from deploypipe.pruning.surgery.module_slicing import cut_, forget_caches_
from deploypipe.pruning.surgery.remove_blocks import replace_by_identity_
from deploypipe.records import Edit, PruneReport, PruneRow, PruningPlan


def apply_plan(dense: nn.Module, plan: PruningPlan) -> nn.Module:
    """Build the pruned network; `dense` is left unchanged. Raises PlanError if the plan was made for another model.

    The config of a `transformers` network is updated if one describes what is left.
    """
    dense = with_plain_weights(unwrapped(dense))
    check_fingerprint(dense, plan)
    return cut_out(dense, plan)


def masked_dense(dense: nn.Module, plan: PruningPlan) -> nn.Module:
    """Build the reference: a dense copy that masks what `plan` removes. The pruned network must give its outputs."""
    dense = with_plain_weights(unwrapped(dense))
    check_fingerprint(dense, plan)
    model = copied(dense)
    forget_caches_(model)
    replace_by_identity_(model, {name: plan.returns.get(name) for name in plan.blocks})
    mask_(model, _outside_blocks(plan))
    return model


def cut_out(dense: nn.Module, plan: PruningPlan) -> nn.Module:
    """`apply_plan` without the check of the fingerprint."""
    model = copied(dense)
    forget_caches_(model)
    replace_by_identity_(model, {name: plan.returns.get(name) for name in plan.blocks})
    cut_(model, _outside_blocks(plan))
    write_configs_(model, fit_configs(dense, model))
    return model


def check_fingerprint(dense: nn.Module, plan: PruningPlan, structure_only: bool = False) -> None:
    """Raise PlanError unless `plan` was made for this model; the message says whether structure or weights differ."""
    seen = structure_fingerprint(dense) if structure_only else model_fingerprint(dense)
    expected = plan.model_fingerprint
    if seen.partition("-")[0] != expected.partition("-")[0]:
        raise PlanError(
            f"the plan was made for a model with another structure (fingerprint {expected}, this one has {seen}); "
            "names or shapes of its parameters differ: build the same network, or make a new plan"
        )
    if not structure_only and seen != expected:
        raise PlanError(
            f"the plan was made for this structure with other weights (fingerprint {expected}, this one has {seen}); "
            "load the weights it was made from, or make a new plan"
        )


def describe(dense: nn.Module, pruned: nn.Module, plan: PruningPlan, inputs: Any) -> PruneReport:
    """Report asked and realised width of every structure in the plan, and the cost of both networks."""
    dense, pruned = with_plain_weights(unwrapped(dense)), unwrapped(pruned)
    rows = [
        PruneRow(
            name=cut.group,
            kind="channels",
            width_before=cut.num_units,
            asked=cut.asked,
            realised=cut.num_units - len(cut.removed),
            reason=cut.reason,
        )
        for cut in plan.cuts
    ]
    rows += [PruneRow(name=name, kind="block", width_before=1, asked=0, realised=0) for name in plan.blocks]
    params_before, macs_before = count_macs(dense, inputs)
    params_after, macs_after = count_macs(pruned, inputs)
    return PruneReport(
        rows=tuple(rows),
        params_before=params_before,
        params_after=params_after,
        macs_before=macs_before,
        macs_after=macs_after,
        notes=tuple(fit.note() for fit in fit_configs(dense, pruned)),
    )


def _outside_blocks(plan: PruningPlan) -> list[Edit]:
    return [e for e in plan.edits if not any(e.module == b or e.module.startswith(f"{b}.") for b in plan.blocks)]
