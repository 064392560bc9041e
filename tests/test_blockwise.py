"""Blocks pruned one at a time from their file equal those of the whole network pruned at once."""

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

from deploypipe.blockwise import BlockwiseResult, find_blocks_in_a_row, prune_block, prune_blockwise, work_folder
from deploypipe.cli import app
from deploypipe.errors import ConfigError, DataError, DeploypipeError, ModelError, RunFolderError
from deploypipe.files.json_records import to_json
from deploypipe.networks.fingerprints import model_fingerprint
from deploypipe.networks.streamed_weights import WeightFiles, streamed, without_weights
from deploypipe.pruning.surgery.apply_plan import apply_plan, masked_dense
from deploypipe.pruning.surgery.saved_network import load_saved, own_weights
from deploypipe.recipe import Observe, OutputError, Recipe, Repair, Taylor
from deploypipe.records import Event, Progress
from deploypipe.task import Batch

WIDTH, LENGTH, VOCABULARY = 24, 6, 31


class Block(nn.Module):
    """A feed-forward block that also gets a mask with a row per sample, and returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)

    def forward(self, x: Tensor, shift: Tensor, mask: Tensor, gain: float) -> tuple[Tensor, None]:
        return x + gain * mask.unsqueeze(-1) * self.down(F.relu(self.up(self.norm(x) + shift))), None


class Network(nn.Module):
    """The first and the last layer share their weights."""

    def __init__(self, num_blocks: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.register_buffer("shift", torch.linspace(-1, 1, LENGTH).view(1, LENGTH, 1), persistent=False)
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x, mask = self.embed(tokens), (tokens > 2).float()
        for block in self.blocks:
            x = block(x, self.shift, mask=mask, gain=0.5)[0]
        return self.head(x)


def build_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        intermediate_size=64,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def build_network() -> nn.Module:
    torch.manual_seed(0)
    return Network()


def batches(count: int = 6, length: int = LENGTH) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randint(0, VOCABULARY, (16, length), generator=generator) for _ in range(count)]
    return [(tokens, torch.zeros(16, dtype=torch.long)) for tokens in drawn]


RECIPE = Recipe(score=OutputError(), observe=Observe(positions_per_sample=6), repair=Repair(positions_per_sample=6))


@pytest.fixture(params=[build_network, build_llama])
def build(request: pytest.FixtureRequest) -> Callable[[], nn.Module]:
    chosen: Callable[[], nn.Module] = request.param
    return chosen


def saved(build: Callable[[], nn.Module], folder: Path) -> Path:
    """The dense weights; shared ones are stored once."""
    weights = own_weights(build())
    if build is not build_llama:
        weights.pop("head.weight")
    save_file(weights, folder / "dense.safetensors")
    return folder / "dense.safetensors"


def prune(build: Callable[[], nn.Module], at: Path, **changes: Any) -> BlockwiseResult:
    weights = changes.pop("weights", None) or saved(build, at)
    given: dict[str, Any] = {"batches": batches(), "recipe": RECIPE, "kept": 0.6, "folder": at / "out"} | changes
    return prune_blockwise(build, weights, **given)


def test_the_plan_fits_the_whole_network(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    result, dense = prune(build, tmp_path), build().eval()
    assert result.plan.model_fingerprint == model_fingerprint(dense)
    pruned, tokens = apply_plan(dense, result.plan), batches(1)[0][0]
    torch.testing.assert_close(logits(pruned, tokens), logits(masked_dense(dense, result.plan), tokens))
    loaded = load_saved(tmp_path / "out", build)
    assert {n: p.shape for n, p in loaded.state_dict().items()} == {n: p.shape for n, p in pruned.state_dict().items()}
    assert sum(p.numel() for p in loaded.parameters()) == result.params_after < result.params_before
    wrong, repaired = (error(network, dense, tokens) for network in (pruned, loaded))
    assert repaired < 0.7 * wrong
    outside = [name for name in dense.state_dict() if "blocks." not in name and "layers." not in name]
    assert outside and all(torch.equal(loaded.state_dict()[name], dense.state_dict()[name]) for name in outside)
    assert not (tmp_path / "out" / ".work").exists()


def logits(network: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        outputs = network(tokens)
    values: Tensor = outputs if isinstance(outputs, Tensor) else outputs.logits
    return values


def error(network: nn.Module, dense: nn.Module, tokens: Tensor) -> float:
    return float((logits(network, tokens) - logits(dense, tokens)).square().mean())


def test_repair_starts_from_the_outputs_of_pruned_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier errors are corrected: after the last block the error is smaller than if each block is repaired alone."""
    both = prune(build_llama, tmp_path).blocks[-1].error
    real = prune_block.repair
    monkeypatch.setattr(prune_block, "repair", lambda *args, arriving, **given: real(*args, **given))
    alone = prune(build_llama, tmp_path, folder=tmp_path / "alone").blocks[-1].error
    assert both < 0.7 * alone


