"""A Hugging Face text classifier with dynamic padding: is a film review kind?

A small BERT is trained here, on sentences made from word lists, so that nothing has to be downloaded.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from deploypipe.recipe import Finetune, Recipe, Search
from deploypipe.task import Splits, Task, classification

NUM_EPOCHS = 3  # of the dense network
BATCH_SIZE = 64

KIND = "wonderful moving clever warm funny gripping lovely honest brilliant charming".split()
UNKIND = "dull clumsy noisy cold tired shallow awful empty lazy boring".split()
PARTS = "film story ending cast music script camera hero villain joke".split()
FILLERS = "and but yet the a in of with my our last whole very rather quite really".split()
WORDS = ["[PAD]", "[CLS]", "not", "is", *KIND, *UNKIND, *PARTS, *FILLERS]
IDS = {word: number for number, word in enumerate(WORDS)}


class Classifier(nn.Module):
    """Takes the batch by name, and returns the logits: the transformers class returns a dataclass around them."""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=len(WORDS), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=256, max_position_embeddings=64, num_labels=2, attn_implementation="eager",
        )  # fmt: skip
        self.bert = BertForSequenceClassification(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.bert(input_ids=input_ids, attention_mask=attention_mask).logits


class Reviews:
    """Batches of ({"input_ids", "attention_mask"}, label), each padded to its own longest sentence."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.samples = [sentence(generator) for _ in range(count)]

    def __len__(self) -> int:
        return -(-len(self.samples) // BATCH_SIZE)

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for start in range(0, len(self.samples), BATCH_SIZE):
            words, labels = zip(*self.samples[start : start + BATCH_SIZE], strict=True)
            rows = [torch.tensor([IDS[word] for word in ["[CLS]", *each]]) for each in words]
            ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # 0 is [PAD]
            yield {"input_ids": ids, "attention_mask": (ids != 0).long()}, torch.tensor(labels)


def sentence(generator: torch.Generator) -> tuple[list[str], int]:
    """Two to five opinions, each about one part. The label is that of the majority: "not dull" is kind."""

    def pick(words: list[str]) -> str:
        return words[int(torch.randint(len(words), (1,), generator=generator))]

    def chance() -> bool:
        return bool(torch.rand(1, generator=generator) < 0.5)

    text, balance = [], 0
    for _ in range(2 * int(torch.randint(0, 3, (1,), generator=generator)) + 1):
        kind, negated = chance(), chance()
        fillers = [pick(FILLERS) for _ in range(int(torch.randint(0, 4, (1,), generator=generator)))]
        text += [*fillers, pick(PARTS), "is", *(["not"] if negated else []), pick(KIND if kind else UNKIND)]
        balance += 1 if kind != negated else -1
    return text, int(balance > 0)


def build_model() -> nn.Module:
    torch.manual_seed(0)
    model: Any = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    for _ in range(NUM_EPOCHS):
        for inputs, labels in load_data().train:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(**inputs), labels).backward()
            optimizer.step()
    return model.eval()


def load_data() -> Splits:
    return Splits(
        calib=Reviews(512, seed=1), train=Reviews(4000, seed=2), val=Reviews(600, seed=3), test=Reviews(1500, seed=4)
    )


def task() -> Task:
    return classification()


def recipe() -> Recipe:
    return Recipe(search=Search(num_trials=6), finetune=Finetune(num_epochs=2, mix_share=0))
