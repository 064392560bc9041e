"""Every value that crosses a stage boundary. Data only: no torch, no behaviour beyond arithmetic on own fields."""

from deploypipe.records.events import Event, Progress, silent
from deploypipe.records.interval import Interval
from deploypipe.records.structures import Side, GroupKind, Names, Member, ChannelGroup, Block, Frozen, ResolvedConstraints, Structures
from deploypipe.records.scores import ScoreTable, Observation, BlockRanking, GroupSummary, ScoreSummary
from deploypipe.records.plan import Edit, GroupCut, PruningPlan, PruneRow, PruneReport, RepairRow, RepairReport, PruneOutcome
from deploypipe.records.search import LossCurve, Curves, Cut, TimedCut, TimedNetworks, LatencyFit, Reach, Candidate, Trial, FEWEST_FOR_IMPORTANCES, SearchResult
from deploypipe.records.training import EpochLog, TrainLog, DepthRow, DepthLog
from deploypipe.records.model_files import FileEntry, Parity, ModelFile, CandidateFile, FloatLayer, Calibration, Converted, PrecisionRow, PrecisionChoice, Golden, EngineKey, EngineLayer, EngineFile
from deploypipe.records.measurement import Environment, MachineState, Conditions, Latency, Measurement, BenchmarkReport, BaselineComparison
from deploypipe.records.release import Origin, Status, Verdict, Waiver, Check, GateDecision, StageTime

__all__ = ["BaselineComparison", "BenchmarkReport", "Block", "BlockRanking", "Calibration", "Candidate", "CandidateFile", "ChannelGroup", "Check", "Conditions", "Converted", "Curves", "Cut", "DepthLog", "DepthRow", "Edit", "EngineFile", "EngineKey", "EngineLayer", "Environment", "EpochLog", "Event", "FEWEST_FOR_IMPORTANCES", "FileEntry", "FloatLayer", "Frozen", "GateDecision", "Golden", "GroupCut", "GroupKind", "GroupSummary", "Interval", "Latency", "LatencyFit", "LossCurve", "MachineState", "Measurement", "Member", "ModelFile", "Names", "Observation", "Origin", "Parity", "PrecisionChoice", "PrecisionRow", "Progress", "PruneOutcome", "PruneReport", "PruneRow", "PruningPlan", "Reach", "RepairReport", "RepairRow", "ResolvedConstraints", "ScoreSummary", "ScoreTable", "SearchResult", "Side", "StageTime", "Status", "Structures", "TimedCut", "TimedNetworks", "TrainLog", "Trial", "Verdict", "Waiver", "silent"]
