"""The inputs of a search, from the stages before it."""

from collections.abc import Mapping
from dataclasses import dataclass

from deploypipe.records import Candidate, Curves, Feasibility, Measurement, ScoreTable, Structures, TimedNetworks
from deploypipe.runs.store import StageResult
from deploypipe.search.evaluation.candidate_files import CandidateFiles
from deploypipe.target import Limit


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchGoal:
    """The dense network, reference and limits of a search. Known before calibration."""

    structures: Structures
    dense: StageResult[Measurement]
    reference: Candidate  # the dense network, as candidates are described
    limits: Mapping[str, Limit]  # those that can be held here
    candidates: CandidateFiles


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchInputs:
    """All that a search needs, from the stages before it."""

    goal: SearchGoal
    latency: StageResult[TimedNetworks] | None  # None: no latency is asked for, or none can be measured here
    feasibility: Feasibility
    scores: ScoreTable
    curves: StageResult[Curves]
