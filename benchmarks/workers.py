"""How a search scales with its workers: measured with a few on a real database, simulated for hundreds.

    python benchmarks/workers.py --out runs/workers

Starts a PostgreSQL server (pip install pgserver) and measures the trials per minute of 1, 2 and 4 processes whose
trials only sleep. It also measures the seconds to claim a trial and to report its result, with few and with many trials
in the study. With those figures it simulates searches of 8 to 512 workers: with log-normal trial times, and, if --study
names the study-*.db of a run folder, with the times of its trials.
"""

import argparse
import heapq
import json
import math
import os
import random
import sqlite3
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pgserver
import sqlalchemy

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from made_up_searches import DENSE, ORIGIN, Evaluator, propose, run  # made-up networks

from deploypipe.recipe import Search
from deploypipe.search.allocation.limits import violations
from deploypipe.search.distributed.study_storage import Storage
from deploypipe.search.distributed.trial_queue import open_trial_queue
from deploypipe.search.evaluation.run_trial import History, evaluate_plan
from deploypipe.search.sampling import knobs, next_knobs, warm_starts

FILL = (0.2, 0.8)
COUNTS = (1, 2, 4)
SIMULATED = (8, 32, 128, 512)
PARALLELS, NUM_QUALITY, NUM_SEEDS = (1, 8, 32, 64), 64, 5
PER_WORKER = 16  # simulated trials
BATCH = 4  # trials that a worker would take at once
SIGMA = 0.5  # of a trial's seconds, log-normal: the middle half lies within a factor of two


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of overhead, without the trials themselves."""

    claim_s: float  # one worker after the other
    claim_growth_s: float  # of a claim, for each trial in the study
    tell_s: float
    connect_s: float  # a new connection


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/workers"))
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds that a trial sleeps")
    parser.add_argument("--trials", type=int, default=24, help="number of trials in a measured search")
    parser.add_argument("--study", type=Path, help="study-*.db of a run folder: also simulate with its trials' times")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="deploypipe-pg-") as folder:
        server = pgserver.get_server(folder, cleanup_mode="stop")
        try:
            rates = {n: rate(server.get_uri(), n, arguments.seconds, arguments.trials) for n in COUNTS}
            costs = measure_costs(server.get_uri())
        finally:
            server.cleanup()
    print(f"\n{os.cpu_count()} cores, PostgreSQL, {arguments.trials} trials that sleep {arguments.seconds:g} s")
    for count, per_minute in rates.items():
        print(f"{count} workers: {per_minute:6.1f} trials a minute, {per_minute / rates[1]:.2f} times one")
    print(
        f"taking a trial: {1e3 * costs.claim_s:.0f} ms, and {1e3 * costs.claim_growth_s:.2f} ms more for each in the "
        f"study; telling it: {1e3 * costs.tell_s:.0f} ms; a connection that is not kept would add "
        f"{1e3 * costs.connect_s:.1f} ms to each statement"
    )
    times = {f"log-normal, mean {mean:g} s": log_normal(mean) for mean in (10.0, 60.0)}
    if arguments.study:
        times[str(arguments.study)] = trial_seconds(arguments.study)
    rows = simulate_all(costs, times)
    best = {parallel: quality(parallel, arguments.out) for parallel in PARALLELS}
    print(
        f"\nbest of {NUM_QUALITY} made-up trials (TPE, {NUM_SEEDS} seeds), of which one looks only at those so far back"
    )
    for parallel, (mean, error) in best.items():
        print(f"num_parallel {parallel:3d}: {mean:.4f} +- {error:.4f}")
    (arguments.out / "workers.json").write_text(json.dumps({"rates": rates, "rows": rows, "best": best}, indent=1))


def quality(parallel: int, out: Path) -> tuple[float, float]:
    """Accuracy of the best trial, its mean over seeds and that mean's standard error."""
    found = []
    for seed in range(NUM_SEEDS):
        with TemporaryDirectory(dir=out) as folder:
            settings = Search(num_trials=NUM_QUALITY, num_parallel=parallel)
            result = run(Evaluator(steepness=0.01), Path(folder) / "study.db", seed=seed, settings=settings)
        found.append(result.trials[result.best].candidate.accuracy)
    return statistics.mean(found), statistics.stdev(found) / math.sqrt(NUM_SEEDS)


