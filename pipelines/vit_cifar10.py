"""A small vision transformer on CIFAR-10 (arXiv:2010.11929). Needs CIFAR-10's binary version and the trained weights.

Patches of 4x4 pixels, width 128, six layers with eight heads. LayerNorm follows each sum, as in arXiv:1706.03762, so
only a LayerNorm lies between a layer's output and the next layer.
"""

import os

import torch
from torch import Tensor, nn

from deploypipe.recipe import Finetune, Recipe, Search
from deploypipe.task import Splits, Task, classification
from pipelines.cifar_resnet import load_cifar10, with_weights

CIFAR10_DIR = os.environ.get("CIFAR10_DIR", "")
WEIGHTS = os.environ.get("VIT_WEIGHTS", "")
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)

PATCH = 4  # pixels along a side
NUM_PATCHES = (32 // PATCH) ** 2
WIDTH = 128
MLP_WIDTH = 256
NUM_LAYERS = 6
NUM_HEADS = 8


class PatchEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, WIDTH, PATCH, PATCH)

    def forward(self, x: Tensor) -> Tensor:
        patches: Tensor = self.proj(x)
        return patches.flatten(2).transpose(1, 2)  # (n, patches, width)


class VisionTransformer(nn.Module):
    """The network. Its parameter names are those of the trained weights."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = PatchEmbedding()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + NUM_PATCHES, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, NUM_HEADS, MLP_WIDTH, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, NUM_LAYERS)
        self.mlp_head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10))

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch_embed(x)
        tokens = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        tokens = self.transformer(tokens + self.pos_embed)
        logits: Tensor = self.mlp_head(tokens[:, 0])
        return logits


def build_model() -> nn.Module:
    source = "https://github.com/smmk47/CIFAR10-Classification"
    return with_weights(VisionTransformer(), WEIGHTS, "VIT_WEIGHTS", source)


def load_data() -> Splits:
    return load_cifar10(CIFAR10_DIR, mean=MEAN, std=STD)


def task() -> Task:
    return classification()


def recipe() -> Recipe:
    # In a tenth of this training, a larger learning rate and mixed images lose more accuracy on val: there is no batch
    # norm to absorb large steps. SGD, because the figures in pipelines/LOG.md were measured with it.
    finetune = Finetune(num_epochs=5, optimizer="sgd", learning_rate=0.001, mix_share=0.0)
    return Recipe(search=Search(num_trials=12), finetune=finetune)
