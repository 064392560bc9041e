"""The command `init`: a new pipeline and a new target, from a template."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from deploypipe.cli.app import COMPRESS, app
from deploypipe.cli.exit_codes import exit_codes, say
from deploypipe.errors import ConfigError


class Kind(StrEnum):
    """Where the network comes from."""

    TORCH = "torch"
    HUGGINGFACE = "huggingface"
    TIMM = "timm"


# The line of a template that names the model; torch's has none.
_MODEL_LINES = {Kind.HUGGINGFACE: 'CHECKPOINT = ""', Kind.TIMM: 'MODEL = "resnet18"'}


@app.command(
    rich_help_panel=COMPRESS,
    epilog="Examples: deploypipe init my_model && deploypipe check my_model; "
    "deploypipe init my_text distilbert/distilbert-base-uncased-finetuned-sst-2-english --from huggingface",
)
def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the new pipeline, a Python identifier.")],
    model: Annotated[
        str,
        typer.Argument(
            metavar="[MODEL]",
            help="With --from huggingface: a checkpoint, a folder or a name on the Hub. With --from timm: one of "
            "`timm.list_models()`. Default: a small network that is trained on toy data.",
        ),
    ] = "",
    kind: Annotated[
        Kind,
        typer.Option("--from", help="What the network is: your own torch.nn.Module, or one of transformers or timm."),
    ] = Kind.TORCH,
) -> None:
    """Write a commented pipeline (pipelines/NAME.py) and target (targets/NAME.toml) that run as they are.

    Both say where your checkpoint, your data and your device's limits go. Try each change with `deploypipe check`.
    """
    with exit_codes():
        from deploypipe.cli.arguments import require_name
        from deploypipe.files.atomic import write_atomically

        if not name.isidentifier():
            raise ConfigError("init", name, "is not a Python identifier", "use letters, digits and underscores")
        require_name(name, "init")
        texts = {
            Path("pipelines") / f"{name}.py": _pipeline_text(kind, model),
            Path("targets") / f"{name}.toml": _template("target.toml"),
        }
        for path in texts:
            if path.exists():
                raise ConfigError(str(path), "", "exists already", "choose another name, or move the file away")
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text.encode())
            say(path)
        say(f"After each change, try it in seconds: deploypipe check {name} {name}")
        say(f"Then compress it: deploypipe run {name} {name}")


def _pipeline_text(kind: Kind, model: str) -> str:
    text = _template(f"{kind}.py.txt")
    if not model:
        return text
    if kind not in _MODEL_LINES:
        raise ConfigError("init", model, "--from torch takes no model", "put your network into the file")
    line = _MODEL_LINES[kind]
    assert line in text
    return text.replace(line, f'{line.partition(" = ")[0]} = "{_plain(model)}"', 1)


def _plain(model: str) -> str:
    """The model's name, which becomes code: ConfigError if it could be anything but a name or a path."""
    if any(character in "\"'\\" or not character.isprintable() for character in model):
        raise ConfigError("init", model, "is not the name of a model", "leave out quotes and backslashes")
    return model


def _template(name: str) -> str:
    from importlib import resources

    return (resources.files("deploypipe") / "templates" / name).read_text(encoding="utf-8")
