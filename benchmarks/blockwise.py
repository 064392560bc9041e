"""Remove a quarter of the heads and hidden units of a random Llama with a billion parameters, block by block.

    python benchmarks/blockwise.py [--layers 22] [--out FOLDER]
    python benchmarks/blockwise.py --architectures
    python benchmarks/blockwise.py --trained

The first command prints the size of the weights, the peak memory of the pruning process, and the size of the result.
One process makes the weights, a second prunes, a third loads the pruned network. Peak memory is the operating system's
figure, which includes shared libraries and pages of the weights' file. The second command prunes the small random
networks of `zoo` that come from `transformers`, in each the longest list of blocks. It prints which of them are
refused, and why. The third compares two ways to prune the trained ViT (CIFAR10_DIR, VIT_WEIGHTS): block by block and as
a whole.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import zoo
from safetensors.torch import save_file
from torch import nn

from deploypipe.benchmark.accuracy import evaluate_module
from deploypipe.blockwise import prune_blockwise
from deploypipe.errors import DeploypipeError
from deploypipe.networks.streamed_weights import without_weights
from deploypipe.observe.calibration_pass import observe_activations
from deploypipe.pruning.repair.least_squares_repair import repair
from deploypipe.pruning.surgery.apply_plan import apply_plan
from deploypipe.pruning.surgery.plan import make_plan
from deploypipe.pruning.surgery.saved_network import load_saved, own_weights
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.recipe import Magnitude, Observe, OutputError, Recipe, Repair
from deploypipe.records import Event, Progress
from deploypipe.scoring import score
from deploypipe.task import take, take_calib
from pipelines import vit_cifar10

_KEPT, _SAMPLES, _TOKENS, _BATCH = 0.75, 32, 256, 4
_SCORES = {"output_error": OutputError(), "magnitude": Magnitude()}


def build_model(num_layers: int) -> nn.Module:
    """A network shaped like TinyLlama-1.1B, whose 22 layers have 1.1 billion parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32_000,
            hidden_size=2048,
            num_hidden_layers=num_layers,
            num_attention_heads=32,
            num_key_value_heads=4,
            intermediate_size=5632,
            use_cache=False,
        )
    )


def write_weights(num_layers: int, path: Path) -> None:
    with without_weights():
        model = build_model(num_layers)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.ones(value.shape) if value.dim() == 1 else 0.02 * torch.randn(value.shape, generator=generator)
        for name, value in model.state_dict().items()
    }
    save_file(tensors, path)


