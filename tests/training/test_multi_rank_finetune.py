"""Two processes train as one does, whatever the batches; what differs is refused, and a killed one is no loss."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path
from shutil import copytree

import multi_rank_child
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from warm_python import start

from deploypipe.files.json_records import from_json
from deploypipe.networks.fingerprints import model_fingerprint
from deploypipe.recipe import Finetune
from deploypipe.records import TrainLog
from deploypipe.runs.result import load_result
from deploypipe.task import classification
from deploypipe.training.finetune import finetune
from deploypipe.training.ranks import Ranks, share_norms_
from deploypipe.training.train_step import own_dropout

TESTS = Path(__file__).parents[1]
TARGET = 'runtime = "onnxruntime"\nnum_latency_samples = 200\n[budget]\nmacs = "0.5x"\naccuracy_drop_pp = 10.0\n'


def environment(folder: Path) -> dict[str, str]:
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "DEPLOYPIPE_CACHE": str(folder / "cache")}


def torchrun(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A job of two processes; TimeoutExpired, and no process left, where it hangs."""
    child = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments],
        cwd=folder,
        env=environment(folder) | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said, errors = child.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGTERM)
        raise
    return subprocess.CompletedProcess(child.args, child.returncode, said, errors)


def ranks(folder: Path, *arguments: str) -> list[subprocess.CompletedProcess[str]]:
    """Two processes with all that torchrun tells its own, and nobody who ends one for the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "TORCHELASTIC_RUN_ID": "here"}
    sizes = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    children = [start(folder, *arguments, **place, **sizes, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    said = [child.communicate(120) for child in children]
    return [
        subprocess.CompletedProcess(arguments, child.returncode or 0, *texts)
        for child, texts in zip(children, said, strict=True)
    ]


def codes(done: subprocess.CompletedProcess[str]) -> set[int]:
    """The exit codes of the ranks that failed, as torchrun reports them; not of those that it ended itself."""
    return {int(code) for code in re.findall(r"exitcode +: (-?\d+)", done.stderr)} - {-signal.SIGTERM}


def outcome(folder: Path, name: str) -> tuple[dict[str, torch.Tensor], TrainLog]:
    text = (folder / f"{name}.json").read_bytes()
    return load_file(folder / f"{name}.safetensors"), from_json(TrainLog, text, name)


def assert_same_training(found: tuple[dict[str, torch.Tensor], TrainLog], model: nn.Module, expected: TrainLog) -> None:
    weights, log = found
    for name, value in model.state_dict().items():
        torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=1e-4)
    assert log.chosen_epoch == expected.chosen_epoch
    for epoch, other in zip(log.epochs, expected.epochs, strict=True):
        assert epoch.val_accuracy == pytest.approx(other.val_accuracy, abs=1e-5)
        assert epoch.train_loss == pytest.approx(other.train_loss, rel=1e-4, nan_ok=True)
        assert epoch.learning_rate == other.learning_rate


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks wrote about every case."""
    folder = tmp_path_factory.mktemp("trained")
    for done in ranks(folder, str(TESTS / "multi_rank_child.py"), "all", str(folder)):
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", multi_rank_child.CASES)
def test_two_ranks_train_as_one(name: str, trained: Path) -> None:
    model, log = multi_rank_child.train(multi_rank_child.CASES[name])
    assert log.chosen_epoch > 0  # what is compared was trained
    for rank in range(2):
        assert_same_training(outcome(trained, f"{name}-{rank}"), model, log)
    assert_same_on_both(name, trained)


def assert_same_on_both(name: str, trained: Path) -> None:
    first, second = (outcome(trained, f"{name}-{rank}") for rank in range(2))
    assert all(torch.equal(value, second[0][key]) for key, value in first[0].items())
    assert [epoch.val_accuracy for epoch in first[1].epochs] == [epoch.val_accuracy for epoch in second[1].epochs]


def test_work_is_shared_out(trained: Path) -> None:
    seen = [json.loads((trained / f"even-{rank}" / "seen.json").read_bytes()) for rank in range(2)]
    assert [set(losses) for losses, _ in seen] == [{8}, {8}]
    assert [metrics for _, metrics in seen] == [[16, 5] * 4, [30] * 4]


def test_the_first_rank_alone_writes(trained: Path) -> None:
    written = [[path.name for path in (trained / f"even-{rank}").glob("epoch*")] for rank in range(2)]
    assert written == [["epoch-3.safetensors"], []]


