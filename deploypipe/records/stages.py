"""Every stage of a run, in the order of the run: its name in the run folder, its title on the terminal and in the
report."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    name: str
    title: str


STAGES = (
    Stage(name="structures", title="structures"),
    Stage(name="dense_export", title="dense export"),
    Stage(name="baseline", title="baseline"),
    Stage(name="dense_precision", title="dense precision"),
    Stage(name="latency", title="latency samples"),
    Stage(name="feasibility", title="feasibility"),
    Stage(name="observe", title="observe"),
    Stage(name="score", title="score"),
    Stage(name="curves", title="loss curves"),
    Stage(name="search", title="search"),
    Stage(name="confirm", title="confirm"),
    Stage(name="finalist", title="finalists"),
    Stage(name="prune", title="prune"),
    Stage(name="finetune", title="fine-tune"),
    Stage(name="export", title="export"),
    Stage(name="precision", title="precision"),
    Stage(name="engine", title="engine"),
    Stage(name="benchmark", title="benchmark"),
    Stage(name="gate", title="gate"),
    Stage(name="golden", title="golden samples"),
)
_TITLES = {stage.name: stage.title for stage in STAGES}


def title_of(name: str) -> str:
    """The title of a stage; what is no stage of a run (a part of `bench`) is shown by its name."""
    return _TITLES.get(name, name)
