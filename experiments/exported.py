"""Runs the exported model of this folder; needs jax, numpy and safetensors, nothing else.

    from run import load
    model = load()
    outputs = model(source=ids, length=lengths)

Copied beside every exported model as run.py.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from jax import export
from safetensors.numpy import load_file

HERE = pathlib.Path(__file__).parent


def load(folder: pathlib.Path = HERE) -> Callable[..., dict[str, Any]]:
    """The model as a function of its named inputs, which signature.json lists."""
    program: Any = export.deserialize(bytearray((folder / "model.jax").read_bytes()))
    weights = load_file(folder / "weights.safetensors")
    return lambda **inputs: program.call(weights, inputs)


def main() -> None:
    """Runs the model once on zeros, and prints what came out."""
    signature = json.loads((HERE / "signature.json").read_text())
    zeros = {n: np.zeros(s["shape"], s["dtype"]) for n, s in signature["inputs"].items()}
    for name, array in load()(**zeros).items():
        print(name, array.shape, array.dtype)


if __name__ == "__main__":
    main()
