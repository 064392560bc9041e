"""Which networks can be pruned? Judge every network of `zoo.py`, with deploypipe and with plain Torch-Pruning.

    pip install -e '.[zoo]' && pip install --no-deps pytorchcv
    python benchmarks/architectures.py --out runs/architectures.jsonl [--markdown table.md] [--only NAME ...] [--jobs 2]

(pytorchcv requires torchvision, but none of the networks here needs it.) Each network is judged in a child process, on
one thread, for at most 120 s:

  * it is traced, and half of the units of every group are removed at random;
  * its outputs are compared with those of the dense network in which the same units are masked;
  * its parameters and MACs are compared with the plan's;
  * it is trained for a step, made again from the plan, saved and loaded, and exported;
  * all of it is repeated with every second layer (block) removed as well.

If the dense network cannot be trained or exported either, the cell says so. Weights are the package's own
initialisation plus noise, so that no zero or one hides an error. Torch-Pruning has 120 s in a child process, too:
BasePruner, magnitudes, ratio 0.5, the last layer ignored.

A killed run resumes: networks in the --out file are not judged again.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from copy import deepcopy
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves
from zoo import NETWORKS, Inputs, Network

from deploypipe.export.onnx_export.export_onnx import export_onnx
from deploypipe.files.json_records import from_json, to_json
from deploypipe.networks.fingerprints import model_fingerprint
from deploypipe.pruning.modules.count_macs import count_operations
from deploypipe.pruning.surgery.apply_plan import apply_plan, masked_dense
from deploypipe.pruning.surgery.module_slicing import sizes_after
from deploypipe.pruning.surgery.plan import empty_plan, make_plan
from deploypipe.pruning.surgery.saved_network import load_saved, save_pruned
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.recipe import Export, Finetune
from deploypipe.records import Frozen, PruningPlan, ScoreTable, Structures
from deploypipe.task import Splits, Task, evaluating, forward, num_samples
from deploypipe.training.finetune import finetune

Facts: TypeAlias = dict[str, Any]  # facts about one network: a verdict for each of CHECKS, and figures

LIMIT_S = 120
TOLERANCE = 1e-3  # of the largest output
YES, NO, DENSE_TOO = "yes", "no", "dense fails too"
NOT_ASKED, NONE = "n/a", "-"
CHECKS = {  # in the order they are made
    "built": "built",
    "traced": "traced",
    "equal": "equals masked dense",
    "sizes": "sizes as predicted",
    "trains": "trains a step",
    "replay": "replay identical",
    "intact": "dense intact",
    "exported": "exported (torch.export)",
    "reload": "reload identical",
    "parity": "ONNX file, parity",
    "depth": "without half of its layers: equal, trains, ONNX",
}
INSTALL = "pip install -e '.[zoo]' && pip install --no-deps pytorchcv"
PACKAGES = {"transformers": "transformers", "pytorchcv": "pytorchcv", "monai": "monai", "einops": "monai"}  # and whose


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, help="file for the results: one line of JSON for every network")
    parser.add_argument("--markdown", type=Path, help="file for the table; without it, the table is printed")
    parser.add_argument("--judge", choices=NETWORKS, help=argparse.SUPPRESS)
    parser.add_argument("--raw", choices=NETWORKS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if name := options.judge or options.raw:
        torch.set_num_threads(1)
        return tell((judge if options.judge else judge_raw)(NETWORKS[name]))
    require_packages({NETWORKS[name].source for name in options.only})
    known = read(options.out) if options.out and options.out.exists() else {}
    todo = [name for name in options.only if name not in known]
    with ThreadPoolExecutor(options.jobs) as pool:
        for name, facts in zip(todo, pool.map(in_children, todo), strict=True):
            known[name] = facts
            print(f"{name}: {'; '.join(complaints(facts)) or 'green'} ({facts['seconds']} s)", flush=True)
            if options.out:
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(facts) + "\n")
    table = show([known[name] for name in options.only])
    if options.markdown:
        options.markdown.write_text(table, encoding="utf-8")
    else:
        print(f"\n{table}")
    return None


def require_packages(sources: set[str]) -> None:
    absent = [name for name, source in PACKAGES.items() if source in sources and find_spec(name) is None]
    if absent:
        sys.exit(f"{', '.join(absent)}: not installed; {INSTALL}, or choose other networks with --only")


def read(path: Path) -> dict[str, Facts]:
    return {facts["name"]: facts for facts in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


# --- in the child -----------------------------------------------------------------------------------------------------


def tell(facts: Iterator[tuple[str, Any]]) -> None:
    """Print each fact as soon as it is known, so that a child that is stopped has reported what it knew."""
    answers = sys.stdout
    with redirect_stdout(sys.stderr):  # whatever the packages print
        try:
            for key, value in facts:
                print(json.dumps([key, value]), file=answers, flush=True)
        except Exception as error:
            print(json.dumps(["error", _explain(error)]), file=answers, flush=True)


def built(network: Network) -> tuple[nn.Module, Inputs]:
    """The network in evaluation mode, the same every time; weights shaken, running statistics near real ones."""
    random.seed(0)
    np.random.seed(0)  # some of the packages draw from it
    torch.manual_seed(0)
    model, inputs = network.build()
    with torch.no_grad():
        for parameter in model.parameters():
            size = parameter.abs().mean().item() or 1.0
            parameter.add_(torch.randn_like(parameter), alpha=0.1 * size)
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.momentum is not None]
        momenta = [norm.momentum for norm in norms]
        if norms:
            for norm in norms:
                norm.momentum = 0.9  # not 1: a channel that happens to be constant would be divided by nothing
            forward(model.train(), inputs)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return model.eval(), inputs


def judge(network: Network, with_onnx: bool = True) -> Iterator[tuple[str, Any]]:
    """All facts about one network, cheap ones first. An exception ends them: the checks that follow are not made."""
    dense, inputs = built(network)
    before = model_fingerprint(dense)
    yield "built", YES
    started = time.perf_counter()
    structures = list_structures(dense, inputs)
    yield "trace_seconds", round(time.perf_counter() - started, 2)
    yield "traced", YES
    yield "groups", len(structures.groups)
    yield "blocks", len(structures.blocks)
    yield "frozen", [[row.kind, row.name, row.reason] for row in structures.frozen]
    yield "quarantined", [[row.name, row.reason] for row in quarantined(structures.frozen)]
    plan = from_json(PruningPlan, to_json(halved(structures)), "the plan")
    pruned = apply_plan(dense, plan)
    yield "params_before", structures.num_params
    yield "params_after", sum(p.numel() for p in pruned.parameters())
    yield "heads", [[g.num_units, max(1, g.num_units // 2)] for g in structures.groups if g.kind == "heads"]
    yield from compare(dense, masked_dense(dense, plan), pruned, inputs)
    yield "sizes", sizes(dense, pruned, plan, inputs)
    yield "trains", attempt(lambda: train_step(pruned, dense, inputs), lambda: train_step(dense, dense, inputs))
    again = apply_plan(built(network)[0], plan)
    yield "replay", YES if are_identical(again, pruned, inputs) else f"{NO}: other weights or outputs"
    yield "intact", YES if model_fingerprint(dense) == before else f"{NO}: pruning changed the dense network"
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        exported = attempt(
            lambda: require_program(pruned, plan, inputs, folder / "pruned"),
            lambda: require_program(dense, empty_plan(structures), inputs, folder / "dense"),
        )
        yield "exported", exported
        if exported == YES:
            loaded = load_saved(folder / "pruned", lambda: network.build()[0])
            yield "reload", YES if are_identical(loaded, pruned, inputs) else f"{NO}: other weights or outputs"
        else:
            yield "reload", exported
        if with_onnx:
            yield (
                "parity",
                attempt(
                    lambda: export_onnx(pruned, [(inputs, None)], folder / "pruned.onnx", Export()),
                    lambda: export_onnx(dense, [(inputs, None)], folder / "dense.onnx", Export()),
                ),
            )
            if len(structures.blocks) > 1:
                shallow = halved(structures, without=[block.name for block in structures.blocks[::2]])
                yield "layers_left", len(structures.blocks) - len(shallow.blocks)
                yield (
                    "depth",
                    attempt(
                        lambda: shorten(dense, shallow, inputs, folder),
                        lambda: shorten(dense, empty_plan(structures), inputs, folder),
                    ),
                )


def shorten(dense: nn.Module, plan: PruningPlan, inputs: Inputs, folder: Path) -> None:
    """Remove layers, and make the checks of a pruned network: ValueError or what the network raises."""
    pruned = apply_plan(dense, plan)
    error = difference(outputs(masked_dense(dense, plan), inputs), outputs(pruned, inputs))
    if error > TOLERANCE:
        raise ValueError(f"differs by {error:.1g} of the largest output")
    train_step(pruned, dense, inputs)
    export_onnx(pruned, [(inputs, None)], folder / "shallow.onnx", Export())


def sizes(dense: nn.Module, pruned: nn.Module, plan: PruningPlan, inputs: Inputs) -> str:
    """Whether parameters and MACs are those that follow from the plan's edits."""
    promised_params, shares = sizes_after(dense, plan.edits)
    of_weights = count_operations(dense, inputs).by_parameter
    promised_macs = sum(macs * shares.get(name, 1.0) for name, macs in of_weights.items())
    params, macs = (
        sum(p.numel() for p in pruned.parameters()),
        sum(count_operations(pruned, inputs).by_parameter.values()),
    )
    if params != promised_params or abs(macs - promised_macs) > 1e-6 * macs:
        return f"{NO}: {params} parameters, {macs} MACs; promised {promised_params}, {promised_macs:.0f}"
    return YES


