"""What a search stands on, and what it works with."""

from collections.abc import Mapping
from dataclasses import dataclass

from deploypipe.records import (
    Curves,
    Feasibility,
    Measurement,
    PrecisionRow,
    ScoreTable,
    Structures,
    TimedNetworks,
)
from deploypipe.search.allocation.proposer import Proposer
from deploypipe.search.evaluation.candidate_files import CandidateFiles
from deploypipe.search.evaluation.evaluator import Evaluator
from deploypipe.target import Limit


@dataclass(frozen=True, kw_only=True, slots=True)
class Basis:
    """The stages before a search, for one target."""

    structures: Structures
    scores: ScoreTable  # all alike, as the curves are, before anything is observed
    curves: Curves
    dense: Measurement
    limits: Mapping[str, Limit]  # those that can be held here
    shipping: PrecisionRow  # the precision that candidates are made in
    candidates: CandidateFiles
    timed: TimedNetworks | None = None  # None: no latency is asked for, or none can be taken
    reach: Feasibility | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Tools:
    """Proposes and judges the trials of one search."""

    limits: Mapping[str, Limit]  # with the margin that is left to the gate
    proposer: Proposer
    evaluator: Evaluator
