"""Train a pipeline's own network once, and keep its weights in a cache folder."""

import os
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


def trained_once(name: str, train: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Load the state dict `name` from $DEPLOYPIPE_CACHE or ~/.cache/deploypipe; train and save it if it is absent."""
    cache = Path(os.environ.get("DEPLOYPIPE_CACHE") or Path.home() / ".cache" / "deploypipe")
    path = cache / f"{name}.safetensors"
    if not path.is_file():
        state = train()
        cache.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")  # a killed process must not leave a file that looks complete
        save_file(state, part)
        part.replace(path)
    return load_file(path)
