"""The tutorials' pipelines: ready to run as they stand, and brought through by the commands of their pages."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import deploypipe
from deploypipe.data import as_pair
from deploypipe.errors import DataError, PipelineError
from deploypipe.preflight import check_inputs
from deploypipe.task import forward
from deploypipe.user_pipeline import load_pipeline

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"
PAGES = {
    "digits_cnn": "cnn",
    "hf_text": "huggingface",
    "segmentation": "segmentation",
    "two_inputs": "two-inputs",
    "imagenet": "imagenet",
    "from_torch_pruning": "torch-pruning",
}
SELF_MADE = [name for name in PAGES if name not in ("imagenet", "from_torch_pruning")]  # they train their networks


def untrained(name: str) -> dict[str, str]:
    """The constant that says how long the dense network is trained, set to nothing."""
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    (constant,) = re.findall(r"^(NUM_(?:EPOCHS|STEPS)) = ", source, re.M)
    return {constant: "0"}


def test_every_tutorial_shows_its_file_and_its_command() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(PAGES)
    for name, page in PAGES.items():
        text = (ROOT / "docs" / "tutorials" / f"{page}.md").read_text(encoding="utf-8")
        assert f"```{{literalinclude}} ../examples/{name}.py" in text
        command = (
            f"deploypipe run docs/examples/{name}.py x86_cpu" if name != "from_torch_pruning" else f"python {name}.py"
        )
        assert command in text


@pytest.mark.parametrize("name", SELF_MADE)
def test_a_pipeline_of_a_tutorial_is_ready(name: str) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    pipeline = load_pipeline(str(EXAMPLES / f"{name}.py"), untrained(name))
    target = deploypipe.load_target(ROOT / "targets" / "x86_cpu.toml")
    check_inputs(pipeline.build_model(), pipeline.load_data(), pipeline.task(), pipeline.recipe(), target)


@pytest.mark.slow
@pytest.mark.parametrize("name", SELF_MADE)
def test_the_dense_network_of_a_tutorial_is_trained(name: str) -> None:
    """Far above chance: a tutorial about a network that knows nothing would show nothing."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    pipeline = load_pipeline(str(EXAMPLES / f"{name}.py"))
    model, metric = pipeline.build_model(), pipeline.task().metric
    with torch.no_grad():
        pairs = [as_pair(batch, "test") for batch in pipeline.load_data().test]
        values = torch.cat([metric(forward(model, inputs), target) for inputs, target in pairs])
    assert values.mean() > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("name", SELF_MADE)
def test_a_tutorial_runs(name: str, tmp_path: Path) -> None:
    """Every stage, with as little as possible of everything. Such a run ends in HOLD whatever it finds."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    run_fast(name, dict.fromkeys(untrained(name), "1"), tmp_path)


def run_fast(name: str, constants: dict[str, str], folder: Path) -> None:
    settings = [word for key, value in constants.items() for word in ("--set", f"pipeline.{key}={value}")]
    pipeline, target = str(EXAMPLES / f"{name}.py"), str(ROOT / "targets" / "x86_cpu.toml")
    command = [sys.executable, "-m", "deploypipe", "run", pipeline, target, "--fast-dev-run", *settings]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment())
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    assert deploypipe.load_result(folder / "runs" / f"{name}-x86_cpu-fast-dev-run").search is not None


@pytest.mark.slow
def test_the_script_of_those_who_come_from_torch_pruning(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    command = [sys.executable, str(EXAMPLES / "from_torch_pruning.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    rows = re.findall(r"([\d,]+) parameters +([\d.]+) %", done.stdout)
    sizes, accuracies = zip(*((int(size.replace(",", "")), float(share)) for size, share in rows), strict=True)
    assert sizes[1] < 0.5 * sizes[0] and sizes[2] < sizes[0]
    assert accuracies[2] > accuracies[1]  # repaired


CLASSES = ("n01440764", "n01443537", "n01484850")
SMALL = {"SIZE": "32", "RESIZE": "36", "BATCH_SIZE": "8", "NUM_CALIB": "24", "NUM_VAL": "20", "NUM_WORKERS": "2"}


@pytest.fixture
def images(tmp_path: Path) -> dict[str, str]:
    """A small ImageNet of 3 classes and 16 images a class in each part; the constants that point to it."""
    pytest.importorskip("efficientnet_lite_pytorch", reason="the network of this tutorial")
    draw = np.random.default_rng(0)
    for number in range(2 * 16 * len(CLASSES)):
        folder = tmp_path / "images" / ("train", "val")[number % 2] / CLASSES[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 255, (40 + number % 7, 60 - number % 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.{('JPEG', 'png')[number % 5 == 0]}")
    return {**SMALL, "DATA": str(tmp_path / "images"), "WEIGHTS": str(tmp_path / "weights.pt")}


def test_the_images_of_a_folder_are_read_by_workers(images: dict[str, str]) -> None:
    pipeline = load_pipeline(str(EXAMPLES / "imagenet.py"), images)
    splits = pipeline.load_data()
    read = {name: list(getattr(splits, name)) for name in ("calib", "train", "val", "test")}
    assert {name: sum(map(len, (y for _, y in batches))) for name, batches in read.items()} == {
        "calib": 24,
        "train": 24,
        "val": 20,
        "test": 28,
    }
    for x, _ in itertools.chain(*read.values()):
        assert x.shape[1:] == (3, 32, 32) and -1 <= x.min() < x.max() <= 1.01
    again = list(splits.calib)
    assert all(torch.equal(x, x2) and torch.equal(y, y2) for (x, y), (x2, y2) in zip(read["calib"], again, strict=True))
    paths = [set(getattr(splits, name).split.dataset.images["path"]) for name in read]
    assert len(set.union(*paths)) == sum(map(len, paths)) == 96
    pictures = pipeline.module.Images(splits.val.split.dataset.images)
    label = int(pictures.images[0]["label"])
    assert pictures.images[0]["path"].decode().split("/")[-2] == CLASSES[label] and pictures[0][1] == label


def test_what_is_wrong_with_a_folder_of_images_is_named(images: dict[str, str]) -> None:
    pipeline = load_pipeline(str(EXAMPLES / "imagenet.py"), {**images, "DATA": "/nowhere"})
    with pytest.raises(PipelineError, match="no folder /nowhere/train; set IMAGENET_DIR"):
        pipeline.load_data()
    pipeline = load_pipeline(str(EXAMPLES / "imagenet.py"), {**images, "WEIGHTS": ""})
    with pytest.raises(PipelineError, match=r"has 3 class folders, and the weights know ImageNet's 1,000"):
        pipeline.load_data()
    first = next(Path(images["DATA"], "val").rglob("*.JPEG"))
    first.write_bytes(first.read_bytes()[:300])
    splits = load_pipeline(str(EXAMPLES / "imagenet.py"), images).load_data()
    with pytest.raises(DataError, match=rf"{first.name} cannot be read as an image"):
        list(splits.val)
        list(splits.test)


@pytest.mark.slow
def test_the_tutorial_of_imagenets_size_runs(images: dict[str, str], tmp_path: Path) -> None:
    from efficientnet_lite_pytorch import EfficientNet

    torch.manual_seed(0)
    torch.save(EfficientNet.from_name("efficientnet-lite0", num_classes=3).state_dict(), images["WEIGHTS"])
    run_fast("imagenet", images, tmp_path)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
