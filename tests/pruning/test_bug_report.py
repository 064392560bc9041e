"""Bug reports: following the README reproduces the reason, and the folder has no data of the owner."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

from deploypipe.cli import app
from deploypipe.errors import ModelError
from deploypipe.networks.fingerprints import model_fingerprint
from deploypipe.pruning.tracing.bug_report import write_reproduction
from deploypipe.pruning.tracing.structures import list_structures

Function = Callable[[Tensor], Tensor]


class Odd(nn.Module):
    """A hidden layer that is read by a given function."""

    def __init__(self, read: Function) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)
        self.register_buffer("scale", torch.full((8,), 1234.5))
        self.read = read

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x + self.second(self.read(F.relu(self.first(x))) * self.scale)


class Network(nn.Module):
    """Three layers in a list, the middle one odd."""

    def __init__(self, read: Function) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
        self.layers = nn.ModuleList([Odd(torch.relu), Odd(read), Odd(torch.relu)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def followed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fresh: nn.Module
) -> str:
    """What the README's program prints; `fresh` is the module that it asks for, if it does."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    program = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert program is not None
    monkeypatch.chdir(folder)
    exec(program[1].replace("module = ...", "module = fresh"), {"fresh": fresh})
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("read", "needs_class"),
    [
        (lambda h: torch.cumsum(h, dim=1), False),
        (lambda h: h.softmax(dim=1), False),
        (lambda h: h.view(-1, 8), None),
        (lambda h: h.softmax(dim=1) if h.sum().item() > 0 else h, True),  # cannot be exported
    ],
    ids=["cumsum", "softmax", "constant-view", "data-dependent"],
)
def test_following_the_readme_reproduces_the_reason(
    read: Function,
    needs_class: bool | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.manual_seed(0)
    model, inputs = Network(read), torch.randn(4, 4)
    before = model_fingerprint(model)
    name = "layers.1.first"
    reason = next(row.reason for row in list_structures(model, inputs).frozen if row.name == name)
    found = write_reproduction(model, inputs, name, tmp_path)
    assert model_fingerprint(model) == before
    assert found.module == "layers.1"
    assert needs_class in (None, found.needs_class)
    printed = followed(tmp_path, monkeypatch, capsys, Odd(read))
    assert found.reason in printed.splitlines()
    assert found.reason.startswith("channels 'first': " + reason.partition(" (in ")[0][:20])
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"{__file__}:" in readme
    assert torch.__version__ in readme


def test_the_report_contains_no_weights_and_no_inputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = Network(lambda h: torch.cumsum(h, dim=1)), torch.randn(4, 4)
    write_reproduction(model, inputs, "layers.1.first", tmp_path)
    program = torch.export.load(tmp_path / "module.pt2")
    odd = model.layers[1]
    own = [t.flatten()[0].item() for t in (*odd.parameters(), *odd.buffers(), model.stem(inputs))]
    stored = [
        *program.state_dict.values(),
        *program.constants.values(),
        *load_file(tmp_path / "inputs.safetensors").values(),
    ]
    assert not any(value in tensor.flatten().tolist() for tensor in stored for value in own)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "inputs.safetensors", "module.pt2"]
    assert str(Path(__file__)).encode() not in (tmp_path / "module.pt2").read_bytes()


def test_a_name_that_is_not_frozen_is_an_error_listing_frozen_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with pytest.raises(ModelError, match=r"'stem' is not frozen .* frozen structures: layers\.1\.first, head"):
        write_reproduction(Network(lambda h: torch.cumsum(h, dim=1)), torch.randn(4, 4), "stem", tmp_path)


def test_the_command_writes_it_for_a_pipeline(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["reproduce", "digits", "linear", "--out", str(tmp_path / "bug")])
    assert result.exit_code == 0, result.output
    assert "reason  channels '': its channels are the network's output" in result.output
    assert (tmp_path / "bug" / "README.md").is_file()
