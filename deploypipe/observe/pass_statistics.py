"""Statistics from a pass over the calibration samples: enough for every score, of a size independent of the data."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deploypipe.numerics.cka import cka


@dataclass(frozen=True, kw_only=True, slots=True)
class InputMoments:
    """Moments of a layer's input patches: mean (p,) and covariance (p, p), float64, p = channels * taps."""

    mean: Tensor
    covariance: Tensor
    num_rows: int

    def merged(self, other: "InputMoments") -> "InputMoments":
        """The moments of both sets of rows together."""
        total = self.num_rows + other.num_rows
        share, apart = other.num_rows / total, other.mean - self.mean
        spread = torch.outer(apart, apart).mul_(share * (1 - share))
        return InputMoments(
            mean=self.mean + share * apart,
            covariance=spread.add_(self.covariance, alpha=1 - share).add_(other.covariance, alpha=share),
            num_rows=total,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """The outcome of `observe`. Tensors by name; the names are those of `Structures`."""

    num_samples: int
    skipped: dict[str, str]  # consumer -> reason why it has no moments
    inputs: dict[str, InputMoments]  # by consumer
    units: dict[str, Tensor]  # by group: (n, units) float32, each unit's mean over positions at its reader's input
    labels: Tensor | None  # (n,) int64, the class of each row of `units`; None if samples have no single class
    block_hsic: Tensor  # (blocks, blocks) unbiased HSIC of the block outputs, up to a common factor
    block_inputs: dict[str, Tensor]  # by block: (n, channels) float32, at the same positions in all blocks of one size
    block_outputs: dict[str, Tensor]
    # Only on request: by consumer, (inputs * taps, outputs) float64, the covariance of its input for one sample with
    # its output for another. Whatever a score finds in it is chance.
    shuffled: dict[str, Tensor]
    # Only if a loss was given:
    gates: dict[str, Tensor]  # by group: (units,) mean over samples of the squared derivative by a gate on the unit
    output_fisher: dict[str, Tensor]  # by consumer: (outputs,) the same by an output, summed over positions

    @property
    def block_names(self) -> tuple[str, ...]:
        return tuple(self.block_outputs)

    @property
    def block_cka(self) -> Tensor:
        """(blocks, blocks) unbiased linear CKA of the block outputs."""
        return cka(self.block_hsic)


def merge(first: Moments, second: Moments) -> Moments:
    """Merge the moments of two passes over different samples into those of one pass."""
    share = second.num_samples / (first.num_samples + second.num_samples)
    labels = None
    if first.labels is not None and second.labels is not None:
        labels = torch.cat([first.labels, second.labels])
    return Moments(
        num_samples=first.num_samples + second.num_samples,
        skipped=first.skipped,
        inputs={name: seen.merged(second.inputs[name]) for name, seen in first.inputs.items()},
        units={name: torch.cat([rows, second.units[name]]) for name, rows in first.units.items()},
        labels=labels,
        block_hsic=first.block_hsic + second.block_hsic,
        block_inputs={n: torch.cat([rows, second.block_inputs[n]]) for n, rows in first.block_inputs.items()},
        block_outputs={n: torch.cat([rows, second.block_outputs[n]]) for n, rows in first.block_outputs.items()},
        shuffled={name: torch.lerp(cross, second.shuffled[name], share) for name, cross in first.shuffled.items()},
        gates={name: torch.lerp(value, second.gates[name], share) for name, value in first.gates.items()},
        output_fisher={n: torch.lerp(f, second.output_fisher[n], share) for n, f in first.output_fisher.items()},
    )


_BY_NAME = ("units", "block_inputs", "block_outputs", "shuffled", "gates", "output_fisher")


def save_moments(moments: Moments, path: Path) -> None:
    """`moments` as one safetensors file."""
    flat = {"block_hsic": moments.block_hsic, "num_samples": torch.tensor(moments.num_samples)}
    if moments.labels is not None:
        flat["labels"] = moments.labels
    for name, one in moments.inputs.items():
        parts = {"mean": one.mean, "covariance": one.covariance, "num_rows": torch.tensor(one.num_rows)}
        flat |= {f"{part}:{name}": value for part, value in parts.items()}
    for kind in _BY_NAME:
        flat |= {f"{kind}:{name}": value for name, value in getattr(moments, kind).items()}
    # The file sorts its keys, so the order of blocks and groups in the network is stored too.
    orders = {kind: "\n".join(getattr(moments, kind)) for kind in ("inputs", *_BY_NAME)}
    reasons = {f"skipped:{name}": reason for name, reason in moments.skipped.items()}
    texts = {f"text:{key}": text for key, text in {**orders, **reasons}.items()}
    flat |= {key: torch.tensor(list(text.encode()), dtype=torch.uint8) for key, text in texts.items()}
    save_file({key: value.contiguous() for key, value in flat.items()}, path)


def load_moments(path: Path) -> Moments:
    """The inverse of `save_moments`."""
    flat = load_file(path)
    texts = {k.removeprefix("text:"): bytes(v.tolist()).decode() for k, v in flat.items() if k.startswith("text:")}

    def names(kind: str) -> list[str]:
        return texts[kind].split("\n") if texts[kind] else []

    return Moments(
        num_samples=int(flat["num_samples"]),
        skipped={k.removeprefix("skipped:"): v for k, v in texts.items() if k.startswith("skipped:")},
        inputs={
            name: InputMoments(
                mean=flat[f"mean:{name}"],
                covariance=flat[f"covariance:{name}"],
                num_rows=int(flat[f"num_rows:{name}"]),
            )
            for name in names("inputs")
        },
        labels=flat.get("labels"),
        block_hsic=flat["block_hsic"],
        **{kind: {name: flat[f"{kind}:{name}"] for name in names(kind)} for kind in _BY_NAME},
    )
