"""A run killed at any moment and started again ends as if it had never been killed."""

import json
import pathlib
import random
import time

import numpy as np
import pytest

from tests.experiments import commands

ROOT = pathlib.Path(__file__).parents[2]
ARGUMENTS = (
    "--config=configs/recall.py",
    "--config.model.num_layers=1",
    "--config.training.steps=32",
    "--config.training.seeds=2",
    "--config.training.learning_rate=(0.003, 0.01)",
    "--config.training.pilot_fraction=0.25",
    "--config.training.log_every=4",
    "--config.training.evaluate_every=16",
    "--config.training.checkpoint_every=4",
    "--config.task.test_items=200",
    "--config.task.validation_items=200",
)
LINES_OF_A_WHOLE_RUN = 2 * (2 + 1) + 2 * (8 + 2)


def run(workdir: pathlib.Path) -> int:
    return commands.run("train", [*ARGUMENTS, f"--workdir={workdir}"]).returncode


def lines(workdir: pathlib.Path) -> int:
    path = workdir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def kill_after(workdir: pathlib.Path, count: int) -> None:
    process = commands.start("train", [*ARGUMENTS, f"--workdir={workdir}"])
    while lines(workdir) < count and process.is_alive():
        time.sleep(0.005)
    process.kill()  # SIGKILL
    process.join()
    assert not (workdir / "result.json").exists(), "the run was over before it could be killed"


@pytest.mark.slow
def test_sigkill_changes_nothing(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(whole) == 0
    assert lines(whole) == LINES_OF_A_WHOLE_RUN
    count = random.randrange(1, LINES_OF_A_WHOLE_RUN - 4)
    print(f"killing after {count} lines of metrics")
    kill_after(killed, count)
    assert run(killed) == 0
    a, b = (json.loads((w / "result.json").read_text()) for w in (whole, killed))
    assert a["per_seed"] == b["per_seed"]
    assert a["tuning"] == b["tuning"]
    for seed in (0, 1):
        x, y = (np.load(w / "seeds" / f"{seed}.npz")["values"] for w in (whole, killed))
        np.testing.assert_array_equal(x, y)
    assert (whole / "metrics.jsonl").read_text() == (killed / "metrics.jsonl").read_text()
