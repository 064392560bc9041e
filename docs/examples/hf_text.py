"""A Hugging Face text classifier with dynamic padding: is a film review kind?

A small BERT and its tokenizer are made here, from word lists, so that nothing has to be downloaded.
"""

import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, DataCollatorWithPadding, PreTrainedTokenizerFast

from deploypipe.recipe import Finetune, Recipe, Search
from deploypipe.task import Splits, Task, classification

NUM_EPOCHS = 3  # of the dense network

KIND = "wonderful moving clever warm funny gripping lovely honest brilliant charming".split()
UNKIND = "dull clumsy noisy cold tired shallow awful empty lazy boring".split()
PARTS = "film story ending cast music script camera hero villain joke".split()
FILLERS = "and but yet the a in of with my our last whole very rather quite really".split()
WORDS = ["[PAD]", "[UNK]", "is", *KIND, *UNKIND, *PARTS, *FILLERS]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """With a model of your own: AutoTokenizer.from_pretrained(FOLDER)."""
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", model_input_names=names)


def build_model() -> nn.Module:
    """With a model of your own: AutoModelForSequenceClassification.from_pretrained(FOLDER).eval()."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(WORDS), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=256, max_position_embeddings=64, num_labels=2,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    train = load_data().train
    for _ in range(NUM_EPOCHS):
        for batch in train:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    return model.eval()


def load_data() -> Splits:
    """Each batch is padded to its own longest text. The collator gives input_ids, attention_mask and labels."""
    tokenizer = make_tokenizer()

    def loader(count: int, seed: int, shuffle: bool = False) -> DataLoader:
        generator = random.Random(seed)
        reviews = [review(generator) for _ in range(count)]
        samples = [{**tokenizer(text), "label": label} for text, label in reviews]
        return DataLoader(samples, batch_size=64, shuffle=shuffle, collate_fn=DataCollatorWithPadding(tokenizer))

    return Splits(
        calib=loader(512, seed=1),
        train=loader(3000, seed=2, shuffle=True),
        val=loader(600, seed=3),
        test=loader(1500, seed=4),
    )


def task() -> Task:
    return classification()


def recipe() -> Recipe:
    return Recipe(search=Search(num_trials=6), finetune=Finetune(num_epochs=2))


def review(generator: random.Random) -> tuple[str, int]:
    """One, three or five opinions, each about one part. The label is that of the majority."""
    words, balance = [], 0
    for _ in range(generator.choice([1, 3, 5])):
        is_kind = generator.random() < 0.5
        words += generator.choices(FILLERS, k=generator.randrange(4))
        words += [generator.choice(PARTS), "is", generator.choice(KIND if is_kind else UNKIND)]
        balance += 1 if is_kind else -1
    return " ".join(words), int(balance > 0)
