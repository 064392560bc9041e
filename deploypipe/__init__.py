"""Compress a trained network for one device, measure what is shipped, and decide whether to ship it.

    from deploypipe import compress
    result = compress(model, splits, task, recipe, target, "runs/mine")

Each stage can be called alone under the names below. They are loaded when first used, because they bring torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from deploypipe.installed import load_onnxruntime

if TYPE_CHECKING:
    from deploypipe.benchmark import benchmark
    from deploypipe.blockwise import prune_blockwise
    from deploypipe.checks import check
    from deploypipe.export.onnx_file import export_onnx
    from deploypipe.observe.stream import observe
    from deploypipe.pipeline import compress
    from deploypipe.pruning.apply import apply_plan
    from deploypipe.pruning.plan import make_plan
    from deploypipe.pruning.repair import repair
    from deploypipe.pruning.saved import load_pruned
    from deploypipe.pruning.structures import list_structures
    from deploypipe.release.baseline import compare_with_baseline
    from deploypipe.release.bundle import release
    from deploypipe.release.gate import decide
    from deploypipe.release.registry import promote
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
