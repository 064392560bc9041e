"""Load what a run needs, and report each step: together they may take minutes before the first stage."""

import os
from importlib import import_module
from typing import TYPE_CHECKING

from deploypipe.cli.stage_display import shown_stages
from deploypipe.records import Notify, reported

if TYPE_CHECKING:
    from torch import nn

    from deploypipe.task import Splits
    from deploypipe.user_pipeline import UserPipeline


def load_libraries() -> None:
    """Import PyTorch and the rest. Of the processes that torchrun starts, none reports it: they would all do so."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return
    with shown_stages() as notify, reported(notify, "libraries"):
        import_module("deploypipe.pipeline")


def load_network_and_data(loaded: "UserPipeline", notify: Notify) -> tuple["nn.Module", "Splits"]:
    """Build the network, and read the data."""
    with reported(notify, "build_model"):
        model = loaded.build_model()
    with reported(notify, "load_data"):
        splits = loaded.load_data()
    return model, splits