def compare(dense: nn.Module, masked: nn.Module, pruned: nn.Module, inputs: Inputs) -> Iterator[tuple[str, Any]]:
    """Whether the pruned network computes the same as the masked one, and not the same as the dense one."""
    seen = outputs(pruned, inputs)
    mismatch, effect = difference(outputs(masked, inputs), seen), difference(outputs(dense, inputs), seen)
    yield "mismatch", mismatch
    yield "effect", effect
    if mismatch > TOLERANCE:
        yield "equal", f"{NO}: differs by {mismatch:.1g} of the largest output"
    elif effect <= 10 * TOLERANCE:
        yield "equal", f"{NO}: cannot be decided, what is removed counts for {effect:.1g} of the largest output"
    else:
        yield "equal", YES


def attempt(work: Callable[[], Any], on_dense: Callable[[], Any]) -> str:
    """Whether `work` succeeds. If it fails, `on_dense` shows whether pruning is the cause."""
    try:
        work()
    except Exception as error:
        try:
            on_dense()
        except Exception:
            return f"{DENSE_TOO}: {_explain(error)}"
        return f"{NO}: {_explain(error)}"
    return YES


def halved(structures: Structures, without: Sequence[str] = ()) -> PruningPlan:
    """A plan that keeps a random half of each group's units, at least one. without: blocks to remove."""
    draw = random.Random(0)
    scores = {group.name: tuple(draw.random() for _ in range(group.num_units)) for group in structures.groups}
    widths = {group.name: max(1, group.num_units // 2) for group in structures.groups}
    return make_plan(structures, ScoreTable(scorer="random", channels=scores), widths, without)


def quarantined(frozen: tuple[Frozen, ...]) -> list[Frozen]:
    """Layers that cannot lose channels although they have several that are read, away from the network's edge."""
    rows = [row for row in frozen if row.kind != "block"]
    edge = {
        row.name
        for row in rows
        if re.search("network's (in|out)put|looked up by an index|a single |nothing reads", row.reason)
    }
    shared = {row.name for row in rows if any(f"shares its channels with {name!r}" in row.reason for name in edge)}
    return [row for row in rows if row.name not in edge | shared]


def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    with evaluating(model), torch.no_grad():
        return [leaf for leaf in tree_leaves(forward(model, deepcopy(inputs))) if isinstance(leaf, Tensor)]


def difference(expected: list[Tensor], seen: list[Tensor]) -> float:
    """The largest error, relative to the largest magnitude of its output; infinite for other shapes, or for NaN."""
    if [t.shape for t in expected] != [t.shape for t in seen]:
        return float("inf")
    errors = [
        (a.double() - b.double()).abs().max().item() / max(a.double().abs().max().item(), 1e-30)
        for a, b in zip(expected, seen, strict=True)
    ]
    return max(error if error == error else float("inf") for error in errors)


def train_step(model: nn.Module, dense: nn.Module, inputs: Inputs) -> None:
    """One step of the product's own fine-tune, towards outputs of zero and those of the dense network."""

    def loss(outputs: Any, _: Tensor) -> Tensor:
        leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        return torch.stack([leaf.float().square().mean() for leaf in leaves]).mean()

    batch = (inputs, torch.zeros(num_samples(inputs)))
    task = Task(loss=loss, metric=lambda outputs, target: torch.ones(len(target)))
    splits = Splits(calib=[batch], train=[batch], val=[batch], test=[batch])
    finetune(model, dense, splits, task, Finetune(num_epochs=1, precision="fp32"))


def are_identical(a: nn.Module, b: nn.Module, inputs: Inputs) -> bool:
    """Whether weights and outputs are equal bit for bit."""
    ours, theirs = a.state_dict(), b.state_dict()
    return (
        list(ours) == list(theirs)
        and all(torch.equal(value, theirs[name]) for name, value in ours.items())
        and all(map(torch.equal, outputs(a, inputs), outputs(b, inputs)))
    )


def require_program(model: nn.Module, plan: PruningPlan, inputs: Inputs, folder: Path) -> None:
    """Save the network, load the exported program, and compare the two."""
    save_pruned(model, plan, inputs, folder)
    program = load_saved(folder, trust_program=True)
    with torch.no_grad():
        seen = [leaf for leaf in tree_leaves(forward(program, inputs)) if isinstance(leaf, Tensor)]
    error = difference(outputs(model, inputs), seen)
    if error > TOLERANCE:
        raise ValueError(f"the exported program differs by {error:.1g} of the largest output")


def judge_raw(network: Network) -> Iterator[tuple[str, Any]]:
    """The result of Torch-Pruning, which is given the network and the name of its last layer only."""
    import torch_pruning

    model, inputs = built(network)
    yield "params_before", sum(p.numel() for p in model.parameters())
    shapes = [tuple(t.shape) for t in outputs(model, inputs)]
    pruner = torch_pruning.pruner.BasePruner(
        model,
        inputs,
        torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[last_layer(model, inputs)],
        forward_fn=forward,
        output_transform=lambda o: [t for t in tree_leaves(o) if isinstance(t, Tensor) and t.requires_grad],
        pruning_ratio_dict={},  # its defaults are shared by all pruners of a process
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
        channel_groups={},
    )
    pruner.step()
    seen = [tuple(t.shape) for t in outputs(model, inputs)]
    yield "params_after", sum(p.numel() for p in model.parameters())
    yield "runs", YES if seen == shapes else f"{NO}: the outputs have other shapes"


def last_layer(model: nn.Module, inputs: Inputs) -> nn.Module:
    """The convolution or linear layer that is called last."""
    called: list[nn.Module] = []
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | _ConvNd)]
    handles = [layer.register_forward_hook(lambda module, *_: called.append(module)) for layer in layers]
    outputs(model, inputs)
    for handle in handles:
        handle.remove()
    return called[-1]


