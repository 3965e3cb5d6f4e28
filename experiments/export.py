"""Exports a trained run: a program of XLA and its weights, which run without Flax and this project.

    python -m experiments.export --workdir=runs/de-en --output=exported

The output folder holds model.jax (by `jax.export`, for CPU, CUDA and TPU), weights.safetensors,
signature.json (names, shapes and dtypes of what goes in and comes out), run.py, which loads them
and is all that a user has to copy, and for a translator tokenizer.json.
"""

import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import flags
from flax import nnx
from safetensors.numpy import save_file

from experiments import cli
from experiments.config import write_atomically
from experiments.options import UserError
from experiments.training.checkpoints import by_name
from experiments.translating import decoded
from experiments.workdirs import Translator, load_model, read_config

_WORKDIR = flags.DEFINE_string("workdir", None, "of the run that trained the model")
_OUTPUT = flags.DEFINE_string("output", None, "folder of the exported model; made if need be")
_SEED = flags.DEFINE_integer("seed", 0, "which seed of the run", lower_bound=0)
_AVERAGE = flags.DEFINE_integer("average", 1, "take the mean of the last so many checkpoints", 1)
_BATCH = flags.DEFINE_integer("batch_size", 1, "examples of a call", lower_bound=1)
_LENGTH = flags.DEFINE_integer("source_length", 64, "translators: most source tokens", 2)

PLATFORMS = ("cpu", "cuda", "tpu")
LOADER = pathlib.Path(__file__).with_name("exported.py")


def main() -> None:
    """Writes the folder of --output."""
    if not _WORKDIR.value or not _OUTPUT.value:
        raise UserError("--workdir=DIR of a run and --output=DIR for the exported model are needed")
    workdir, output = pathlib.Path(_WORKDIR.value), pathlib.Path(_OUTPUT.value)
    config = read_config(workdir)
    output.mkdir(parents=True, exist_ok=True)
    if config.task.name == "translation":
        translator = Translator.load(workdir, _SEED.value, _AVERAGE.value)
        function, inputs = _translation(translator)
        model = translator.model
        shutil.copy(workdir / "tokenizer.json", output / "tokenizer.json")
    else:
        task, model = load_model(workdir, _SEED.value, _AVERAGE.value)
        batch = task.evaluation("validation")[0]
        inputs = {name: _first(array) for name, array in batch.items()}
        function = _outputs
    export(function, model, inputs, output)
    size = sum(file.stat().st_size for file in output.iterdir())
    print(f"wrote {output} ({size / 1e6:.1f} MB): python {output / 'run.py'} runs it once")


def _outputs(model: Any, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"outputs": model(inputs)}


def _first(array: np.ndarray) -> np.ndarray:
    """So many rows of a batch, which say what an input looks like."""
    return np.resize(array, (_BATCH.value, *array.shape[1:]))


def _translation(translator: Translator) -> tuple[Any, Mapping[str, np.ndarray]]:
    search, length = translator.search(), _LENGTH.value
    steps = length + search.extra

    def function(model: Any, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        found = decoded(model, inputs["source"], inputs["length"], search, steps)
        return found._asdict()

    rows = _BATCH.value
    source = np.full((rows, length), 2, np.int32)
    return function, {"source": source, "length": np.ones(rows, np.int32)}


def export(
    function: Any, model: nnx.Module, inputs: Mapping[str, np.ndarray], output: pathlib.Path
) -> None:
    """Writes a function of a model and named inputs, with its weights apart.

    Args:
      function: (model, inputs by name) -> outputs by name.
      model: with its parameters.
      inputs: examples, for shapes and dtypes.
      output: a folder.

    """
    graph, params = nnx.split(model)
    names, structure = by_name(params), jax.tree.structure(params)
    weights = {name: np.asarray(leaf) for name, leaf in names.items()}

    def apply(weights: Mapping[str, Any], inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        leaves = [weights[name] for name in names]
        return function(nnx.merge(graph, jax.tree.unflatten(structure, leaves)), inputs)

    exported = jax.export.export(jax.jit(apply), platforms=PLATFORMS)(weights, dict(inputs))
    outputs = jax.eval_shape(apply, weights, dict(inputs))
    (output / "model.jax").write_bytes(bytes(exported.serialize()))
    save_file(weights, output / "weights.safetensors")
    signature = {"inputs": _described(inputs), "outputs": _described(outputs)}
    write_atomically(output / "signature.json", json.dumps(signature, indent=2) + "\n")
    shutil.copy(LOADER, output / "run.py")


def _described(arrays: Mapping[str, Any]) -> Mapping[str, Any]:
    return {n: {"shape": list(a.shape), "dtype": str(a.dtype)} for n, a in arrays.items()}


if __name__ == "__main__":
    cli.run(main)
