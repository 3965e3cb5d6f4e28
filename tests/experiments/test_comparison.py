"""Comparisons: every size can start, overrides reach their task, workers that fail stop all."""

import multiprocessing
import operator
import pathlib
import time

import pytest

from attn_jax.rules import parse
from configs.compare import SIZES, get_config
from experiments.arm import make_program, trial_configs
from experiments.arms import ARMS, arm_rule, arm_trials
from experiments.cells import _in_workers
from experiments.comparison import comparison_cells
from experiments.config import comparison_config
from experiments.imports import import_modules
from experiments.options import UserError


@pytest.mark.slow
@pytest.mark.parametrize("size", ["quick", "full"])
def test_cells_of_every_size_can_start(size):
    """Every task, every arm, and every one of its settings, though not with each other."""
    cells = comparison_cells(get_config(size), pathlib.Path("runs"))
    some = cells[:: 4 if len(cells) > 9 else 1]
    for part in ("task.name", "label"):
        read = operator.attrgetter(part)
        assert {read(cell.config) for cell in some} == {read(cell.config) for cell in cells}
    for index, cell in enumerate(some):
        trials = trial_configs(cell.config)
        assert make_program(trials[index % len(trials)]), cell.name


@pytest.mark.parametrize("size", sorted(set(SIZES) - {"quick", "full"}))
def test_every_cell_of_a_study_has_a_config_and_a_place_of_its_own(size):
    found = comparison_cells(get_config(size), pathlib.Path("runs"))
    assert len({cell.workdir for cell in found}) == len(found)
    for cell in found:
        import_modules(cell.config)
        if cell.config.rule != "none":
            parse(cell.config.rule.partition(";")[0], cell.config.model.num_heads)


def test_a_task_may_have_arms_of_its_own():
    cells = comparison_cells(get_config("study"), pathlib.Path("runs"))
    assert [cell.config.label for cell in cells] == list(SIZES["study"]["arms"])
    assert len({cell.workdir for cell in cells}) == 4
    last = cells[-1].config
    assert last.rule == "gaussian(offset=(-1, 1))"
    assert last.model.decoder_rule == "gaussian(offset=(-1, 0))"
    first, second = last.model.cross_rule.split(";")
    assert "learned" not in first
    assert "learned:1" in second


def test_budget_and_overrides_change_an_arm_of_a_tasks_own():
    config = get_config("recurrent")
    config.budget, config.overrides = 0.1, ("translation.task.row=48",)
    cells = comparison_cells(config, pathlib.Path("runs"))
    assert [cell.config.training.steps for cell in cells] == [200, 315]
    assert {cell.config.task.row for cell in cells} == {48}


@pytest.mark.parametrize("label", ARMS)
@pytest.mark.parametrize("causal", [True, False])
def test_every_arm_has_equally_many_settings_and_no_future_in_a_causal_task(label, causal):
    where = {"num_heads": 4, "causal": causal, "cross": False}
    assert len(arm_trials(label, **where)) == 3
    assert not (causal and "offset=(-1, 1" in arm_rule(label, **where))


def cells(**options):
    return comparison_cells(comparison_config(tasks=("recall",), **options), pathlib.Path("runs"))


def test_an_override_reaches_its_task():
    config = cells(arms=("learned",), overrides=("recall.task.slots=4", "recall.task.queries=4"))
    assert config[0].config.task.slots == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("recal.task.slots=4", "is for no task of this comparison: recall"),
        ("recall.rule=uniform", "the arms of a comparison set rule themselves"),
        ("recall.task.slot=4", r"did you mean 'task\.slots'"),
        ("slots", r"must read TASK\.key=value"),
    ],
)
def test_an_override_that_would_do_nothing_is_refused(override, message):
    with pytest.raises(UserError, match=message):
        cells(arms=("learned",), overrides=(override,))


def fail_or_sleep(seconds):
    if not seconds:
        raise UserError("no such data")
    time.sleep(seconds)


@pytest.mark.slow
def test_a_worker_that_fails_stops_the_others_with_its_own_error():
    start = time.monotonic()
    with pytest.raises(UserError, match="no such data"):
        list(_in_workers(fail_or_sleep, {"sleeps": (120,), "fails": (0,)}, 2))
    assert time.monotonic() - start < 100
    assert not multiprocessing.active_children()
