"""How much longer do runs for several targets take than one for one of them, beyond the measuring on the devices?

    python benchmarks/targets.py digits x86_cpu raspberry_pi_5 jetson_orin_nano --out runs/targets

Every target alone, in a folder of its own, then all of them one after the other with shared stages. Measuring is what
runs files for their latency and peak memory; latencies that earlier runs left in the cache are not used. Prints a
Markdown table; what a target costs together is what it costs in its place.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from deploypipe.benchmark.latency import time_interleaved
from deploypipe.benchmark.memory import measure_peak_memory
from deploypipe.cli import load_target
from deploypipe.pipeline import compress
from deploypipe.pipeline_module import Pipeline, load_pipeline
from deploypipe.target import Target


@dataclass(slots=True)
class Clock:
    """Counts the seconds inside the functions it was put around."""

    seconds: float = 0.0

    def put_around(self, function: Callable[..., Any]) -> None:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        for name, module in list(sys.modules.items()):
            if name.startswith("deploypipe") and getattr(module, function.__name__, None) is function:
                setattr(module, function.__name__, timed)


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
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    clock = Clock()
    for function in (time_interleaved, measure_peak_memory):
        clock.put_around(function)
    job = load_pipeline(args.pipeline)
    model, targets = job.build_model(), [load_target(name) for name in args.targets]
    shared = args.out / "together" / "shared"
    alone = {t.name: run(clock, job, model, t, args.out / "alone" / t.name, None) for t in targets}
    together = {t.name: run(clock, job, model, t, shared.with_name(t.name), shared) for t in targets}
    print(table(alone, together))


def run(clock: Clock, job: Pipeline, model: nn.Module, target: Target, out: Path, shared: Path | None) -> Run:
    with TemporaryDirectory() as cache:
        os.environ["DEPLOYPIPE_CACHE"] = cache
        start, measured = time.perf_counter(), clock.seconds
        result = compress(
            model, job.load_data(), job.task(), job.recipe(), target, out, source=job.source, shared=shared
        )
        seconds = time.perf_counter() - start
    found = result.benchmark.latency_ratio
    return Run(
        seconds=seconds,
        measuring=clock.seconds - measured,
        latency=found.value if found else None,
        decision=result.decision.verdict.value,
        cached=[stage.stage for stage in result.stages if stage.was_cached],
    )


def table(alone: dict[str, Run], together: dict[str, Run]) -> str:
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
    all_of_them = sum(r.beyond for r in together.values())
    lines.append("")
    lines.append(
        f"Beyond measuring: one target {mean:.1f} s on average, all {len(alone)} {all_of_them:.1f} s, "
        f"{all_of_them / mean:.2f} times"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
