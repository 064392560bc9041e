"""How the stages of a run fit into memory."""

from dataclasses import dataclass

from deploypipe.records.structures import Names


@dataclass(frozen=True, kw_only=True, slots=True)
class RepairSegment:
    """Layers that are repaired in one pass, with as many samples as memory holds there."""

    layers: Names
    num_samples: int
    positions_per_sample: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RepairFit:
    """How a repair fits into memory. Without segments each layer reads all samples."""

    segments: tuple[RepairSegment, ...] = ()
    batch_size: int = 0  # samples that advance at once, from one layer to the next; 0: as `samples_together` says
    num_bytes: int = 0  # predicted, at its peak
    whole_bytes: int = 0  # what it would take without segments


@dataclass(frozen=True, kw_only=True, slots=True)
class ObserveFit:
    """How many samples are observed at once."""

    max_samples: int = 0  # 0: batches pass as they came
    num_bytes: int = 0  # predicted, at its peak


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """How the stages of a run fit into its recipe's memory. Decided once: a run that is resumed keeps it."""

    allowed_bytes: int
    data_bytes: int  # of the calibration samples
    observe: ObserveFit
    repair: RepairFit
    trial_repair: RepairFit  # of the trials of a search, which read fewer samples
