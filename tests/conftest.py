"""One thread for tests of small networks; real data for slow ones ($DEPLOYPIPE_TEST_DATA, or beside the checkout)."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from finished_runs import conditions
from impatience import hurry

from deploypipe.benchmark import latency

DATA = Path(os.environ.get("DEPLOYPIPE_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")


@pytest.fixture(autouse=True, scope="module")
def quiet_machine(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whole runs are tested for what they do on a quiet machine, though the tests share theirs with others."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.parent.name == "tests" and request.path.name != "test_real_networks.py":
            patch.setattr(latency, "judge_conditions", lambda *_, **__: conditions("steady"))
            patch.setattr(latency, "find_unsteadiness", lambda _: "")
        yield


# Files with whole runs: they begin first, so that none of them is left when all else is done.
LONG = (
    "test_killed_runs.py",
    "test_target_processes.py",
    "test_pipeline.py",
    "test_multi_rank_finetune.py",
    "test_exhausted_resources.py",
    "test_search_workers.py",
    "test_batch_sizes.py",
    "test_interrupted_run.py",
    "test_readme.py",
    "test_real_networks.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


SMALL = ("numerics", "observe", "pruning", "scoring", "search", "training")


@pytest.fixture(autouse=True, scope="session")
def impatient() -> None:
    hurry()


@pytest.fixture(autouse=True, scope="module")
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Networks as small as those in these folders lose more to waiting threads than they gain."""
    before = torch.get_num_threads()
    if request.path.parent.name in SMALL:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def cifar10_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with CIFAR-10's binary version; skips where there is none."""
    if folder := os.environ.get("CIFAR10_DIR"):
        return Path(folder)
    if (DATA / "cifar-10-batches-bin").is_dir():
        return DATA / "cifar-10-batches-bin"
    if not (DATA / "unpack_cifar10.py").is_file():
        pytest.skip("CIFAR-10 is absent; set CIFAR10_DIR to its binary version")
    pytest.importorskip("PIL", reason="pillow, which unpacks CIFAR-10, is not installed")
    folder = tmp_path_factory.mktemp("cifar10")
    subprocess.run([sys.executable, str(DATA / "unpack_cifar10.py"), str(folder)], check=True, capture_output=True)
    return Path(folder) / "cifar-10-batches-bin"


@pytest.fixture(scope="session")
def resnet_weights() -> Callable[[int], Path]:
    """Depth (8, 20 or 56) -> safetensors of the trained network; skips where it is absent."""

    def find(depth: int) -> Path:
        origin = "mlperftiny" if depth == 8 else "akamaster"
        return _find_weights(f"RESNET{depth}_WEIGHTS", f"cifar10_resnet{depth}_{origin}.safetensors")

    return find


@pytest.fixture(scope="session")
def vit_weights() -> Path:
    """Safetensors of the trained vision transformer; skips where it is absent."""
    return _find_weights("VIT_WEIGHTS", "cifar10_vit_postnorm_smmk47.safetensors")


@pytest.fixture(scope="session")
def sst2_dir() -> Path:
    """The folder with SST-2's three files; skips where it is absent."""
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    folder = Path(os.environ.get("SST2_DIR") or DATA / "sst2")
    if not folder.is_dir():
        pytest.skip(f"SST-2 is absent ({folder}); set SST2_DIR")
    return folder


def _find_weights(variable: str, name: str) -> Path:
    path = Path(os.environ.get(variable) or DATA / "weights" / name)
    if not path.is_file():
        pytest.skip(f"trained weights are absent ({path}); set {variable}")
    return path
