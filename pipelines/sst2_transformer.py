"""A small BERT-shaped classifier of film reviews: SST-2 (Socher et al., EMNLP 2013), with its own vocabulary.

The pipeline trains its dense network in about three minutes on one core (81 % accuracy on test). It caches the weights
in $DEPLOYPIPE_CACHE or ~/.cache/deploypipe.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deploypipe.data import TensorBatches
from deploypipe.errors import DataError
from deploypipe.recipe import Export, Finetune, Recipe, Search
from deploypipe.task import Batch, Splits, Task, classification
from pipelines.trained import trained_once

SST2_DIR = os.environ.get("SST2_DIR", "")
FILES = ("train.tsv", "dev.tsv", "test.tsv")

SEED = 0
NUM_EPOCHS = 2  # of the dense network
LEARNING_RATE = 1e-3  # the peak of the schedule
HIDDEN_SHARE = 0.1  # of the pieces, in training: phrases overlap, so the network would soon memorise them

NUM_PIECES = 4000  # the vocabulary
LENGTH = 48  # at most so many pieces of a text; the rest is cut off
WIDTH = 128
NUM_LAYERS = 4
NUM_HEADS = 8
DROPOUT = 0.1
BATCH_SIZE = 64

NUM_CALIB = 2048  # training uses them too, because nothing is chosen on them
MIN_CALIB_LENGTH = 20  # pieces: most texts of train are snippets, those of dev and test are whole sentences

SPECIAL = ("[PAD]", "[UNK]", "[CLS]")
PAD, UNKNOWN, START = range(3)


class SentenceNet(nn.Module):
    """Embeddings, transformer layers that normalise first, and a linear layer on the mean of the pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces = nn.Embedding(NUM_PIECES, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        for embedding in (self.pieces, self.positions):
            nn.init.normal_(embedding.weight, std=0.1)
        self.dropout = nn.Dropout(DROPOUT)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, NUM_HEADS, 4 * WIDTH, DROPOUT, F.gelu, batch_first=True, norm_first=True)
            for _ in range(NUM_LAYERS)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.classifier = nn.Linear(WIDTH, 2)

    def forward(self, ids: Tensor) -> Tensor:  # (n, length) int64, padded at the end; every row has at least one piece
        is_padding = ids == PAD
        x = self.dropout(self.pieces(ids) + self.positions.weight[: ids.shape[1]])
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=is_padding)
        total = self.norm(x).masked_fill(is_padding[..., None], 0.0).sum(dim=1)
        mean = total / (~is_padding).sum(dim=1, keepdim=True)
        logits: Tensor = self.classifier(self.dropout(mean))
        return logits


