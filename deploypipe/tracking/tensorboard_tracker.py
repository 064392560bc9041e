"""A run in TensorBoard: event files in a folder. The only importer of torch.utils.tensorboard."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from deploypipe.tracking.tracked_run import Figure, Outcome, TrackedRun


class TensorboardTracker:
    """A resumed run adds a file to its folder; TensorBoard joins them by step."""

    def __init__(self, run: TrackedRun, folder: Path) -> None:
        self.title = f"TensorBoard files in {folder}"
        self._run, self._folder = run, folder
        self._writer: Any = None

    def import_packages(self) -> None:
        import_module("torch.utils.tensorboard")

    def open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder))
        rows = [f"| {name} | {value} |" for name, value in self._run.parameters.items()]
        self._writer.add_text("parameters", "\n".join(["| parameter | value |", "|---|---|", *rows]), 0)
        self._writer.flush()

    def log(self, figures: Sequence[Figure]) -> None:
        for figure in figures:
            self._writer.add_scalar(figure.name, figure.value, figure.step or 0)
        self._writer.flush()

    def close(self, outcome: Outcome) -> None:
        for name, text in {"status": outcome.status, **outcome.texts}.items():
            self._writer.add_text(name, text, 0)
        self._writer.close()