def rate(address: str, count: int, seconds: float, num_trials: int) -> float:
    """Trials a minute, from the first worker's first trial to the last one's end."""
    script = Path(__file__).parents[1] / "tests" / "search_worker.py"
    with TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{number}.log" for number in range(count)]
        command = [sys.executable, str(script), address, str(num_trials), "8", str(seconds)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        processes = [subprocess.Popen([*command, str(log), f"rate-{count}"], env=environment) for log in logs]
        while not any(log.exists() for log in logs):
            time.sleep(0.01)
        started = time.perf_counter()
        for process in processes:
            if process.wait():
                raise SystemExit("a worker failed")
        taken = time.perf_counter() - started
    return 60 * num_trials / taken


def measure_costs(address: str, num_trials: int = 60) -> Costs:
    """Time one process with empty trials: only storage and sampler take time."""
    settings = Search(num_trials=num_trials, num_parallel=1)
    storage = Storage(url=address, study="costs")
    space, warm = knobs(FILL), warm_starts(FILL)
    turned = partial(_turned, space=space, warm=warm, settings=settings)
    claims, tells = [], []
    with open_trial_queue(
        storage, space, settings.objectives, {name: str(value) for name, value in ORIGIN.items()}
    ) as queue:
        for _ in range(num_trials):
            started = time.perf_counter()
            claim = queue.claim(num_trials, 1, turned)
            claims.append(time.perf_counter() - started)
            assert claim is not None
            chosen = {"control": 0.0, **claim.knobs}
            plan = propose(chosen)
            excess_of = partial(violations, dense=DENSE, limits={})
            history = History(trials=[], results={})
            trial, results = evaluate_plan(
                claim.number, chosen, plan, Evaluator(), excess_of, settings.objectives, history
            )
            started = time.perf_counter()
            queue.finish(claim, trial, results, [trial.candidate.accuracy])
            tells.append(time.perf_counter() - started)
    growth, least = statistics.linear_regression(range(num_trials), claims)
    return Costs(
        claim_s=max(least, 0.0),
        claim_growth_s=max(growth, 0.0),
        tell_s=statistics.median(tells),
        connect_s=connect_seconds(storage),
    )


def connect_seconds(storage: Storage) -> float:
    engine = sqlalchemy.create_engine(storage.open().engine.url, poolclass=sqlalchemy.NullPool)
    taken = []
    for _ in range(20):
        started = time.perf_counter()
        engine.connect().close()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def _turned(number, seen, *, space, warm, settings):  # type: ignore[no-untyped-def]
    return next_knobs(number, seen, space, warm, settings, 0)


def log_normal(mean_s: float) -> list[float]:
    rng = random.Random(0)
    return [rng.lognormvariate(math.log(mean_s) - SIGMA**2 / 2, SIGMA) for _ in range(1000)]


def trial_seconds(study: Path) -> list[float]:
    """The seconds of the trials in a run's study; a trial that repeats another's network takes almost none."""
    with sqlite3.connect(study) as file:
        asked = "SELECT (julianday(datetime_complete) - julianday(datetime_start)) * 86400 FROM trials"
        taken = [seconds for (seconds,) in file.execute(f"{asked} WHERE state = 'COMPLETE'")]
    print(f"{study}: {len(taken)} trials of {min(taken):.1f} to {max(taken):.1f} s, mean {statistics.mean(taken):.1f}")
    return taken


def simulate_all(costs: Costs, times: dict[str, list[float]]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    print("\nworkers  num_parallel  taken at once  trials/min  of ideal  busy queue  trial times")
    for name, seconds in times.items():
        for workers in SIMULATED:
            for parallel, batch in ((workers, 1), (2 * workers, 1), (4 * workers, 1), (4 * workers, BATCH)):
                found = simulate(workers, parallel, seconds, PER_WORKER * workers, costs, batch)
                rows.append({"workers": workers, "parallel": parallel, "times": name, "batch": batch, **found})
                print(
                    f"{workers:7d}  {parallel:12d}  {batch:13d}  {found['per_minute']:10.1f}  "
                    f"{found['of_ideal']:8.2f}  {found['queue_busy']:10.2f}  {name}"
                )
    return rows


def simulate(
    workers: int, parallel: int, seconds: list[float], num_trials: int, costs: Costs, batch: int = 1
) -> dict[str, float]:
    """Simulate workers. Each takes the lowest free trial, once the trial `parallel` numbers before it is done."""
    rng = random.Random(0)
    free = [0.0] * workers  # when each worker asks for work
    done_at: list[float] = []  # of the trials, by number
    queue_free = busy = ready = 0.0
    for first in range(0, num_trials, batch):
        numbers = range(first, min(first + batch, num_trials))
        if numbers[-1] >= parallel:
            ready = max([ready, *(done_at[n - parallel] for n in numbers if n >= parallel)])
        begun = max(heapq.heappop(free), ready, queue_free)
        claim = costs.claim_s + costs.claim_growth_s * first
        queue_free, busy = begun + claim, busy + claim
        at = begun + claim
        for _ in numbers:
            at += rng.choice(seconds) + costs.tell_s
            done_at.append(at)
        heapq.heappush(free, at)
    whole = max(done_at)
    ideal = num_trials * statistics.mean(seconds) / workers
    return {"per_minute": 60 * num_trials / whole, "of_ideal": ideal / whole, "queue_busy": busy / whole}


if __name__ == "__main__":
    main()
