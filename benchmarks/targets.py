"""How much longer do runs for several targets take than a run for one, apart from measuring on the devices?

    python benchmarks/targets.py digits x86_cpu raspberry_pi_5 jetson_orin_nano --out runs/targets [--jobs 3]

First every target runs alone, in its own folder. Then all of them run with shared stages, one after another or --jobs
at a time, in separate processes that share the threads. Measuring means running files for latency and peak memory;
nothing else runs meanwhile. Latencies cached by earlier runs are not used; the runs with shared stages use one cache.
Prints a Markdown table. The cost of a target among others depends on its place in the order.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch
from torch import nn

from deploypipe.pipeline import compress
from deploypipe.scheduling.exclusive_measurement import exclusive_measurement
from deploypipe.target_files import load_target
from deploypipe.user_pipeline import UserPipeline, load_pipeline

_THREADS = torch.get_num_threads()


@dataclass(slots=True)
class Clock:
    """Count the seconds of measuring."""

    seconds: float = 0.0

    @contextmanager
    def measuring(self) -> Iterator[None]:
        with exclusive_measurement():
            start = time.perf_counter()
            try:
                yield
            finally:
                self.seconds += time.perf_counter() - start


@cache
def clock() -> Clock:
    """The clock of this process, which counts from the first call on."""
    made = Clock()
    for name, module in list(sys.modules.items()):
        if name.startswith("deploypipe.") and getattr(module, "exclusive_measurement", None) is exclusive_measurement:
            setattr(module, "exclusive_measurement", made.measuring)  # noqa: B010
    return made


@cache
def loaded(pipeline: str) -> tuple[UserPipeline, nn.Module]:
    job = load_pipeline(pipeline)
    return job, job.build_model()


@dataclass(frozen=True, slots=True)
class Run:
    seconds: float
    measuring: float
    latency: float | None  # relative to the dense network's
    decision: str
    cached: Sequence[str]  # stages

    @property
    def beyond(self) -> float:
        return self.seconds - self.measuring


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline")
    parser.add_argument("targets", nargs="+", help="targets of ./targets, or paths")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1, help="targets at a time")
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    names = [load_target(name).name for name in args.targets]
    runs = [
        run(args.pipeline, target, args.out / "alone" / name, None, args.out / "caches" / name)
        for target, name in zip(args.targets, names, strict=True)
    ]
    together, seconds = run_together(args.pipeline, args.targets, args.out / "together", args.jobs)
    print(table(dict(zip(names, runs, strict=True)), dict(zip(names, together, strict=True)), seconds))


def run_together(pipeline: str, targets: Sequence[str], out: Path, jobs: int) -> tuple[list[Run], float]:
    """The runs and their total seconds. Processes have loaded libraries and the network before."""
    shared, cache = out / "shared", out / "cache"
    if jobs == 1:
        start = time.perf_counter()
        runs = [run(pipeline, t, out / load_target(t).name, shared, cache) for t in targets]
        return runs, time.perf_counter() - start
    os.environ["OMP_NUM_THREADS"] = str(max(1, _THREADS // jobs))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=be_ready, initargs=(pipeline, context.Barrier(jobs))) as pool:
        for ready in [pool.submit(os.getpid) for _ in range(jobs)]:
            ready.result()
        start = time.perf_counter()
        begun = [pool.submit(run, pipeline, t, out / load_target(t).name, shared, cache) for t in targets]
        return [each.result() for each in begun], time.perf_counter() - start


def be_ready(pipeline: str, all_are: Barrier) -> None:
    loaded(pipeline)
    all_are.wait()


def run(pipeline: str, target: str, out: Path, shared: Path | None, cache: Path) -> Run:
    job, model = loaded(pipeline)
    os.environ["DEPLOYPIPE_CACHE"] = str(cache.absolute())
    start, measured = time.perf_counter(), clock().seconds
    device = load_target(target)
    result = compress(model, job.load_data(), job.task(), job.recipe(), device, out, source=job.source, shared=shared)
    seconds = time.perf_counter() - start
    found = result.benchmark.latency_ratio
    return Run(
        seconds=seconds,
        measuring=clock().seconds - measured,
        latency=found.value if found else None,
        decision=result.decision.verdict.value,
        cached=[stage.stage for stage in result.stages if stage.was_cached],
    )


def table(alone: dict[str, Run], together: dict[str, Run], seconds: float) -> str:
    lines = [
        "| target | alone, s | of it measuring | together, s | of it measuring | latency, then together | found |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in alone.items():
        other = together[name]
        latencies = ", ".join("-" if r.latency is None else f"{r.latency:.3f} {r.decision}" for r in (one, other))
        times = " | ".join(f"{r.seconds:.1f} | {r.measuring:.1f}" for r in (one, other))
        lines.append(f"| {name} | {times} | {latencies} | {', '.join(other.cached)} |")
    mean = sum(r.beyond for r in alone.values()) / len(alone)
    all_of_them = seconds - sum(r.measuring for r in together.values())
    lines.append("")
    lines.append(
        f"Beyond measuring: one target {mean:.1f} s on average, all {len(alone)} {all_of_them:.1f} s, "
        f"{all_of_them / mean:.2f} times"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
