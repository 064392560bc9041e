"""Turn exceptions of the user's network, data and task into one clear error with the function and line that failed.

A task is wrapped once, when it is passed in. Exceptions of forward() are caught around a whole stage.
"""

import re
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

from torch import Tensor

from deploypipe.errors import DataError, DeploypipeError, ModelError, PipelineError
from deploypipe.files.exhausted_resources import find_exhaustion, raise_if_exhausted
from deploypipe.task import Task
from deploypipe.task_result_checks import (
    distillation_loss_problem,
    kind_of,
    metric_problem,
    optimizer_problem,
    real_tokens_problem,
    schedule_problem,
    slices_problem,
)

_TASK_FUNCTIONS = (
    "loss",
    "metric",
    "slices",
    "distillation_loss",
    "real_tokens",
    "optimizer",
    "schedule",
    "training_step",
)
_PACKAGE = Path(__file__).parent
_LIBRARIES = tuple(str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "purelib", "platlib"))
_WORKER_FRAME = re.compile(r'File "(?P<filename>[^"]+)", line (?P<lineno>\d+), in (?P<name>\S+)')


@contextmanager
def wrap_user_errors(
    what: str, remedy: str = "correct it", kind: type[DeploypipeError] = PipelineError
) -> Iterator[None]:
    """Around a call of the user's code: any exception becomes one error of class `kind`."""
    try:
        yield
    except DeploypipeError:
        raise
    except Exception as error:
        raise_if_exhausted(error)
        raise kind(f"{_place(error)}{what} raised {_summary(error)}; {remedy}") from error


@contextmanager
def wrap_forward_errors() -> Iterator[None]:
    """Around a whole stage: an exception of the network's forward(), however deep, becomes an error that names it."""
    try:
        yield
    except DeploypipeError:
        raise
    except Exception as error:
        if found := find_user_error(error):
            raise found from error
        raise


def find_user_error(error: Exception) -> DeploypipeError | None:
    """The error to report instead of an exception of the user's code; None if the exception is ours.

    Task and splits have their own errors already. What remains is forward(), and rarer code that a library calls for
    us, such as a network's `__deepcopy__`.
    """
    if find_exhaustion(error):
        return None
    frames = traceback.extract_tb(error.__traceback__)
    ours = [i for i, frame in enumerate(frames) if Path(frame.filename).is_relative_to(_PACKAGE)]
    last = frames[ours[-1]] if ours else None
    if last and last.name == "forward" and Path(last.filename) == _PACKAGE / "task.py":
        return ModelError(
            f"{_place(error)}the network's forward() raised {_summary(error)}; correct it, or report it if it only "
            "fails on a pruned network"
        )
    theirs = [frame for frame in frames[ours[-1] + 1 if ours else 0 :] if _is_users(frame.filename)]
    if not theirs or theirs[0] is frames[ours[-1] + 1 if ours else 0]:
        return None
    return PipelineError(f"{_place(error)}{theirs[0].name}() raised {_summary(error)}; correct it")


def wrap_task(task: Task) -> Task:
    """The task with its functions wrapped: exceptions name the function, and results are checked."""
    if getattr(task.loss, "is_wrapped", False):
        return task
    for name in _TASK_FUNCTIONS:
        function = getattr(task, name)
        if not callable(function) and (function is not None or name in ("loss", "metric")):
            raise PipelineError(f"task().{name} must be a function, got {kind_of(function)}; give a function")
    return replace(
        task,
        loss=_wrap_loss(task.loss),
        metric=_wrap_function(task.metric, "metric", metric_problem),
        slices=task.slices and _wrap_function(task.slices, "slices", slices_problem),
        distillation_loss=task.distillation_loss
        and _wrap_function(task.distillation_loss, "distillation_loss", distillation_loss_problem),
        real_tokens=task.real_tokens and _wrap_function(task.real_tokens, "real_tokens", real_tokens_problem),
        optimizer=task.optimizer and _wrap_function(task.optimizer, "optimizer", optimizer_problem),
        schedule=task.schedule and _wrap_function(task.schedule, "schedule", schedule_problem),
        training_step=task.training_step
        and _wrap_function(task.training_step, "training_step", distillation_loss_problem),
    )


def _wrap_function(function: Callable[..., Any], name: str, problem: Callable[[Any], str]) -> Callable[..., Any]:
    """problem: what is wrong with a value that the function returned; "" if it can be used."""

    @wraps(function)
    def wrapped(*args: Any) -> Any:
        with wrap_user_errors(f"task().{name}"):
            value = function(*args)
        if found := problem(value):
            raise DataError(f"task().{name} returned {found}")
        return value

    return wrapped


def _wrap_loss(loss: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
    @wraps(loss)
    def wrapped(outputs: Any, target: Any) -> Tensor:
        with wrap_user_errors("task().loss", _remedy(target)):
            value = loss(outputs, target)
        if not isinstance(value, Tensor) or value.dim():
            raise DataError(
                f'task().loss returned {kind_of(value)}; return one number, the mean over the batch (reduction="mean")'
            )
        return value

    wrapped.is_wrapped = True  # type: ignore[attr-defined]
    return wrapped


def _remedy(target: Any) -> str:
    """The remedy for a loss that fails on these targets."""
    if not isinstance(target, Tensor):
        return f"the targets are a {type(target).__name__}: give what the loss accepts, for classes a tensor of int64"
    if str(target.dtype) in ("torch.int32", "torch.int16", "torch.int8", "torch.uint8", "torch.bool"):
        return f"the targets are {target.dtype}: class numbers must be int64, write y.long()"
    if target.is_floating_point() and target.dim() == 1:
        return f"the targets are {target.dtype}: class numbers must be int64, write y.long()"
    return f"the targets are {target.dtype} of shape {tuple(target.shape)}: give what the loss accepts"


def _is_users(filename: str) -> bool:
    path = str(Path(filename).resolve())
    return Path(path).is_file() and not path.startswith((str(_PACKAGE), *_LIBRARIES))


def _place(error: Exception) -> str:
    """`file, line N (in f()): ` of the user's innermost frame, also of one in a DataLoader's worker; "" without one."""
    frames = [(f.filename, f.lineno, f.name) for f in traceback.extract_tb(error.__traceback__)]
    frames += [(m["filename"], int(m["lineno"]), m["name"]) for m in _WORKER_FRAME.finditer(str(error))]
    theirs = [frame for frame in frames if _is_users(frame[0])]
    return "{}, line {} (in {}): ".format(*theirs[-1]) if theirs else ""


def _summary(error: Exception) -> str:
    """Class and first line of an error; of one from a DataLoader's worker, the last line, which names the cause."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if lines and lines[0].startswith("Caught ") and "worker process" in lines[0]:  # torch's DataLoader
        return lines[-1]
    return f"{type(error).__name__}{': ' + lines[0] if lines else ''}"
