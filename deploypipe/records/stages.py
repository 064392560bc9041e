"""Every stage of a run, in the order of the run: its name in the run folder, its title on the terminal and in the
report. Before them come the steps that prepare a run, which are never stored."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    name: str
    title: str
    doing: str = ""  # shown while it is at work, if that says more than the title


PREPARATION = (
    Stage(name="libraries", title="libraries", doing="loading PyTorch"),
    Stage(name="load_pipeline", title="pipeline", doing="reading the pipeline"),
    Stage(name="build_model", title="network", doing="building the network"),
    Stage(name="load_data", title="data", doing="reading data"),
    Stage(name="check", title="check", doing="checking network and data"),
    Stage(name="fingerprints", title="fingerprints", doing="hashing network and data"),
)
STAGES = (
    Stage(name="structures", title="structures"),
    Stage(name="dense_export", title="dense export"),
    Stage(name="baseline", title="baseline"),
    Stage(name="dense_precision", title="dense precision"),
    Stage(name="latency", title="latency samples"),
    Stage(name="feasibility", title="feasibility"),
    Stage(name="memory", title="memory", doing="measuring the activations of two samples"),
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
_WORK = {"latency": "timing", "repair": "repairing layers"}  # inside a stage
_KNOWN = {stage.name: stage for stage in (*PREPARATION, *STAGES)}


def title_of(name: str) -> str:
    """The title of a stage; the plain name if no run has such a stage (parts of `bench`)."""
    return _KNOWN[name].title if name in _KNOWN else name


def work_of(name: str) -> str:
    """What is done inside a stage that is at work: one trial's repair, timed runs."""
    return _WORK.get(name, title_of(name))


def doing_of(name: str) -> str:
    """The line that is shown while the stage runs."""
    return (_KNOWN[name].doing if name in _KNOWN else "") or title_of(name)
