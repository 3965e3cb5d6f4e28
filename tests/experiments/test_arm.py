"""An arm whose later seeds diverge keeps the earlier ones, and stops where none is left."""

import numpy as np
import pytest

from experiments import arm
from experiments.comparison import task_config
from experiments.config import override
from experiments.training.loop import Diverged


def config(seeds):
    small = task_config("recall", "")
    for key, value in {
        "training.seeds": seeds,
        "training.steps": 4,
        "training.learning_rate": (0.01,),
        "training.log_every": 2,
        "training.checkpoint_every": 2,
        "task.test_items": 8,
        "task.validation_items": 8,
    }.items():
        override(small, key, value)
    return small


def quiet(*_):
    pass


@pytest.fixture
def losing(monkeypatch):
    """Makes all lanes of a phase with one of the named seeds diverge at step 1."""
    run_phase, lost = arm.run_phase, set()

    def run(compiled, phase, *rest):
        lanes, seconds = run_phase(compiled, phase, *rest)
        if lost & set(phase.seeds):
            steps = np.full(len(phase.seeds), 1, np.int32)
            raise Diverged("all of them", lanes._replace(diverged=steps))
        return lanes, seconds

    monkeypatch.setattr(arm, "run_phase", run)
    return lost


@pytest.mark.slow
def test_new_seeds_that_diverge_leave_the_old_ones(tmp_path, losing):
    first = arm.run_arm(config(1), tmp_path, quiet, "test")
    losing.update((1, 2))
    result = arm.run_arm(config(3), tmp_path, quiet, "test")
    assert result["per_seed"][0] == first["per_seed"][0]
    assert result["diverged"] == [{"seed": 1, "step": 1}, {"seed": 2, "step": 1}]
    assert result["stopped"] is None


@pytest.mark.slow
def test_an_arm_stops_when_no_seed_is_left(tmp_path, losing):
    losing.add(0)
    with pytest.raises(Diverged, match="every seed diverged, the last at step 1"):
        arm.run_arm(config(1), tmp_path, quiet, "test")
    assert arm.finished(tmp_path, config(1))["per_seed"] == [None]


@pytest.mark.slow
def test_a_question_about_a_run_writes_nothing(tmp_path):
    arm.run_arm(config(1), tmp_path, quiet, "test")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert arm.finished(tmp_path, config(2)) is None
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.slow
def test_the_headline_leaves_out_what_no_training_has(tmp_path):
    small = task_config("pronouns", "")
    for key, value in {
        "training.seeds": 1,
        "training.steps": 2,
        "training.learning_rate": (0.001,),
        "training.log_every": 1,
        "training.checkpoint_every": 1,
        "task.test_items": 60,
        "task.validation_items": 20,
    }.items():
        override(small, key, value)
    arm.run_arm(small, tmp_path, quiet, "test")
    with np.load(tmp_path / "scores.npz") as scores:
        far = scores["distance"] > 32
        assert far.any()
        assert (scores["weights"][far] == 0).all()
        assert (scores["weights"][~far] == 1).all()
        assert (scores["shown"] == 1).all()
