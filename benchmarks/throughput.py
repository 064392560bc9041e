"""How fast is the fine-tune's loop compared with a plain PyTorch loop? On the GPU if there is one, else on the CPU.

    python benchmarks/throughput.py resnet56_cifar10 [--steps 10] [--rounds 7]

Both loops train the pipeline's dense network on the same batches in memory: SGD, channels last, in bf16 if the machine
supports it. The plain loop does forward, loss, backward and step. Ours also clips gradients and averages weights; with
the recipe's settings it also runs the teacher and mixes samples. Each loop also runs with `torch.compile`, whose
compile time is reported separately. All loops take turns. Prints a Markdown table of samples per second, and of times
relative to the plain loop.
"""

import argparse
import copy
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn

from deploypipe.numerics.intervals import interval_of_median_ratio
from deploypipe.recipe import Finetune
from deploypipe.records import Event, Progress
from deploypipe.task import Batch, Splits, Task, channels_last, forward, num_samples
from deploypipe.training.finetune import finetune
from deploypipe.training.training_precision import with_precision
from deploypipe.user_pipeline import load_pipeline

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WARM_UP = 3  # steps of every round that are not counted
PLAIN = "plain PyTorch"


@dataclass(slots=True)
class Stopwatch:
    """The seconds of the steps after the warm-up. It is called after each step."""

    num_steps: int
    started: float = field(default_factory=time.perf_counter)
    warm: float = 0.0
    seconds: float = 0.0  # of one step

    def step_is_over(self, number: int) -> None:
        if number not in (WARM_UP, WARM_UP + self.num_steps):
            return
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if number == WARM_UP:
            self.warm = now
        else:
            self.seconds = (now - self.warm) / self.num_steps


@dataclass(frozen=True, slots=True)
class Contest:
    model: nn.Module
    task: Task
    batches: list[Batch]
    val: list[Batch]
    settings: Finetune

    def plain(self, *, is_compiled: bool) -> Stopwatch:
        watch = Stopwatch(len(self.batches) - WARM_UP)
        model = copy.deepcopy(self.model).to(DEVICE, memory_format=torch.channels_last).train()
        has_bf16 = with_precision(self.settings).precision == "bf16"
        called = torch.compile(model) if is_compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4, nesterov=True)
        for number, (inputs, target) in enumerate(self.batches, start=1):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=has_bf16):
                outputs = forward(called, channels_last(inputs.to(DEVICE)))
            self.task.loss(outputs.float(), target.to(DEVICE)).backward()
            optimizer.step()
            watch.step_is_over(number)
        return watch

    def ours(self, **changed: object) -> Stopwatch:
        watch = Stopwatch(len(self.batches) - WARM_UP)
        splits = Splits(calib=[], train=self.batches, val=self.val, test=[])

        def report(event: Event) -> None:
            if isinstance(event, Progress):
                watch.step_is_over(event.done)

        settings = replace(self.settings, num_epochs=1, **changed)
        finetune(self.model, self.model, splits, self.task, settings, notify=report)
        return watch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    pipeline = load_pipeline(options.pipeline)
    splits = pipeline.load_data()
    contest = Contest(
        pipeline.build_model(),
        pipeline.task(),
        list(itertools.islice(splits.train, options.steps + WARM_UP)),
        list(itertools.islice(splits.val, 1)),
        pipeline.recipe().finetune,
    )
    bare = {"distil_weight": 0.0, "mix_share": 0.0}
    contenders: dict[str, Callable[[], Stopwatch]] = {
        PLAIN: lambda: contest.plain(is_compiled=False),
        "plain PyTorch, compiled": lambda: contest.plain(is_compiled=True),
        "ours, no teacher": lambda: contest.ours(**bare),
        "ours, no teacher, compiled": lambda: contest.ours(**bare, compile=True),
        "ours, as the recipe has it": lambda: contest.ours(),
        "ours, as the recipe has it, compiled": lambda: contest.ours(compile=True),
    }
    first = {name: run() for name, run in contenders.items()}
    rounds = [{name: run().seconds for name, run in contenders.items()} for _ in range(options.rounds)]
    show(
        {name: np.array([each[name] for each in rounds]) for name in contenders},
        {name: watch.warm - watch.started for name, watch in first.items()},
        num_samples(contest.batches[0][0]),
    )


def show(seconds: dict[str, np.ndarray], warm: dict[str, float], batch_size: int) -> None:
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"\n{DEVICE.type} ({name}), batches of {batch_size}\n")
    print("| | samples per second | time of a step, plain PyTorch = 1 | first steps, s |\n|---|---|---|---|")
    for contender, times in seconds.items():
        ratio = interval_of_median_ratio(times, seconds[PLAIN])
        shown = "1" if contender == PLAIN else f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
        print(f"| {contender} | {batch_size / np.median(times):.0f} | {shown} | {warm[contender]:.1f} |")


if __name__ == "__main__":
    main()