def test_only_one_block_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: dict[str, list[weakref.ref[Tensor]]] = {}
    load_ = WeightFiles.load_

    def noting(files: WeightFiles, module: nn.Module, prefix: str = "", names: Any = None) -> None:
        for other, references in alive.items():
            assert all(reference() is None for reference in references), f"{other} is in memory together with {prefix}"
        load_(files, module, prefix, names)
        if prefix:
            alive[prefix] = [weakref.ref(value) for value in module.parameters()]

    monkeypatch.setattr(WeightFiles, "load_", noting)
    prune(build_network, tmp_path)
    assert list(alive) == [f"blocks.{i}." for i in range(4)]


def test_an_interrupted_run_resumes(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    whole = prune(build, tmp_path, folder=tmp_path / "whole")
    for number in range(1, len(whole.blocks)):

        def kill(event: Event, number: int = number) -> None:
            if isinstance(event, Progress) and event.done == number:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            prune(build, tmp_path, notify=kill)
        assert len(list((tmp_path / "out" / ".work").glob("streams-*"))) == 1  # they are as large as all samples
        with pytest.raises(RunFolderError, match="another network, other samples or other settings"):
            prune(build, tmp_path, kept=0.7)
    told: list[Event] = []
    result = prune(build, tmp_path, notify=told.append)
    assert to_json(result.plan) == to_json(whole.plan)
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "whole").iterdir()
    }
    with pytest.raises(RunFolderError, match="is not empty"):
        prune(build, tmp_path)


def test_an_unfinished_block_is_pruned_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prune(build_network, tmp_path, folder=tmp_path / "whole")
    monkeypatch.setattr(work_folder, "write_atomically", fail_at("block-00001"))
    with pytest.raises(OSError, match="disk full"):
        prune(build_network, tmp_path)
    monkeypatch.undo()
    assert to_json(prune(build_network, tmp_path).plan) == to_json(whole.plan)


def fail_at(name: str) -> Callable[[Path, bytes], None]:
    real = work_folder.write_atomically

    def write(path: Path, content: bytes) -> None:
        if path.name.startswith(name):
            raise OSError("disk full")
        real(path, content)

    return write


def test_weights_may_be_in_several_files(tmp_path: Path) -> None:
    whole = prune(build_network, tmp_path, folder=tmp_path / "whole")
    index = in_two(load_file(tmp_path / "dense.safetensors"), tmp_path / "parts")
    assert to_json(prune(build_network, tmp_path, weights=index).plan) == to_json(whole.plan)


