"""Does a run that is killed and resumed many times end with the same files as an undisturbed run?

    python benchmarks/kills.py --kills 60 --out runs/kills
    python benchmarks/kills.py --pipeline tests/tiny_pipeline.py --kills 60 --out runs/kills-tiny

Runs the digits (or another pipeline) with few trials and a MACs budget, which does not depend on timing. Each process
is a fork of this one, which saves the import of torch, and is ended by kill -9 at a random moment. A third of the kills
aim at measurements. When a run ends, its plan and its model file must equal those of an undisturbed run byte for byte,
and no partial file may be left. Then the next folder begins. The exit code is 1 if anything differs. Kills after the
end of a run do not count.
"""

import argparse
import json
import math
import multiprocessing
import os
import pickle
import random
import signal
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from deploypipe.benchmark import latency, memory
from deploypipe.files.hashing import file_sha256
from deploypipe.files.json_records import to_json
from deploypipe.pipeline import compress
from deploypipe.recipe import Recipe
from deploypipe.records import Cached, Event, Started
from deploypipe.runs.result import load_result
from deploypipe.target import Budget, Target
from deploypipe.text.sealed_json import unseal
from deploypipe.user_pipeline import UserPipeline, load_pipeline

TARGET = Target(
    runtime="onnxruntime",
    name="here",
    num_latency_samples=200,
    budget=Budget(macs="0.5x", accuracy_drop_pp=10.0),
)
_LONGEST_S = 1.5  # from the start of a stage or measurement to the kill
_ENDED = "ended"
_AIMS = ("start", "start", "measuring in")


def settings(recipe: Recipe) -> Recipe:
    """A recipe with few trials and one epoch: enough work for a kill to interrupt every stage."""
    return replace(
        recipe,
        search=replace(recipe.search, num_trials=3, num_finalists=1, num_curve_samples=128, num_repair_samples=128),
        finetune=replace(recipe.finetune, num_epochs=2, precision="fp32"),
    )


def work(pipeline: UserPipeline, model: torch.nn.Module, folder: Path, events: Connection) -> None:
    """Run in the child process, and send the current stage to the process that kills it."""
    stage = ""

    def notify(event: Event) -> None:
        nonlocal stage
        if isinstance(event, Started | Cached):
            stage = event.stage
            events.send(("start" if isinstance(event, Started) else "cached", stage))

    @contextmanager
    def watched(own: Any) -> Any:
        with own():
            events.send(("measuring in", stage))
            try:
                yield
            finally:
                events.send(("measured in", stage))

    torch.set_num_threads(1)
    for module in (latency, memory):
        own = vars(module)["exclusive_measurement"]
        setattr(module, "exclusive_measurement", partial(watched, own))  # noqa: B010  # the module does not export it
    recipe = settings(pipeline.recipe())
    compress(
        model, pipeline.load_data(), pipeline.task(), recipe, TARGET, folder, source=pipeline.source, notify=notify
    )


def built(pipeline: UserPipeline) -> torch.nn.Module:
    """The dense network, made in another process: after a backward pass in this one, no fork could run another."""
    receiving, sending = multiprocessing.Pipe(duplex=False)
    if os.fork() == 0:
        sending.send_bytes(pickle.dumps(pipeline.build_model()))
        os._exit(0)
    model: torch.nn.Module = pickle.loads(receiving.recv_bytes())
    return model


def life(pipeline: UserPipeline, model: torch.nn.Module, folder: Path, rng: random.Random, aim: str) -> str:
    """Run a process and kill it; return the stage that was killed, or `_ENDED` if the process finished.

    aim: "start" kills in the first seconds of one of the next few unfinished stages, "measuring in" during one of the
    next few measurements, "never" does not kill.
    """
    receiving, sending = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        receiving.close()
        code = 1
        try:
            work(pipeline, model, folder, sending)
            code = 0
        finally:
            os._exit(code)
    sending.close()
    at, skipped, until = "beginning", rng.randrange(4), math.inf
    while (left := until - time.monotonic()) > 0:
        if not receiving.poll(None if math.isinf(left) else left):
            break
        try:
            kind, stage = receiving.recv()
        except EOFError:
            break
        at = stage if kind == "start" else f"{kind} {stage}"
        if kind == "cached":  # the stage did not run
            skipped, until = (skipped + 1, math.inf) if aim == "start" else (skipped, until)
        elif kind == aim:
            skipped -= 1
            until = time.monotonic() + rng.uniform(0.0, _LONGEST_S) if skipped < 0 and math.isinf(until) else until
    os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, -signal.SIGKILL):
        sys.exit(f"a resumed process failed with exit code {code} in {folder}")
    return _ENDED if code == 0 else at


def decided(folder: Path) -> str:
    """The decisions of a search and the shipped files, without measured times."""
    result = load_result(folder)
    assert result.search
    trials = [
        [
            trial.knobs,
            json.loads(to_json(trial.plan)),
            trial.candidate.accuracy,
            trial.candidate.num_macs,
            trial.feasible,
        ]
        for trial in result.search.trials
    ]
    return json.dumps(
        [trials, result.search.best, json.loads(to_json(result.prune)), file_sha256(folder / "model.onnx")]
    )


def problems(folder: Path) -> list[str]:
    """Incomplete records and leftover files."""
    found = [str(p) for p in folder.rglob("*") if ".part" in p.name or p.name.startswith(".")]
    for path in folder.glob("[0-9][0-9]-*.json"):
        stored = json.loads(unseal(path.read_bytes()))
        found += [str(path) for file, sha in stored["files"].items() if file_sha256(folder / path.stem / file) != sha]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--pipeline", default="digits")
    parser.add_argument("--out", type=Path, default=Path("runs/kills"))
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rng, started = random.Random(asked.seed), time.monotonic()
    pipeline = load_pipeline(asked.pipeline)
    model = built(pipeline)
    torch.set_num_threads(1)
    if life(pipeline, model, asked.out / "whole", rng, "never") != _ENDED:
        sys.exit("the undisturbed run did not end")
    expected = decided(asked.out / "whole")
    print(f"undisturbed: {time.monotonic() - started:.0f} s", flush=True)
    hits: Counter[str] = Counter()
    ends, wrong = 0, []
    while hits.total() < asked.kills or ends == 0:
        folder = asked.out / f"killed-{ends}"
        is_over = hits.total() >= asked.kills
        at = life(
            pipeline,
            model,
            folder,
            rng,
            "never" if is_over else rng.choice(_AIMS),
        )
        if at != _ENDED:
            hits[at] += 1
            print(f"{hits.total():3d}  killed at: {at}", flush=True)
            continue
        ends += 1
        wrong += problems(folder)
        wrong += [f"{folder}: another plan or file"] if decided(folder) != expected else []
        print(f"     run {ends} came to its end, {wrong or 'as it should'}", flush=True)
    num_measuring = sum(count for at, count in hits.items() if at.startswith("measuring in"))
    print(
        f"{hits.total()} kills, {num_measuring} of them while measuring, {ends} runs to the end, {len(wrong)} problems"
    )
    print(f"{time.monotonic() - started:.0f} s; by stage: {dict(hits.most_common())}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
