"""Trained models from their workdirs alone: the config, the tokeniser, the weights."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments import tasks, translators
from experiments.arm import make_program, trial_configs
from experiments.config import Config, Reader, completed, from_json
from experiments.imports import import_modules
from experiments.options import UserError
from experiments.tasks.base import Task
from experiments.tasks.subwords import Subwords
from experiments.training.checkpoints import Damaged, parameters_by_step, trained_parameters
from experiments.translating import Search


def read_config(workdir: pathlib.Path, *, task: str | None = None) -> Config:
    """The config of a run, with its modules imported.

    Raises:
      UserError: the folder holds no run, or one of another task; a module is not found.

    """
    path = workdir / "config.json"
    if not path.exists():
        raise UserError(f"{workdir} holds no run (no config.json): name the --workdir of a run")
    config = from_json(path.read_text())
    if task is not None and config.get("task", {}).get("name") != task:
        found = config.get("task", {}).get("name", "a comparison")
        raise UserError(f"{workdir} must hold a run of {task}, got one of {found}")
    import_modules(config)
    return completed(config)


def chosen_config(workdir: pathlib.Path) -> Config:
    """The run's config under the setting that its pilot chose."""
    config = read_config(workdir)
    tuning = workdir / "tuning.json"
    setting = json.loads(tuning.read_text())["setting"] if tuning.exists() else 0
    return trial_configs(config)[setting]


def load_model(workdir: pathlib.Path, seed: int = 0, average: int = 1) -> tuple[Task, Any]:
    """The task of a run and its trained model.

    Raises:
      UserError: there is no such run or seed, or a checkpoint is damaged.

    """
    program, _ = make_program(chosen_config(workdir))
    template = jax.eval_shape(program.init, np.int32(0), np.float32(0)).params
    return program.task, program.model(_parameters(workdir, seed, template, average)[0])


def _parameters(
    workdir: pathlib.Path, seed: int, template: Any, average: int
) -> tuple[Any, Sequence[int]]:
    try:
        return trained_parameters(workdir, seed, template, average)
    except Damaged as damage:
        raise UserError(f"{damage}: train again from the one before") from damage


@dataclasses.dataclass(frozen=True)
class Translator:
    """A trained model that translates.

    Attributes:
      config: of its run.
      model: a translator with its parameters.
      subwords: text to ids and back.
      steps: the checkpoints whose mean the parameters are.
      workdir: of the run.
      seed: of the run.

    """

    config: Config
    model: Any
    subwords: Subwords
    steps: Sequence[int]
    workdir: pathlib.Path
    seed: int

    @classmethod
    def load(cls, workdir: pathlib.Path, seed: int = 0, average: int = 1) -> "Translator":
        """From a workdir of the task translation.

        Raises:
          UserError: there is no such run or seed, or a checkpoint is damaged.

        """
        read_config(workdir, task="translation")
        config = chosen_config(workdir)
        subwords = Subwords.named(str(workdir / "tokenizer.json"))
        facts = json.loads((workdir / "translator.json").read_text())
        model = translators.build(
            subwords.size, config.rule, Reader(config).model, **facts, rngs=nnx.Rngs(0)
        )
        graph, template = nnx.split(model)
        params, steps = _parameters(workdir, seed, template, average)
        return cls(config, nnx.merge(graph, params), subwords, steps, workdir, seed)

    def search(
        self, beam: int | None = None, alpha: float | None = None, extra: int | None = None
    ) -> Search:
        """The run's way of decoding, with changes."""
        given = {"beam": beam, "alpha": alpha, "extra": extra}
        own = {name: self.config.task[name] for name in given}
        return Search(**own | {name: v for name, v in given.items() if v is not None})

    def split(self, name: str) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        """Sources and references of a split of the run's data."""
        task: Any = tasks.get("translation")(Reader(self.config).task)
        return task.sentences(name)

    def by_step(self) -> Iterator[tuple[int, Any]]:
        """The model at each checkpoint that is kept."""
        graph, template = nnx.split(self.model)
        for step, params in parameters_by_step(self.workdir, self.seed, template).items():
            yield step, nnx.merge(graph, params)