def in_two(weights: dict[str, Tensor], folder: Path) -> Path:
    folder.mkdir()
    names = sorted(weights)
    places = {}
    for number, own in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: weights[name] for name in own}, folder / file)
        places |= dict.fromkeys(own, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    return index


def test_a_network_without_weights_runs_block_by_block(tmp_path: Path) -> None:
    with without_weights():
        empty = build_network().eval()
    tokens, blocks = batches(1)[0][0], find_blocks_in_a_row(empty)
    with torch.no_grad(), streamed(empty, WeightFiles(saved(build_network, tmp_path)), blocks):
        assert torch.equal(empty(tokens), logits(build_network().eval(), tokens))
        assert all(value.is_meta for value in empty.get_submodule("blocks").parameters())
    assert all(value.is_meta for value in empty.parameters())


def test_without_weights_keeps_buffers_and_shared_tensors() -> None:
    with without_weights():
        empty = build_network()
    assert isinstance(empty, Network) and empty.head.weight is empty.embed.weight and empty.embed.weight.is_meta
    assert torch.equal(empty.shift, torch.linspace(-1, 1, LENGTH).view(1, LENGTH, 1))
    with pytest.raises(ZeroDivisionError), without_weights():
        raise ZeroDivisionError
    assert not nn.Linear(2, 2).weight.is_meta


def test_a_network_saved_in_parts_is_checked(tmp_path: Path) -> None:
    prune(build_network, tmp_path)
    with pytest.raises(ModelError, match="load it with build_model"):
        load_saved(tmp_path / "out")
    part = tmp_path / "out" / "weights-00002.safetensors"
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    with pytest.raises(ModelError, match=r"weights-00002.*was changed after it was saved"):
        load_saved(tmp_path / "out", build_network)
    part.unlink()
    with pytest.raises(ModelError, match=r"weights-00002.* is missing"):
        load_saved(tmp_path / "out", build_network)


def of_two_lengths() -> list[Batch]:
    return [*batches(1), *batches(1, LENGTH - 1)]


class Shuffled(Network):
    """Its blocks run in another order than in their list."""

    def forward(self, tokens: Tensor) -> Tensor:
        x, mask = self.embed(tokens), (tokens > 2).float()
        for at in (1, 0, 2, 3):
            x = self.blocks[at](x, self.shift, mask=mask, gain=0.5)[0]
        return self.head(x)


class Remembering(Network):
    """Every block gets the output of the first block in addition to that of the one before."""

    def forward(self, tokens: Tensor) -> Tensor:
        x, mask = self.embed(tokens), (tokens > 2).float()
        first = None
        for block in self.blocks:
            x = block(x, self.shift if first is None else first, mask=mask, gain=0.5)[0]
            first = x if first is None else first
        return self.head(x)


class Handing(Network):
    """As in T5: all other blocks read a second output of the first block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Giving() for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        x, mask, extra = self.embed(tokens), (tokens > 2).float(), self.shift
        for block in self.blocks:
            x, given = block(x, extra, mask=mask, gain=0.5)
            extra = extra if extra is not self.shift else given
        return self.head(x)


class Giving(Block):
    def forward(self, x: Tensor, shift: Tensor, mask: Tensor, gain: float) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x, shift, mask, gain)[0], x.mean(-1, keepdim=True)


class Hidden(Network):
    """The second block gets a result of the first one in a way that its call does not show."""

    def forward(self, tokens: Tensor) -> Tensor:
        x, mask = self.embed(tokens), (tokens > 2).float()
        for number, block in enumerate(self.blocks):
            gain = 0.5 if number == 0 else float(x.std())
            x = block(x, self.shift, mask=mask, gain=gain)[0]
        return self.head(x)


class Bare(Network):
    """Blocks with nothing inside that can be removed."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Alternating(Network):
    """As in Gemma and ModernBERT: every second block is called differently, here with a mask per sample."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        masks = [(tokens > 2).float(), (tokens > 9).float()]
        for number, block in enumerate(self.blocks):
            x = block(x, self.shift, mask=masks[number % 2], gain=0.5 + number % 2)[0]
        return self.head(x)


def build_alternating() -> nn.Module:
    torch.manual_seed(0)
    return Alternating()


def test_blocks_may_be_called_differently(tmp_path: Path) -> None:
    result, dense = prune(build_alternating, tmp_path), build_alternating().eval()
    loaded, tokens = load_saved(tmp_path / "out", build_alternating), batches(1)[0][0]
    assert error(loaded, dense, tokens) < 0.7 * error(apply_plan(dense, result.plan), dense, tokens)


@pytest.mark.parametrize(
    ("build", "changes", "kind", "told"),
    [
        (Network, {"kept": 0.0}, ConfigError, "kept: must be > 0 and < 1, got 0.0"),
        (Network, {"kept": 1.0}, ConfigError, "kept: must be > 0 and < 1, got 1.0"),
        (Network, {"recipe": Recipe(score=Taylor())}, ConfigError, r"score.kind.*'taylor' needs the whole network"),
        (Network, {"batches": []}, DataError, "no batches"),
        (
            build_llama,
            {"batches": of_two_lengths()},
            ModelError,
            "from batch to batch; use samples of one length",
        ),
        (
            Network,
            {"blocks": ("blocks.1", "blocks.0")},
            ModelError,
            "'blocks.0' does not read the output of block 'blocks.1'",
        ),
        (Network, {"blocks": ("blocks.0", "blocks.7")}, ModelError, "has no module 'blocks.7'"),
        (Shuffled, {}, ModelError, "does not read the output of block"),
        (Remembering, {}, ModelError, "'blocks.2' reads more from block 'blocks.0'"),
        (Handing, {}, ModelError, "'blocks.1' reads more from block 'blocks.0'"),
        (Hidden, {}, ModelError, "change from batch to batch"),
        (lambda: Network(1), {}, ModelError, "no list of blocks of one class"),
        (lambda: Network(5), {}, ModelError, "holds no tensor 'blocks.4.norm.weight'"),
    ],
)
def test_unsuitable_networks_are_errors_before_anything_is_written(
    build: Callable[[], nn.Module], changes: dict[str, Any], kind: type[DeploypipeError], told: str, tmp_path: Path
) -> None:
    weights = saved(build if build in (build_llama,) else build_network, tmp_path)
    with pytest.raises(kind, match=told):
        prune(build, tmp_path, weights=weights, **changes)
    assert not list((tmp_path / "out").glob("weights*"))


def test_blocks_with_nothing_to_remove_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nothing inside 'blocks\.0' and the blocks after it can be removed"):
        prune(Bare, tmp_path, weights=saved(Bare, tmp_path))


def test_blocks_that_do_not_fit_together_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass over the dense network cannot show it: the pruned blocks together give other outputs."""
    real = prune_block.Pruner.prune

    def doubled(self: Any, name: str, block: nn.Module, streams: Any) -> Any:
        row, pruned, (dense, after) = real(self, name, block, streams)
        return row, pruned, (dense, [2 * value for value in after])

    monkeypatch.setattr(prune_block.Pruner, "prune", doubled)
    with pytest.raises(ModelError, match="together give other outputs than one by one"):
        prune(build_network, tmp_path)
    assert not (tmp_path / "out" / "hashes.json").exists()


def test_damaged_files_are_errors(tmp_path: Path) -> None:
    weights = saved(build_network, tmp_path)
    short = tmp_path / "short.safetensors"
    short.write_bytes(weights.read_bytes()[:-10])
    index = in_two(load_file(weights), tmp_path / "parts")
    for text, why in (
        ("{", "is not an index of weights"),
        ('{"weight_map": {"embed.weight": "../dense.safetensors"}}', "which is not next to it"),
        ('{"weight_map": []}', "is not an index of weights"),
    ):
        index.write_text(text)
        with pytest.raises(ModelError, match=why):
            WeightFiles(index)
    for path in (short, tmp_path / "absent.safetensors"):
        with pytest.raises(ModelError, match="cannot be read as safetensors"):
            prune(build_network, tmp_path, weights=path)


def test_the_longest_list_of_one_class_is_taken() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.short = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
            self.mixed = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU())
            self.long = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))

    assert find_blocks_in_a_row(Two()) == ("long.0", "long.1", "long.2")


