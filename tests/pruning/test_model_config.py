"""The config of a pruned network describes it, proven with the stock class, or stays that of the dense network."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import NETWORKS

from deploypipe.pruning.surgery.apply_plan import apply_plan, describe, masked_dense
from deploypipe.pruning.surgery.plan import make_plan
from deploypipe.pruning.tracing.structures import list_structures
from deploypipe.records import ChannelGroup, PruningPlan, ScoreTable, Structures
from deploypipe.task import forward

transformers = pytest.importorskip("transformers")


def halved(structures: Structures, *endings: str, share: float = 0.5) -> PruningPlan:
    """Every group with one of these endings (all groups without any) keeps its last half."""

    def width(group: ChannelGroup) -> int:
        is_meant = group.name.endswith(endings) if endings else True
        return round(group.num_units * share) if is_meant else group.num_units

    scores = {g.name: tuple(float(i) for i in range(g.num_units)) for g in structures.groups}
    widths = {g.name: width(g) for g in structures.groups}
    return make_plan(structures, ScoreTable(scorer="index", channels=scores), widths)


def outputs(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        return forward(model.eval(), inputs).logits


@cache
def built(name: str) -> tuple[Any, Any, Structures]:
    torch.manual_seed(0)
    model, inputs = NETWORKS[name].build()
    return model.eval(), inputs, list_structures(model, inputs)


FFN = (".intermediate.dense", ".fc1", ".gate_proj", ".c_fc", ".wi")
LLAMA = {"intermediate_size": 72, "num_attention_heads": 3, "num_key_value_heads": 1}


@pytest.mark.parametrize(
    ("name", "endings", "share", "expected"),
    [
        ("BertForMaskedLM", FFN, 0.5, {"intermediate_size": 72}),
        pytest.param("ViTForImageClassification", FFN, 0.5, {"intermediate_size": 72}, marks=pytest.mark.slow),
        ("GPT2LMHeadModel", FFN, 0.5, {"n_inner": 72}),
        pytest.param("T5ForConditionalGeneration", FFN, 0.5, {"d_ff": 72}, marks=pytest.mark.slow),
        ("LlamaForCausalLM", (*FFN, ":heads"), 0.5, LLAMA),
        pytest.param("LlamaForCausalLM", ("embed_tokens",), 0.5, {"hidden_size": 48}, marks=pytest.mark.slow),
        ("ConvNextForImageClassification", (), 0.5, {"hidden_sizes": [8, 12, 20, 32]}),
    ],
)
def test_the_stock_class_loads_the_pruned_weights(
    name: str, endings: tuple[str, ...], share: float, expected: dict[str, Any]
) -> None:
    model, inputs, structures = built(name)
    before = model.config.to_dict()
    plan = halved(structures, *endings, share=share)
    pruned = apply_plan(model, plan)
    assert model.config.to_dict() == before
    after = pruned.config.to_dict()
    assert {key: value for key, value in after.items() if value != before[key]} == expected
    stock = type(model)(type(model.config).from_dict(after))
    stock.load_state_dict(pruned.state_dict())
    seen = outputs(pruned, inputs)
    torch.testing.assert_close(outputs(stock, inputs), seen, atol=1e-6, rtol=1e-5)  # sdpa for eager attention
    torch.testing.assert_close(seen, outputs(masked_dense(model, plan), inputs), atol=1e-5, rtol=1e-4)
    assert [vars(m)["config"].to_dict() for m in pruned.modules() if "config" in vars(m)] == [
        vars(m)["config"].to_dict() for m in stock.modules() if "config" in vars(m)
    ]
    (note,) = describe(model, pruned, plan, inputs).notes
    assert note.startswith("config describes the pruned network: ")


def test_bert_with_every_size_halved() -> None:
    """The number of heads is in no tensor's shape; it follows from attributes that forward() reads."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 144, "num_hidden_layers": 2}
    config = transformers.BertConfig(**sizes, vocab_size=101, max_position_embeddings=31)
    model, inputs = transformers.BertForSequenceClassification(config), {"input_ids": torch.randint(3, 101, (2, 13))}
    pruned = apply_plan(model, halved(list_structures(model.eval(), inputs)))
    assert {key: getattr(pruned.config, key) for key in sizes} == {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
    }
    stock = type(model)(pruned.config)
    stock.load_state_dict(pruned.state_dict())
    assert torch.equal(outputs(stock, inputs), outputs(pruned, inputs))


def test_removed_last_layers_change_the_number_of_layers() -> None:
    model, inputs, structures = built("GPT2LMHeadModel")
    scores = ScoreTable(scorer="none", channels={})
    pruned = apply_plan(model, make_plan(structures, scores, {}, ["transformer.h.2"]))
    assert (model.config.n_layer, pruned.config.n_layer) == (3, 2)
    stock = type(model)(pruned.config)
    stock.load_state_dict(pruned.state_dict())
    assert torch.equal(outputs(stock, inputs), outputs(pruned, inputs))
    other = apply_plan(model, make_plan(structures, scores, {}, ["transformer.h.1"]))
    assert other.config.to_dict() == model.config.to_dict()


@pytest.mark.parametrize(
    ("name", "endings", "reason"),
    [
        ("BertForMaskedLM", ("layer.1.intermediate.dense",), "intermediate_size would be 144 for"),
        ("BertForMaskedLM", (":heads",), "hidden_size would be 80 for"),  # heads of 16 are not 80 / 2
        ("GemmaForCausalLM", ("embed_tokens",), "'embed_scale' of 'model.embed_tokens' differs"),  # sqrt(hidden)
    ],
)
def test_a_network_no_config_describes_keeps_its_config_with_a_reason(
    name: str, endings: tuple[str, ...], reason: str
) -> None:
    model, inputs, structures = built(name)
    plan = halved(structures, *endings)
    pruned = apply_plan(model, plan)
    assert pruned.config.to_dict() == model.config.to_dict()
    (note,) = describe(model, pruned, plan, inputs).notes
    assert note.startswith("config still describes the dense network: ")
    assert reason in note


class Sizes:
    """A config that alone does not define the network."""

    def __init__(self) -> None:
        self.width = 8

    def to_dict(self) -> dict[str, int]:
        return vars(self)


class NeedsMore(nn.Module):
    def __init__(self, config: Sizes, classes: int) -> None:
        super().__init__()
        self.config = config
        self.one, self.two = nn.Linear(6, config.width), nn.Linear(config.width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).relu())


class ScalesByConfig(NeedsMore):
    def __init__(self, config: Sizes) -> None:
        super().__init__(config, 3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.config.width**-0.5


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: NeedsMore(Sizes(), 3), "NeedsMore(config) raises TypeError"),
        (lambda: ScalesByConfig(Sizes()), "forward() reads config.width"),
    ],
    ids=["not built from it", "computes with it"],
)
def test_an_unreliable_config_is_left_unchanged(build: Any, reason: str) -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(build(), nn.Identity()), torch.randn(4, 6)
    plan = halved(list_structures(model, inputs))
    pruned = apply_plan(model, plan)
    assert pruned[0].config.width == 8
    torch.testing.assert_close(pruned(inputs), masked_dense(model, plan)(inputs))
    (note,) = describe(model, pruned, plan, inputs).notes
    assert note.startswith("0.config still describes the dense network")
    assert reason in note