def _explain(error: Exception) -> str:
    """The innermost cause of the error on one line."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return f"{type(cause).__name__}: {' '.join(str(cause).split())}"[:300]


# --- in the parent ----------------------------------------------------------------------------------------------------


def in_children(name: str) -> Facts:
    started = time.perf_counter()
    facts = ask("--judge", name)
    seconds = time.perf_counter() - started
    raw = ask("--raw", name)
    versions = {p: version(p) for p in ("torch", NETWORKS[name].source, "torch-pruning", "onnxruntime")}
    return {
        "name": name,
        "source": NETWORKS[name].source,
        "date": date.today().isoformat(),
        "versions": versions,
        **facts,
        "seconds": round(seconds, 1),
        "raw": raw,
    }


def ask(*arguments: str) -> Facts:
    """The facts that the child reported within the limit; "error" says why some are missing."""
    command = [sys.executable, __file__, *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=LIMIT_S, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        printed, ending = done.stdout, "" if not done.returncode else f"the process ended with code {done.returncode}"
    except subprocess.TimeoutExpired as late:
        printed, ending = late.stdout or b"", f"not finished after {LIMIT_S} s"
    whole_lines = printed.rpartition(b"\n")[0].splitlines()
    facts: Facts = dict(json.loads(line) for line in whole_lines)
    return {"error": ending, **facts} if ending else facts


def verdict(facts: Facts, check: str) -> str:
    if check == "depth" and facts.get("blocks", 2) < 2:
        return NONE
    return facts.get(check) or f"{NO}: {facts.get('error', 'not tried')}"


def complaints(facts: Facts) -> list[str]:
    """Why a network is not green: failed checks and layers that cannot be pruned, each reason once."""
    failed, stays = defaultdict(list), defaultdict(list)
    for check, title in CHECKS.items():
        if (text := verdict(facts, check)).startswith(NO):
            failed[text.removeprefix(f"{NO}: ")].append(title)
    for name, reason in facts.get("quarantined", ()):
        if "shares its channels with" not in reason:  # the row that it refers to says why
            stays[re.sub(r"'[^']*'|[0-9][0-9.e+-]*", "…", reason)].append(f"{name} stays: {reason}")
    rows = [f"{', '.join(titles)}: {reason}" for reason, titles in failed.items()]
    return rows + [f"{same[0]} (and {len(same) - 1} like it)" if same[1:] else same[0] for same in stays.values()]


def is_green(facts: Facts) -> bool:
    """Every check passes and every channel that is not the network's own input or output can go."""
    return not facts.get("quarantined") and not any(verdict(facts, check).startswith(NO) for check in CHECKS)


