"""Classifiers of transformers as they come: dataclass outputs with `.logits`, hidden states, caches, padded batches."""

from pathlib import Path
from typing import Any

import pytest
import tiny_pipeline as tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from deploypipe import check
from deploypipe.benchmark.accuracy import evaluate_file, evaluate_module
from deploypipe.data import as_pair
from deploypipe.distillation_loss import with_distillation_loss, with_outputs_class
from deploypipe.export.onnx_export.export_onnx import export_onnx
from deploypipe.networks.batch_trees import map_leaves, tensors
from deploypipe.recipe import Export
from deploypipe.runtimes.onnxruntime import OnnxRuntime
from deploypipe.scoring.blocks.logit_divergence import divergence
from deploypipe.task import Batch, Splits, classification, forward, num_samples

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 40, "pad_token_id": 0, "num_labels": 3}


def bert(**others: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(**sizes, **SIZES, **others)
    return transformers.BertForSequenceClassification(config).eval()  # type: ignore[no-any-return]


def gpt2() -> nn.Module:
    """Returns a cache of keys and values unless it is told not to."""
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 1}
    config = transformers.GPT2Config(**sizes, **SIZES)
    return transformers.GPT2ForSequenceClassification(config).eval()  # type: ignore[no-any-return]


def collate(rows: list[list[int]]) -> Any:
    """Pad to the longest of the batch, as DataCollatorWithPadding does, in the class that it returns."""
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    labels = torch.tensor([sum(row) % 3 for row in rows])
    return transformers.BatchEncoding({"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels})


def loader(seed: int, count: int = 12) -> DataLoader[Any]:
    """Three lengths, of 4 to 9 tokens, in the batches of every seed."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(1, 40, (4 + 2 * (i // 4) + i % 2,), generator=generator).tolist() for i in range(count)]
    return DataLoader(rows, batch_size=4, collate_fn=collate)  # type: ignore[arg-type]


def first(seed: int = 0) -> Batch:
    return as_pair(next(iter(loader(seed))), "val")


@pytest.mark.parametrize("model", [bert(), bert(output_hidden_states=True), gpt2()], ids=["logits", "hidden", "cache"])
def test_classification_reads_the_logits_of_all_that_is_returned(model: nn.Module) -> None:
    inputs, target = first()
    with torch.no_grad():
        outputs, raw = forward(model, inputs), model(**inputs)
    assert set(outputs) == set(raw) - {"cache", "past_key_values"} and type(outputs) is type(raw)
    task = with_distillation_loss(with_outputs_class(classification(), outputs), outputs, target)
    assert torch.equal(task.loss(outputs, target.int()), F.cross_entropy(raw.logits, target))
    assert torch.equal(task.metric(outputs, target), (raw.logits.argmax(1) == target).float())
    assert task.slices is not None and sum(mask.sum() for mask in task.slices(inputs, target).values()) == 4
    assert evaluate_module(model, loader_pairs(1), task).shape == (12,)
    other = map_leaves(lambda leaf: 2 * leaf if isinstance(leaf, Tensor) else leaf, outputs)
    assert type(other) is type(raw) and len(tensors(other)) == len(tensors(outputs))
    assert task.distillation_loss is not None
    own, dense = raw.logits.log_softmax(1), (raw.logits / 2).log_softmax(1)
    wanted = 4 * F.kl_div(own, dense, log_target=True, reduction="batchmean")
    torch.testing.assert_close(task.distillation_loss(other, outputs, 2.0), wanted)
    assert divergence(model, model, [(inputs, None)]) == 0.0


def loader_pairs(seed: int) -> list[Batch]:
    return [as_pair(batch, "val") for batch in loader(seed)]


@pytest.mark.slow  # three exports
def test_padded_batches_and_a_cache_pass_the_check_and_the_file_answers_as_the_network(tmp_path: Path) -> None:
    """Batches of other lengths than the first: the file must not be made for one length."""
    for model in (bert(output_hidden_states=True), gpt2()):
        data = Splits(**{name: loader(seed) for seed, name in enumerate(("calib", "train", "val", "test"))})
        report = check(model, data, classification(), tiny.recipe(), tiny.target())
        assert report.complaints == ()
    file = export_onnx(model, loader_pairs(0), tmp_path / "model.onnx", Export())
    assert file.output_names == ("logits",) and file.tested_sizes["sequence"] == (2, 18)
    seen = evaluate_file(tmp_path / "model.onnx", loader_pairs(7), classification(), OnnxRuntime(), 1)
    assert seen.tolist() == evaluate_module(model, loader_pairs(7), classification()).tolist()


def test_labels_in_the_inputs_are_not_needed_nor_passed() -> None:
    inputs, target = first()
    assert set(inputs) == {"input_ids", "attention_mask"} and num_samples(inputs) == len(target) == 4