PIPELINE = """
from test_blockwise import RECIPE, batches, build_network as build_model
from deploypipe.task import Splits, classification
def load_data(): return Splits(calib=batches(), train=[], val=batches(1), test=batches(1))
def task(): return classification()
def recipe(): return RECIPE
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "pipe.py").write_text(PIPELINE, encoding="utf-8")
    save_file(own_weights(build_network()), tmp_path / "w.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_calls_the_function(home: Path) -> None:
    done = CliRunner().invoke(
        app, ["blockwise", "./pipe.py", "w.safetensors", "--kept", "0.55", "--channel-multiple", "4"]
    )
    assert done.exit_code == 0, done.output
    expected = prune_blockwise(
        build_network, "w.safetensors", batches(), "expected", RECIPE, kept=0.55, channel_multiple=4
    )
    assert f"{expected.params_before:,} -> {expected.params_after:,}" in done.output
    assert all(f"blocks.{number}: " in done.output for number in range(4))
    files = {file.relative_to("expected"): file.read_bytes() for file in Path("expected").rglob("*") if file.is_file()}
    assert files == {
        file.relative_to("runs/pipe-blockwise"): file.read_bytes()
        for file in Path("runs/pipe-blockwise").rglob("*")
        if file.is_file()
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["w.safetensors", "--kept", "1.5"], ["kept", "1.5", "must be > 0 and < 1"]),
        (["none.safetensors", "--kept", "0.5"], ["none.safetensors"]),
        (["w.safetensors", "--kept", "0.5", "--set", "score.kind=taylor"], ["score.kind", "whole network at once"]),
        (["w.safetensors", "--kept", "0.5", "--block", "blocks.9"], ["blocks.9"]),
    ],
)
def test_wrong_arguments_of_the_command(arguments: list[str], said: list[str], home: Path) -> None:
    done = CliRunner().invoke(app, ["blockwise", "./pipe.py", *arguments])
    assert done.exit_code == 2, (done.output, done.exception)
    (line,) = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert all(text in line for text in said), line
    assert not (home / "runs").exists()