def show(rows: list[Facts]) -> str:
    versions = {package: number for facts in rows for package, number in facts["versions"].items()}
    dates = sorted({facts["date"] for facts in rows})
    greens = sum(map(is_green, rows))
    raw = sum(facts["raw"].get("runs") == YES for facts in rows)
    heads = [
        "network",
        "from",
        "groups",
        "heads",
        "layers",
        "params",
        "left",
        "quarantined",
        *CHECKS.values(),
        "s",
        "raw TP left",
    ]
    lines = [
        f"{dates[0]} to {dates[-1]}; {', '.join(f'{p} {v}' for p, v in sorted(versions.items()))}",
        "",
        f"{greens} of {len(rows)} fully green; raw Torch-Pruning's result runs for {raw}. "
        f'"{NOT_ASKED}": the dense network fails too.',
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
    ]
    lines += [f"| {' | '.join(cells(facts))} |" for facts in rows]
    lines += ["", "Not fully green:", ""]
    for facts in rows:
        if reasons := complaints(facts):
            lines.append(f"* {facts['name']}: {'; '.join(reasons)}")
    lines += ["", "Where the dense network fails too:", ""]
    for facts in rows:
        for check, title in CHECKS.items():
            if check != "reload" and verdict(facts, check).startswith(DENSE_TOO):  # reload only repeats exported
                lines.append(f"* {facts['name']}, {title}: {verdict(facts, check).removeprefix(f'{DENSE_TOO}: ')}")
    return "\n".join(lines) + "\n"


def cells(facts: Facts) -> list[str]:
    def mark(check: str) -> str:
        return {YES: YES, NONE: NONE, DENSE_TOO: NOT_ASKED}.get(verdict(facts, check).partition(":")[0], NO)

    raw = facts["raw"]
    before = facts.get("params_before")
    if raw.get("runs") == YES:
        of_rival = f"{raw['params_after'] / raw['params_before']:.0%}"
    else:
        of_rival = (raw.get("error") or raw["runs"].removeprefix(f"{NO}: "))[:60].replace("|", "/")
    return [
        facts["name"],
        facts["source"],
        str(facts.get("groups", "")),
        " ".join(
            f"{n}x({before} to {after})" for (before, after), n in Counter(map(tuple, facts.get("heads", ()))).items()
        ),
        f"{facts['blocks']} to {facts['layers_left']}" if "layers_left" in facts else str(facts.get("blocks", "")),
        f"{before:,}" if before else "",
        f"{facts['params_after'] / before:.0%}" if "params_after" in facts else "",
        str(len(facts.get("quarantined", ()))),
        *map(mark, CHECKS),
        f"{facts['seconds']:.0f}",
        of_rival,
    ]


if __name__ == "__main__":
    main()
