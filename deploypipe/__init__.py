"""Compress a trained network for one device, measure what is shipped, and decide whether to ship it.

    from deploypipe import compress
    result = compress(model, splits, task, recipe, target, "runs/mine")

Each stage can be called alone under the names below. They are loaded when first used, because they bring torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from deploypipe.installed_packages import load_onnxruntime

if TYPE_CHECKING:
    from deploypipe.benchmark import benchmark
    from deploypipe.blockwise import prune_blockwise
    from deploypipe.export.onnx_export.export_onnx import export_onnx
    from deploypipe.observe.calibration_pass import observe
    from deploypipe.pipeline import compress
    from deploypipe.preflight import check
    from deploypipe.pruning.repair.least_squares_repair import repair
    from deploypipe.pruning.surgery.apply_plan import apply_plan
    from deploypipe.pruning.surgery.plan import make_plan
    from deploypipe.pruning.surgery.saved_network import load_pruned
    from deploypipe.pruning.tracing.structures import list_structures
    from deploypipe.release.baseline_comparison import compare_with_baseline
    from deploypipe.release.bundle import release
    from deploypipe.release.gate import decide
    from deploypipe.release.registries.registry import promote
    from deploypipe.scoring import score
    from deploypipe.training.finetune import finetune

_HOMES = {
    "check": "checks",
    "compress": "pipeline",
    "list_structures": "pruning.structures",
    "observe": "observe.stream",
    "score": "scoring",
    "make_plan": "pruning.plan",
    "apply_plan": "pruning.apply",
    "repair": "pruning.repair",
    "finetune": "training.finetune",
    "export_onnx": "export.onnx_file",
    "benchmark": "benchmark",
    "decide": "release.gate",
    "compare_with_baseline": "release.baseline",
    "release": "release.bundle",
    "promote": "release.registry",
    "prune_blockwise": "blockwise",
    "load_pruned": "pruning.saved",
}

__all__ = [
    "apply_plan",
    "benchmark",
    "check",
    "compare_with_baseline",
    "compress",
    "decide",
    "export_onnx",
    "finetune",
    "list_structures",
    "load_pruned",
    "make_plan",
    "observe",
    "promote",
    "prune_blockwise",
    "release",
    "repair",
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


class _Package(ModuleType):
    """Two stages share their name with the subpackage that they live in: under that name, here, is the stage."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):  # else: the import system, binding the subpackage
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
