"""Blocks of any calling convention: other outputs than the hidden state, and caches that use layer numbers."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from zoo import NETWORKS

from deploypipe.files.json_records import from_json, to_json
from deploypipe.pruning.surgery.apply_plan import apply_plan
from deploypipe.pruning.surgery.plan import make_plan
from deploypipe.pruning.surgery.saved_network import load_saved, save_pruned
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.records import PruningPlan, ScoreTable, Structures
from deploypipe.task import forward

NO_SCORES = ScoreTable(scorer="none", channels={})


class Layer(nn.Module):
    """Returns (hidden, its bias argument, attention weights), as T5's layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor, bias: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        inner = self.linear(x) + bias
        return x + inner, bias, inner.mean()


class Layers(nn.Module):
    """Passes on what its layers return; the last two are read if `reads_all`."""

    def __init__(self, reads_all: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(6, 2)
        self.reads_all = reads_all

    def forward(self, x: Tensor) -> Tensor:
        bias = x.new_ones(6)
        for number, layer in enumerate(self.layers):
            x, bias, strength = layer(x, bias) if number % 2 else layer(x, bias=bias)
            if self.reads_all and number == 1:
                x = x * strength
        return self.head(x)


def removed(structures: Structures, *names: str) -> PruningPlan:
    return from_json(PruningPlan, to_json(make_plan(structures, NO_SCORES, {}, names)), "the plan")


def test_a_removed_block_that_returned_a_tuple_returns_its_arguments_and_is_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = Layers().eval(), torch.randn(4, 6)
    structures = list_structures(model, inputs)
    assert [(b.name, b.returns) for b in structures.blocks] == [(f"layers.{i}", ("bias", "")) for i in range(3)]
    plan = removed(structures, "layers.0", "layers.1")
    pruned = apply_plan(model, plan)
    torch.testing.assert_close(pruned(inputs), model.head(model.layers[2](inputs, inputs.new_ones(6))[0]))
    save_pruned(pruned, plan, inputs, tmp_path)
    for loaded in (load_saved(tmp_path, trust_program=True), load_saved(tmp_path, Layers)):
        torch.testing.assert_close(loaded(inputs), pruned(inputs))


def test_a_block_whose_other_outputs_are_read_is_frozen_with_a_reason() -> None:
    torch.manual_seed(0)
    structures = list_structures(Layers(reads_all=True), torch.randn(4, 6))
    assert [b.name for b in structures.blocks] == ["layers.0", "layers.2"]
    reason = next(row.reason for row in structures.frozen if row.name == "layers.1")
    assert reason.startswith("the network fails without this block: TypeError")


SWIN = "swin.encoder.layers.0.blocks.1"


@pytest.mark.parametrize(
    ("name", "block", "returns"),
    [
        ("T5ForConditionalGeneration", "decoder.block.1.layer.0", ("position_bias", "")),
        pytest.param("SwinForImageClassification", SWIN, ("",), marks=pytest.mark.slow),
        ("DebertaForSequenceClassification", "deberta.encoder.layer.1", ("",)),
    ],
)
def test_transformers_layers_that_return_tuples_can_be_removed(name: str, block: str, returns: tuple[str, ...]) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, inputs = NETWORKS[name].build()
    structures = list_structures(model.eval(), inputs)
    assert next(b.returns for b in structures.blocks if b.name == block) == returns
    with torch.no_grad():
        forward(apply_plan(model, removed(structures, block)), inputs)


FIRST, SECOND, BOTH = slice(1), slice(1, 2), slice(2)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("GPT2LMHeadModel", SECOND),
        ("GPT2LMHeadModel", BOTH),
        ("LlamaForCausalLM", FIRST),
        ("LlamaForCausalLM", BOTH),
        ("T5ForConditionalGeneration", FIRST),
    ],
)
def test_a_decoder_with_removed_layers_generates_the_same_with_and_without_cache(name: str, place: slice) -> None:
    """Position and mask of the next token come from the first layer's cache, so another layer takes its place."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, inputs = NETWORKS[name].build()
    structures = list_structures(model.eval(), inputs)
    last = "layer.0" if name.startswith("T5") else ""  # its self-attention
    names = [b.name for b in structures.blocks if not b.name.startswith("encoder") and b.name.endswith(last)]
    pruned = apply_plan(model, removed(structures, *names[place]))
    key = "decoder_input_ids" if name.startswith("T5") else "input_ids"
    tokens, others = inputs[key], {k: v for k, v in inputs.items() if k != key}
    with torch.no_grad():
        expected = pruned(**others, **{key: tokens}, use_cache=False).logits
        begun = pruned(**others, **{key: tokens[:, :5]}, use_cache=True)
        step = {key: tokens[:, 5:], "past_key_values": begun.past_key_values}
        seen = pruned(**others, **step, use_cache=True).logits
    torch.testing.assert_close(seen, expected[:, 5:], atol=1e-5, rtol=1e-4)