def test_ranks_agree_where_each_sees_its_own_samples_and_draws_itsown_dropout(trained: Path) -> None:
    assert_same_on_both("normed", trained)
    first, second = (json.loads((trained / f"states-{rank}.json").read_bytes()) for rank in range(2))
    assert first == second and len(first) == 12


def test_each_rank_draws_itsown_dropout() -> None:
    draws = []
    for rank in range(2):
        torch.manual_seed(3)
        with own_dropout(Ranks(rank=rank, count=2), step=4):
            draws.append(float(torch.rand(())))
        draws.append(float(torch.rand(())))
    assert draws[0] != draws[2] and draws[1] == draws[3]


def test_a_batch_passed_in_parts_gives_the_same_gradients() -> None:
    case = multi_rank_child.CASES["uneven"]
    whole, log = multi_rank_child.train(case)
    for parts, largest in ((2, 8), (100, 1)):
        losses: list[int] = []
        settings = replace(case.settings, accumulate=parts)
        model, other = multi_rank_child.train(multi_rank_child.counted(replace(case, settings=settings), losses, []))
        assert_same_training((model.state_dict(), other), whole, log)
        assert max(losses) == largest


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("order", "first train batch in epoch 1 ("),
        ("number", "number of train batches (3, not 4)"),
        ("others", "pipeline ("),
        ("others", "network ("),
        ("others", "data ("),
        ("few", "batches of 1 samples to 2 ranks"),
        ("replay", "network after the plan ("),
    ],
)
def test_ranks_that_differ_are_refused_on_all_of_them(name: str, said: str, trained: Path) -> None:
    first, second = ((trained / f"{name}-{rank}.txt").read_text(encoding="utf-8") for rank in range(2))
    assert first == second
    assert first.startswith("RanksError: ") and said in first and "; " in first


