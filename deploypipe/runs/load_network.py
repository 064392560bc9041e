"""Load a compressed network from a saved network, a finished run or a bundle."""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from deploypipe.errors import ConfigError, ModelError
from deploypipe.pruning.surgery.saved_network import load_saved
from deploypipe.runs.result import RESULT, load_result

BUNDLE_RESULT = "report.json"


def load_pruned(
    folder: Path | str, build_model: Callable[[], nn.Module] | None = None, *, trust_program: bool = False
) -> nn.Module:
    """The compressed network in `folder`, as an ordinary module in evaluation mode, to run or to train further.

    folder: of a finished run, of a bundle, or what `save_pruned` or `prune_blockwise` wrote.
    build_model: a function that makes the dense network; its weights are replaced. Only JSON and safetensors are read.
    trust_program: without `build_model`, run the exported program that `save_pruned` wrote. It can run any code.

    Raises ConfigError if `build_model` is no function, and ModelError, PlanError or RunFolderError if files are absent,
    were changed, or belong to another network.
    """
    if isinstance(build_model, nn.Module) or not (build_model is None or callable(build_model)):
        kind = type(build_model).__name__
        remedy = f"write load_pruned(folder, {kind}) or load_pruned(folder, lambda: {kind}(...))"
        problem = f"must be a function that makes the dense network, got a {kind}"
        raise ConfigError("load_pruned", "build_model", problem, remedy)
    folder = Path(folder)
    for name in (RESULT, BUNDLE_RESULT):
        if (folder / name).is_file():
            if build_model is None:
                raise ModelError(f"{folder}: a run and a bundle hold no program; give build_model")
            return load_result(folder, name).load_model(build_model)
    return load_saved(folder, build_model, trust_program=trust_program)