def prune(num_layers: int, weights: Path, folder: Path, score: str) -> None:
    generator = torch.Generator().manual_seed(1)
    batches = [
        ({"input_ids": torch.randint(0, 32_000, (_BATCH, _TOKENS), generator=generator)}, torch.zeros(_BATCH))
        for _ in range(_SAMPLES // _BATCH)
    ]
    recipe = Recipe(
        score=_SCORES[score],
        observe=Observe(num_samples=_SAMPLES, positions_per_sample=_TOKENS),
        repair=Repair(num_samples=_SAMPLES, positions_per_sample=_TOKENS),
    )

    def report(event: Event) -> None:
        if isinstance(event, Progress):
            print(f"{_peak_mib():6,.0f} MiB  {event.done} of {event.total}: {event.message}", flush=True)

    began = time.perf_counter()
    done = prune_blockwise(lambda: build_model(num_layers), weights, batches, folder, recipe, kept=_KEPT, notify=report)
    size = weights.stat().st_size / 2**20
    groups = [cut for block in done.blocks for cut in block.cuts]
    removed, units = sum(len(cut.removed) for cut in groups), sum(cut.num_units for cut in groups)
    solved = [row for block in done.blocks for row in block.repair if row.error_after is not None and not row.reason]
    print(f"weights {size:,.0f} MiB, {done.params_before:,} parameters; after {done.params_after:,}")
    print(f"{len(groups)} groups, {removed:,} of {units:,} units removed by {score}; {len(solved)} layers repaired")
    taken = f"{time.perf_counter() - began:.0f} s"
    print(f"peak memory {_peak_mib():,.0f} MiB, {_peak_mib() / size:.2f}x the weights; {taken}")


def load(num_layers: int, folder: Path) -> None:
    network = load_saved(folder, lambda: build_model(num_layers))
    with torch.no_grad():
        logits = network(input_ids=torch.arange(16)[None]).logits
    print(
        f"loaded: {sum(p.numel() for p in network.parameters()):,} parameters, logits {tuple(logits.shape)}, "
        f"finite {bool(logits.isfinite().all())}, peak memory {_peak_mib():,.0f} MiB"
    )


def prune_architectures() -> None:
    recipe = Recipe(score=OutputError(), observe=Observe(positions_per_sample=8), repair=Repair(positions_per_sample=8))
    networks = [network for network in zoo.NETWORKS.values() if network.source == "transformers"]
    num_pruned = 0
    for network in networks:
        dense, inputs = network.build()
        with TemporaryDirectory() as folder:
            weights = Path(folder) / "dense.safetensors"
            save_file(own_weights(dense), weights)
            batches = [(_samples(inputs, seed), torch.zeros(8, dtype=torch.long)) for seed in range(4)]
            try:
                done = prune_blockwise(
                    lambda network=network: network.build()[0], weights, batches, Path(folder) / "out", recipe, kept=0.6
                )
            except DeploypipeError as error:
                print(f"{network.name}: refused: {error}", flush=True)
                continue
        num_pruned += 1
        print(f"{network.name}: {len(done.blocks)} blocks, {done.params_before:,} -> {done.params_after:,}", flush=True)
    print(f"{num_pruned} of {len(networks)} pruned; of each, what the blocks give together is what they gave alone")


def compare_with_whole(kept: float) -> dict[str, float]:
    """Accuracy on 4,000 test images of the trained ViT with the share `kept` of its heads and hidden units."""
    dense, splits = vit_cifar10.build_model(), vit_cifar10.load_data()
    calib, test = take_calib(splits.calib, 1024), take_calib(splits.test, 4000)
    recipe = Recipe(
        score=OutputError(),
        observe=Observe(positions_per_sample=8),
        repair=Repair(num_samples=512, positions_per_sample=16),
    )
    with TemporaryDirectory() as folder:
        weights, out = Path(folder) / "dense.safetensors", Path(folder) / "pruned"
        save_file(own_weights(dense), weights)
        result = prune_blockwise(vit_cifar10.build_model, weights, calib, out, recipe, kept=kept)
        blockwise = load_saved(out, vit_cifar10.build_model)
        structures = list_structures(dense, take(calib[0][0], 2))
        scores = score(dense, structures, observe_activations(dense, structures, calib, recipe.observe), recipe.score)
        plan = make_plan(structures, scores, {c.group: c.num_units - len(c.removed) for c in result.plan.cuts})
        whole, _ = repair(dense, apply_plan(dense, plan), plan, calib, recipe.repair)
        networks = {
            "dense": dense,
            "not repaired": apply_plan(dense, result.plan),
            "as a whole": whole,
            "block by block": blockwise,
        }
        task = vit_cifar10.task()
        return {name: float(evaluate_module(network, test, task).mean()) for name, network in networks.items()}


def _samples(inputs: zoo.Inputs, seed: int) -> zoo.Inputs:
    """Make eight samples like the two given ones."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, value in inputs.items():
        shape = (8, *value.shape[1:])
        if value.is_floating_point():
            drawn[name] = torch.randn(shape, generator=generator)
        elif name.endswith("mask") or name.endswith("type_ids"):
            drawn[name] = value.repeat(4, *[1] * (value.dim() - 1))
        else:
            drawn[name] = torch.randint(3, int(value.max()) + 1, shape, generator=generator)
    return drawn


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--score", choices=sorted(_SCORES), default="output_error")
    parser.add_argument("--out", type=Path, help="folder to keep the results in; a later call resumes there")
    parser.add_argument("--architectures", action="store_true")
    parser.add_argument("--trained", action="store_true")
    parser.add_argument("--step", choices=["weights", "prune", "load"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.architectures:
        return prune_architectures()
    if options.trained:
        for kept in (0.75, 0.5):
            each = ", ".join(f"{name} {100 * share:.2f} %" for name, share in compare_with_whole(kept).items())
            print(f"{kept:.0%} kept: {each}", flush=True)
        return None
    with TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        weights, folder = out / "dense.safetensors", out / "pruned"
        if options.step == "weights" and not weights.is_file():
            write_weights(options.layers, weights)
        elif options.step == "prune":
            prune(options.layers, weights, folder, options.score)
        elif options.step == "load":
            load(options.layers, folder)
        elif options.step is None:
            for step in ("weights", "prune", "load"):
                own = ["--layers", str(options.layers), "--score", options.score, "--out", str(out), "--step", step]
                subprocess.run([sys.executable, __file__, *own], check=True)


if __name__ == "__main__":
    main()