def test_a_sample_that_is_not_finite_ends_all_ranks_whoever_passes_it(trained: Path) -> None:
    for rank in range(2):
        said = (trained / f"nan-{rank}.txt").read_text(encoding="utf-8")
        assert said.startswith("DataError: fine-tuning: ")
        assert "in epoch 1, step 2 (batch 1 of the epoch): the inputs of sample 13 hold NaN" in said


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("num_samples", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("num_parts", [1, 3])
def test_every_sample_counts_once(count: int, num_samples: int, num_parts: int) -> None:
    ranks = [Ranks(rank=rank, count=count).parts(num_samples, num_parts) for rank in range(count)]
    counted = [0.0] * num_samples
    for part in chain.from_iterable(ranks):
        for sample in range(part.start, part.end):
            counted[sample] += part.weight / (part.end - part.start) / count
    assert counted == pytest.approx([1 / num_samples] * num_samples)
    assert all(1 <= len(parts) <= num_parts for parts in ranks)
    if num_samples >= count:
        assert sorted(s for p in chain.from_iterable(ranks) for s in range(p.start, p.end)) == [*range(num_samples)]
        sizes = [sum(part.end - part.start for part in parts) for parts in ranks]
        assert max(sizes) - min(sizes) <= 1


def test_one_rank_alone_weighs_exactly_one() -> None:
    assert all(Ranks().parts(n, 1)[0].weight == 1.0 for n in range(1, 200))


def test_a_killed_rank_ends_the_job_and_any_number_of_ranks_goes_on(tmp_path: Path) -> None:
    child = str(TESTS / "multi_rank_child.py")
    checkpoint = tmp_path / "killed"
    checkpoint.mkdir()
    killed = torchrun(tmp_path, child, "job", str(checkpoint), KILL="1")
    assert killed.returncode != 0 and -signal.SIGKILL in codes(killed), killed.stderr
    assert [path.name for path in checkpoint.glob("epoch*")] == ["epoch-1.safetensors"]
    assert (checkpoint / "start.txt").read_text(encoding="utf-8") == model_fingerprint(multi_rank_child.pruned())
    copytree(checkpoint, tmp_path / "again")

    passes: list[int] = []
    dense, task = multi_rank_child.network(1), classification()
    settings = multi_rank_child.SETTINGS
    whole, log = finetune(multi_rank_child.pruned(), dense, multi_rank_child.job_splits(), task, settings, seed=5)
    assert log.chosen_epoch > 1
    splits = multi_rank_child.job_splits(lambda epoch, number: passes.append(epoch))
    alone, alone_log = finetune(multi_rank_child.pruned(), dense, splits, task, settings, checkpoint=checkpoint, seed=5)
    assert set(passes) == {2, 3}
    assert_same_training((alone.state_dict(), alone_log), whole, log)

    for done in ranks(tmp_path, child, "job", str(tmp_path / "again")):
        assert done.returncode == 0, done.stderr
    assert_same_training(outcome(tmp_path / "again", "tuned"), whole, log)


def test_batch_norms_are_shared_but_not_those_that_do_more() -> None:
    class Activated(nn.BatchNorm1d):
        pass

    inner = nn.Sequential(nn.BatchNorm2d(3), nn.GroupNorm(1, 3))
    model = nn.Sequential(nn.Conv2d(1, 3, 1), inner, Activated(3), nn.BatchNorm3d(2))
    before = model.state_dict()
    share_norms_(model)
    kinds = [type(module) for module in model.modules() if not list(module.children())]
    assert kinds == [nn.Conv2d, nn.SyncBatchNorm, nn.GroupNorm, Activated, nn.SyncBatchNorm]
    after = model.state_dict()
    assert list(after) == list(before) and all(after[key] is not None for key in before)
    assert all(torch.equal(value, before[key]) for key, value in after.items())


@pytest.mark.parametrize("value", [0, 1.5, True])
def test_a_number_of_parts_is_whole_and_positive(value: object) -> None:
    with pytest.raises(ValueError, match="accumulate must be "):
        Finetune(accumulate=value)  # type: ignore[arg-type]


def write_pipeline(folder: Path, text: str) -> None:
    (folder / "pipe.py").write_text(f"import os\n\nimport torch\nfrom tiny_pipeline import *\n{text}", encoding="utf-8")
    (folder / "cpu.toml").write_text(TARGET, encoding="utf-8")


RUN = ("-m", "deploypipe", "run", "./pipe.py", "./cpu.toml", "--out", "out")


def test_another_network_on_one_rank_is_refused(tmp_path: Path) -> None:
    write_pipeline(
        tmp_path, "\n\ndef build_model():\n    torch.manual_seed(int(os.environ['RANK']))\n    return Network()\n"
    )
    first, second = ranks(tmp_path, *RUN)
    assert first.returncode == second.returncode == 2, first.stderr
    told = first.stderr + second.stderr
    assert told.count("error: rank 1 differs from rank 0: network (") == 1, told
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_is_said_once(tmp_path: Path) -> None:
    write_pipeline(tmp_path, "")
    first, second = ranks(tmp_path, *RUN, "--set", "finetune.num_epochs=-1")
    assert first.returncode == second.returncode == 2, first.stderr
    told = first.stderr + second.stderr
    assert told.count("num_epochs must be >= 0, got -1") == 1, told


SEEN = """

def task():
    def loss(outputs, target):
        with open(f"seen-{os.environ.get('RANK')}", "a") as file:
            print(len(outputs), file=file)
        return F.cross_entropy(outputs, target)

    return Task(loss=loss, metric=classification().metric)
"""


@pytest.mark.slow
def test_a_run_on_two_ranks_ends_as_one_and_is_resumed_by_one(tmp_path: Path) -> None:
    write_pipeline(tmp_path, SEEN)
    settings = ("--set", "search.num_trials=8", "--set", "search.num_levels=6")  # enough for several finalists
    done = torchrun(tmp_path, *RUN, *settings)
    assert done.returncode in (0, 1), done.stderr  # HOLD on a machine too busy to be steady
    stages = re.findall(r"^(\S.*?) +done in", done.stdout, re.M)
    assert [stages.count(name) for name in ("search", "fine-tune")] == [1, 1], done.stdout
    assert "Warning" not in done.stderr
    result = load_result(tmp_path / "out")
    assert result.search and result.training and [epoch.epoch for epoch in result.training.epochs] == [0, 1, 2]
    assert stages.count("finalists") == 1 < len(result.search.finalists)
    num_losses = (len(result.search.finalists) + 2) * 4 * 2  # epochs, batches of 64, two labels for each sample
    assert (tmp_path / "seen-1").read_text().splitlines() == ["32"] * num_losses
    alone = subprocess.run(
        [sys.executable, *RUN, *settings],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert alone.returncode in (0, 1), alone.stderr
    assert re.findall(r"^(\S.*?) +done in", alone.stdout, re.M) == ["gate"], alone.stdout
