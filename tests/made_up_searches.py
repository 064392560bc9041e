"""Searches over made-up networks whose accuracy and cost are known at once."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from deploypipe.recipe import Search
from deploypipe.records import Candidate, Edit, Notify, PruningPlan, SearchResult, Trial, silent
from deploypipe.search.distributed.study_storage import Storage
from deploypipe.search.evaluation.early_stopping import interim_sample_counts
from deploypipe.search.evaluation.run_trial import IsSettled
from deploypipe.search.sample_results import Results
from deploypipe.search.study import search
from deploypipe.target import Limit

DENSE = Candidate(
    accuracy=0.9, latency_p50_ms=4.0, peak_memory_mib=None, file_size_mib=1.0, num_params=1000, num_macs=1000
)
HALF = {"latency_p50": Limit(value=0.5, is_relative=True)}
SETTINGS = Search(num_trials=10)  # more than there are warm starts
ORIGIN = {"model": "m", "data": "d", "device": "x"}
NUM_VAL = 4000


def propose(knobs: Mapping[str, float], _: Sequence[Trial] = ()) -> PruningPlan:
    removed = round(100 * (1 - knobs["fill"]))
    shape = 10 * knobs["exponent"] + knobs["block_weight"] + 2 * knobs["late"] + knobs["by_importance"]
    style = -1 if knobs["control"] else shape
    edit = Edit(module="conv", side="out", removed=(removed, round(style)))
    return PruningPlan(model_fingerprint="f", cuts=(), edits=(edit,), blocks=())


class Evaluator:
    """Larger is more accurate and slower; raises at one call. `steepness`: how far apart styles are in accuracy."""

    def __init__(
        self,
        kill_at: int = -1,
        *,
        steepness: float = 0.001,
        is_patient: bool = False,
        memory_mib: float | None = None,
        before: Callable[[int], None] = lambda call: None,
    ) -> None:
        self.kill_at, self.before = kill_at, before
        self.steepness, self.is_patient, self.memory_mib = steepness, is_patient, memory_mib
        self.seen: list[PruningPlan] = []
        self.num_samples = 0

    def __call__(self, plan: PruningPlan, is_settled: IsSettled) -> tuple[Candidate, Results]:
        if len(self.seen) == self.kill_at:
            raise KeyboardInterrupt
        self.before(len(self.seen))
        self.seen.append(plan)
        removed, style = plan.edits[0].removed
        kept = 1 - removed / 100
        costs = Candidate(
            accuracy=0.0,
            latency_p50_ms=4 * kept,
            peak_memory_mib=None if self.memory_mib is None else self.memory_mib * (2 - kept),
            file_size_mib=kept,
            num_params=int(1000 * kept),
            num_macs=int(1000 * kept),
        )
        hits = self._hits(plan, 0.9 - 0.2 * (1 - kept) ** 2 - self.steepness * abs(style - 7))
        for end in interim_sample_counts(NUM_VAL):
            candidate = replace(costs, accuracy=float(hits[:end].mean()))
            if end == NUM_VAL or (is_settled(candidate, hits[:end]) and not self.is_patient):
                self.num_samples += end
                return candidate, hits[:end]
        raise AssertionError("the last look is at all of val")

    def _hits(self, plan: PruningPlan, accuracy: float) -> Results:
        """Networks of one family mostly fail on the same samples."""
        own = int.from_bytes(hashlib.sha256(repr(plan).encode()).digest()[:8], "big")
        shared, alone = (np.random.default_rng(s).random(NUM_VAL) for s in (0, own))
        return np.where(alone < 0.1, np.roll(shared, own % NUM_VAL), shared).__lt__(accuracy).astype(np.float64)


def run(
    evaluate: Evaluator,
    storage: Path | Storage,
    limits: Mapping[str, Limit] = HALF,
    seed: int = 0,
    *,
    settings: Search = SETTINGS,
    origin: Mapping[str, object] = ORIGIN,
    dense: Candidate = DENSE,
    notify: Notify = silent,
) -> SearchResult:
    at, fill = Storage.own(storage) if isinstance(storage, Path) else storage, (0.2, 0.8)
    return search(propose, evaluate, dense, limits, fill, settings, storage=at, origin=origin, seed=seed, notify=notify)
