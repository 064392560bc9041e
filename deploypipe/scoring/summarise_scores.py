"""Score a network outside of a run, for people who only want to look: nothing is removed and nothing remembered."""

from torch import nn

from deploypipe.checked_splits import wrap_splits
from deploypipe.compute_device import device_for
from deploypipe.export.onnx_export.input_sizes import ends_of, extremes_of
from deploypipe.networks.model_wrappers import unwrapped
from deploypipe.observe.calibration_pass import observe_halves
from deploypipe.observe.pass_statistics import merge
from deploypipe.pruning.surgery.slim_attention import with_slim_attention
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.recipe import Recipe
from deploypipe.records import Notify, ScoreSummary, reported, silent
from deploypipe.scoring import needs_derivatives, score_halves
from deploypipe.scoring.permutation_baseline import permutation_baseline_shares
from deploypipe.scoring.score_summary import summarise
from deploypipe.task import Splits, Task, take, take_calib
from deploypipe.user_code_errors import wrap_forward_errors, wrap_task


@wrap_forward_errors()
def summarise_scores(
    model: nn.Module, splits: Splits, task: Task, recipe: Recipe, *, notify: Notify = silent
) -> ScoreSummary:
    """Summarise the scores of `recipe.score` from one pass over the calibration samples; remove nothing.

    Raises DeploypipeError for what a user can get wrong.
    """
    model = unwrapped(model)
    splits, task = wrap_splits(splits), wrap_task(task)
    calib = take_calib(splits.calib, recipe.observe.num_samples)
    model = with_slim_attention(model).cpu().eval()
    others = ends_of(extremes_of(inputs for inputs, _ in calib))
    structures = list_structures(model, take(calib[0][0], 2), recipe.keep, recipe.constraints, other_inputs=others)
    compute, _ = device_for(model, take(calib[0][0], 2), recipe.device)
    loss = task.loss if needs_derivatives(recipe.score) else None
    settings, seed = recipe.observe, recipe.seed
    with reported(notify, "observe"):
        halves = observe_halves(
            model,
            structures,
            calib,
            settings,
            loss=loss,
            real_tokens=task.real_tokens,
            shuffled=True,
            seed=seed,
            notify=notify,
            device=compute.device,
        )
    moments = merge(*halves)
    with reported(notify, "score"):
        table = score_halves(model, structures, halves, moments, recipe.score, seed=seed)
        nulls = permutation_baseline_shares(model, structures, moments, recipe.score)
    return summarise(structures, table, moments, nulls)