class Phrases:
    """Shuffled batches of texts of similar length, cut to the longest: a third of the work of full padding.

    SEED and the epoch decide the order: call `set_epoch(epoch)` before each pass.
    """

    def __init__(self, ids: Tensor, labels: Tensor) -> None:
        self.ids, self.labels, self.lengths = ids, labels, _lengths(ids)
        self.epoch = 0

    def __len__(self) -> int:
        return -(-len(self.ids) // BATCH_SIZE)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(1_000 * SEED + self.epoch)
        order = torch.randperm(len(self.ids), generator=generator)
        batches = torch.split(order[self.lengths[order].argsort(stable=True)], BATCH_SIZE)
        for i in torch.randperm(len(batches), generator=generator).tolist():
            ids = self.ids[batches[i], : int(self.lengths[batches[i]].max())]
            is_hidden = torch.rand(ids.shape, generator=generator) < HIDDEN_SHARE
            yield ids.masked_fill(is_hidden & (ids > START), UNKNOWN), self.labels[batches[i]]


def build_model() -> nn.Module:
    model = SentenceNet()
    model.load_state_dict(trained_once(f"sst2-{_digest()}", _train))
    return model.eval()


def load_data() -> Splits:
    """Read the splits. Val is dev.tsv, because nine of ten snippets at the end of train.tsv repeat earlier ones."""
    (ids, labels), val, test = (_encoded(SST2_DIR, name) for name in FILES)
    calib = (_lengths(ids) >= MIN_CALIB_LENGTH).nonzero()[-NUM_CALIB:, 0]
    return Splits(
        calib=TensorBatches(ids[calib], labels[calib], BATCH_SIZE),
        train=Phrases(ids, labels),
        val=TensorBatches(*val, BATCH_SIZE),
        test=TensorBatches(*test, BATCH_SIZE),
    )


def task() -> Task:
    return replace(classification(), real_tokens=lambda ids: ids != PAD)


def recipe() -> Recipe:
    return Recipe(
        search=Search(num_trials=12),
        finetune=Finetune(num_epochs=2, optimizer="sgd", mix_share=0),  # pipelines/LOG.md was measured with SGD
        export=Export(dynamic_axes={"ids": {1: "sequence"}}),  # any length up to LENGTH
    )


@cache
def _tokenizer(folder: str) -> Any:
    """Train byte-pair encoding on train.tsv. (WordPiece of the same package numbers pieces differently each time.)"""
    texts, _ = _read(_find(folder) / FILES[0])
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    except ImportError:
        raise DataError(
            "tokenizers, which splits texts into pieces, is not installed; pip install 'deploypipe[text]'"
        ) from None
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=NUM_PIECES, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[START]} $A", special_tokens=[(SPECIAL[START], START)]
    )
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(pad_id=PAD, pad_token=SPECIAL[PAD], length=LENGTH)
    return tokenizer


@cache
def _encoded(folder: str, name: str) -> tuple[Tensor, Tensor]:
    """Read the ids of the pieces (n, LENGTH) and the labels (n,)."""
    texts, labels = _read(_find(folder) / name)
    encodings = _tokenizer(folder).encode_batch(texts)
    return torch.tensor([encoding.ids for encoding in encodings]), torch.tensor(labels)


def _lengths(ids: Tensor) -> Tensor:
    return (ids != PAD).sum(dim=1)


def _find(folder: str) -> Path:
    if folder and all((Path(folder) / name).is_file() for name in FILES):
        return Path(folder)
    seen = f"{folder!r} does not hold it" if folder else "no path was given"
    raise DataError(
        f"SST-2 is missing ({seen}); get it from https://nlp.stanford.edu/sentiment (GLUE's copy has no labels for "
        f"test), write {', '.join(FILES)} (a header, then lines LABEL<TAB>SENTENCE with label 0 or 1), then set the "
        "environment variable SST2_DIR or --set pipeline.SST2_DIR=PATH"
    )


def _read(path: Path) -> tuple[list[str], list[int]]:
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").split("\n")[1:] if line]
    for number, row in enumerate(rows, 2):
        if len(row) != 2 or row[0] not in ("0", "1"):
            raise DataError(f"{path}: line {number} is not LABEL<TAB>SENTENCE with label 0 or 1; correct it")
    return [text for _, text in rows], [int(label) for label, _ in rows]


def _digest() -> str:
    """Hash everything that decides the dense weights."""
    settings = (SEED, NUM_EPOCHS, LEARNING_RATE, HIDDEN_SHARE, WIDTH, NUM_LAYERS, NUM_HEADS, DROPOUT, BATCH_SIZE)
    return hashlib.sha256(f"{settings} {_tokenizer(SST2_DIR).to_str()}".encode()).hexdigest()[:12]


def _train() -> dict[str, Tensor]:
    train = load_data().train
    assert isinstance(train, Phrases)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = SentenceNet().train()
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=LEARNING_RATE, total_steps=NUM_EPOCHS * len(train), pct_start=0.1
        )
        for epoch in range(NUM_EPOCHS):
            train.set_epoch(epoch)
            for ids, labels in train:
                optimizer.zero_grad()
                F.cross_entropy(model(ids), labels).backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
