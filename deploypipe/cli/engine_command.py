"""Build an engine again on the device that it is for."""

from pathlib import Path
from typing import Annotated

import typer

from deploypipe.cli.app import RELEASE, app
from deploypipe.cli.exit_codes import EXIT_DIFFERENT, exit_codes, say


@app.command(
    rich_help_panel=RELEASE,
    epilog="Exit codes: 0 the same or not run, 1 different, 2 unusable. "
    "Example: deploypipe engine bundles/resnet-jetson_orin_nano-0123456789ab --out engines",
)
def engine(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A bundle, REGISTRY/NAME@ALIAS, or a finished run.")],
    target: Annotated[
        str | None, typer.Argument(metavar="[TARGET]", help="Target to build for. Default: that of DIR.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder in which to write model.engine, its record and its log.")] = Path(
        "engine"
    ),
) -> None:
    """Build the TensorRT engine of DIR again from its ONNX file, for this device, and replay the golden samples on it.

    For a device with another GPU, driver or TensorRT than the one that the engine in DIR was built on. DIR stays as it
    is. If the device is another one (TensorRT-RTX builds ahead of time), the engine is built and not run.
    """
    with exit_codes():
        from deploypipe.cli.terminal import show_table
        from deploypipe.release.rebuilt_engine import rebuild_engine
        from deploypipe.release.registries.registry import is_remote, resolve
        from deploypipe.target_files import load_target

        is_reference = is_remote(folder) or ("@" in folder and not Path(folder).exists())
        path = resolve(folder) if is_reference else Path(folder)
        built = rebuild_engine(path, out, load_target(target) if target else None)
        key, parity = built.engine.key, built.parity
        say(f"{built.path}: {key.library} {key.version} for {', '.join(key.compute_capabilities)}")
        if parity is None:
            say(f"not run: {built.reason}")
            return
        agreement = "-" if parity.top1_agreement is None else f"{parity.top1_agreement:.1%}"
        verdict = "same" if built.is_same else "DIFFERENT"
        row = (built.path.name, f"{parity.max_abs_error:.2g}", f"{built.max_abs_error:.2g}", agreement, verdict)
        show_table(f"Golden samples in {path}", ("file", "max error", "allowed", "top-1", "verdict"), [row])
    if not built.is_same:
        raise typer.Exit(EXIT_DIFFERENT)
