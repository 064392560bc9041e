"""Compress a trained network for one device, measure what is shipped, and decide whether to ship it.

    from deploypipe import compress
    result = compress(model, splits, task, recipe, target, "runs/mine")

Each stage can be called alone under the names in `dir(deploypipe)`. They are loaded when first used, because they
import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from deploypipe.installed_packages import load_onnxruntime

if TYPE_CHECKING:
    from deploypipe.benchmark import compare_files
    from deploypipe.blockwise import prune_blockwise
    from deploypipe.export.onnx_export.export_onnx import export_onnx
    from deploypipe.observe.calibration_pass import observe_activations
    from deploypipe.one_call_pruning import prune
    from deploypipe.pipeline import compress
    from deploypipe.preflight import check
    from deploypipe.pruning.repair.least_squares_repair import repair
    from deploypipe.pruning.surgery.apply_plan import apply_plan
    from deploypipe.pruning.surgery.plan import make_plan
    from deploypipe.pruning.surgery.saved_network import save_pruned
    from deploypipe.pruning.tracing.structures import list_structures
    from deploypipe.release.baseline_comparison import compare_with_baseline
    from deploypipe.release.bundle import make_bundle
    from deploypipe.release.gate import decide
    from deploypipe.release.registries.registry import promote
    from deploypipe.runs.load_network import load_pruned
    from deploypipe.runs.result import load_result
    from deploypipe.scoring import score
    from deploypipe.target_files import load_target
    from deploypipe.training.finetune import finetune

_HOMES = {  # in the order of a run
    "prune": "one_call_pruning",
    "load_target": "target_files",
    "compress": "pipeline",
    "check": "preflight",
    "list_structures": "pruning.tracing.structures",
    "observe_activations": "observe.calibration_pass",
    "score": "scoring",
    "make_plan": "pruning.surgery.plan",
    "apply_plan": "pruning.surgery.apply_plan",
    "repair": "pruning.repair.least_squares_repair",
    "finetune": "training.finetune",
    "save_pruned": "pruning.surgery.saved_network",
    "load_result": "runs.result",
    "load_pruned": "runs.load_network",
    "prune_blockwise": "blockwise",
    "export_onnx": "export.onnx_export.export_onnx",
    "compare_files": "benchmark",
    "decide": "release.gate",
    "compare_with_baseline": "release.baseline_comparison",
    "make_bundle": "release.bundle",
    "promote": "release.registries.registry",
}

__all__ = [
    "apply_plan",
    "check",
    "compare_files",
    "compare_with_baseline",
    "compress",
    "decide",
    "export_onnx",
    "finetune",
    "list_structures",
    "load_pruned",
    "load_result",
    "load_target",
    "make_bundle",
    "make_plan",
    "observe_activations",
    "promote",
    "prune",
    "prune_blockwise",
    "repair",
    "save_pruned",
    "score",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'deploypipe' has no attribute {name!r}")
    try:
        home = import_module(f"deploypipe.{_HOMES[name]}")
    except ImportError:
        load_onnxruntime()  # says which extra to install, if it was that
        raise
    return getattr(home, name)


def __dir__() -> list[str]:
    return [*__all__, "__all__", "__doc__", "__file__", "__name__", "__path__"]
