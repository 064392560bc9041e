"""A study that was killed goes on as if it had not been; what cannot fit is refused by name."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from deploypipe.errors import BudgetError
from deploypipe.recipe import Search
from deploypipe.records import Candidate, Edit, PruningPlan, SearchResult
from deploypipe.search.study import search, violations
from deploypipe.target import Limit

DENSE = Candidate(
    accuracy=0.9, latency_p50_ms=4.0, peak_memory_mib=None, file_size_mib=1.0, num_params=1000, num_macs=1000
)
HALF = {"latency_p50": Limit(value=0.5, is_relative=True)}
SETTINGS = Search(num_trials=8)  # more than there are warm starts


def propose(knobs: Mapping[str, float]) -> PruningPlan:
    removed = round(100 * (1 - knobs["macs_kept"]))
    style = 10 * knobs["exponent"] + knobs["block_weight"] if knobs["measured"] else -1
    edit = Edit(module="conv", side="out", removed=(removed, round(style)))
    return PruningPlan(model_fingerprint="f", cuts=(), edits=(edit,), blocks=())


class Evaluator:
    """Larger is more accurate and slower; raises at one call."""

    def __init__(self, kill_at: int = -1) -> None:
        self.kill_at = kill_at
        self.seen: list[PruningPlan] = []

    def __call__(self, plan: PruningPlan) -> Candidate:
        if len(self.seen) == self.kill_at:
            raise KeyboardInterrupt
        self.seen.append(plan)
        removed, style = plan.edits[0].removed
        kept = 1 - removed / 100
        return Candidate(
            accuracy=0.9 - 0.2 * (1 - kept) ** 2 - 0.001 * abs(style - 7),
            latency_p50_ms=4 * kept,
            peak_memory_mib=None,
            file_size_mib=kept,
            num_params=int(1000 * kept),
            num_macs=int(1000 * kept),
        )


def run(evaluate: Evaluator, storage: Path, limits: Mapping[str, Limit] = HALF, seed: int = 0) -> SearchResult:
    return search(propose, evaluate, DENSE, limits, (0.2, 0.8), SETTINGS, storage=storage, seed=seed)


def test_killed_study_ends_with_the_trials_of_an_undisturbed_one(tmp_path: Path) -> None:
    whole = run(Evaluator(), tmp_path / "whole.db")
    for kill in (0, 3, 4):  # at the first trial, at the fourth, at the eighth: the last one is the sampler's
        with pytest.raises(KeyboardInterrupt):
            run(Evaluator(kill_at=kill), tmp_path / "killed.db")
    assert run(Evaluator(), tmp_path / "killed.db") == whole
    assert [t.number for t in whole.trials] == list(range(8))
    assert all(t.candidate.latency_p50_ms <= 2.0 for t in whole.trials if t.feasible)
    best = whole.trials[whole.best]
    assert best.feasible
    assert best.candidate.accuracy == max(t.candidate.accuracy for t in whole.trials if t.feasible)
    idle = Evaluator()
    assert run(idle, tmp_path / "whole.db") == whole
    assert idle.seen == []


def test_seed_decides_what_is_tried(tmp_path: Path) -> None:
    first, other = (run(Evaluator(), tmp_path / f"{seed}.db", seed=seed) for seed in (1, 2))
    assert [t.knobs for t in first.trials] != [t.knobs for t in other.trials]


def test_same_plan_is_not_evaluated_twice(tmp_path: Path) -> None:
    evaluate = Evaluator()
    result = search(
        lambda knobs: propose({**knobs, "macs_kept": round(knobs["macs_kept"]), "measured": 0.0}),
        evaluate,
        DENSE,
        HALF,
        (0.2, 0.8),
        SETTINGS,
        storage=tmp_path / "study.db",
    )
    assert len(result.trials) == 8
    assert len({t.plan.edits for t in result.trials}) == len(evaluate.seen) == 2
    assert len({tuple(t.knobs.items()) for t in result.trials}) > 6


def test_refusal_names_the_nearest_miss(tmp_path: Path) -> None:
    limits = {"latency_p50": Limit(value=0.4, is_relative=False), "file_size": Limit(value=10.0, is_relative=False)}
    with pytest.raises(BudgetError) as caught:
        run(Evaluator(), tmp_path / "study.db", limits)
    assert "none of 8 candidates" in str(caught.value)
    assert "+100.0% over latency_p50" in str(caught.value)
    assert "budget.latency_p50" in str(caught.value)


def test_violations_are_relative_and_unmeasured_memory_is_left_to_the_gate() -> None:
    limits = {
        "latency_p50": Limit(value=0.5, is_relative=True),
        "macs": Limit(value=2000.0, is_relative=False),
        "peak_memory": Limit(value=1.0, is_relative=True),
    }
    assert violations(DENSE, DENSE, limits) == {"latency_p50": 1.0, "macs": -0.5}
