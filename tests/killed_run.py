"""A run of the tiny pipeline that may be killed at any moment: `killed_run.py WEIGHTS FOLDER`."""

import sys

import tiny_pipeline as tiny
from safetensors.torch import load_file

from deploypipe.pipeline import compress


def main(weights: str, folder: str) -> None:
    model = tiny.Network()
    model.load_state_dict(load_file(weights))
    compress(model.eval(), tiny.load_data(), tiny.task(), tiny.recipe(), tiny.target(), folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
