import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from experiments.options import UserError
from experiments.training.checkpoints import parameters_by_step, trained_parameters
from experiments.training.lanes import NEVER, Program
from experiments.training.loop import Compiled, Data, Diverged, Patience, Phase, run_phase
from experiments.training.metrics import read
from experiments.training.optimizer import make_optimizer
from tests.experiments.toy import Linear, Toy

OPTIONS = types.SimpleNamespace(
    schedule="constant",
    warmup_fraction=0.0,
    clip_norm=0.0,
    beta1=0.9,
    beta2=0.98,
    epsilon=1e-9,
    weight_decay=0.0,
)
CONFIG = {"rule": "none"}


def program(**bad) -> Program:
    return Program(Toy(None, **bad), Linear, make_optimizer(OPTIONS), label_smoothing=0.0)


def phase(seeds=(0, 1), rates=(0.05, 0.05), steps=100, name="main-0-1") -> Phase:
    return Phase(name, seeds, rates, steps, log_every=10, evaluate_every=50, checkpoint_every=20)


def quiet(*_) -> None:
    pass


class Killed(BaseException):
    pass


def killer(at: int):
    def progress(name, done, total):
        if done >= at:
            raise Killed

    return progress


def leaves(lanes) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(lanes)]


@pytest.mark.slow
def test_training_finds_the_weights(tmp_path):
    compiled = Compiled(program())
    lanes, _ = run_phase(compiled, phase(steps=300), tmp_path, CONFIG, quiet)
    kernel = np.asarray(lanes.params["kernel"][...])
    # Adam at a constant rate of 0.05 ends within about a rate of the optimum
    np.testing.assert_allclose(kernel, np.tile([[1.0, 2.0, 3.0]], (2, 1)), atol=0.1)
    assert (np.asarray(lanes.diverged) == NEVER).all()


@pytest.mark.slow
def test_a_resumed_run_ends_in_the_same_bits(tmp_path):
    whole, _ = run_phase(Compiled(program()), phase(), tmp_path / "whole", CONFIG, quiet)
    with pytest.raises(Killed):
        run_phase(Compiled(program()), phase(), tmp_path / "cut", CONFIG, killer(at=50))
    resumed, _ = run_phase(Compiled(program()), phase(), tmp_path / "cut", CONFIG, quiet)
    for a, b in zip(leaves(whole), leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    assert read(tmp_path / "whole") == read(tmp_path / "cut")


def test_a_line_of_metrics_cut_short_is_left_out(tmp_path):
    run_phase(Compiled(program()), phase(steps=20), tmp_path, CONFIG, quiet)
    lines = read(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "main-0-1", "st')
    assert read(tmp_path) == lines
    assert {line["split"] for line in lines} == {"train", "validation"}
    json.dumps(lines, allow_nan=False)


@pytest.mark.slow
def test_a_lane_is_the_same_in_any_company(tmp_path):
    together, _ = run_phase(Compiled(program()), phase(steps=40), tmp_path / "a", CONFIG, quiet)
    alone = phase(seeds=(1,), rates=(0.05,), steps=40, name="main-1-1")
    alone, _ = run_phase(Compiled(program()), alone, tmp_path / "b", CONFIG, quiet)
    # the same sums in another order of vector lanes: a few units in the last place a step
    np.testing.assert_allclose(
        together.params["kernel"][1], alone.params["kernel"][0], rtol=1e-5, atol=1e-6
    )


@pytest.mark.slow
def test_a_diverged_lane_freezes_and_the_others_go_on(tmp_path):
    bad_from = 30
    seeds = phase((0, 1))
    before, _ = run_phase(
        Compiled(program()), phase((0, 1), steps=bad_from), tmp_path / "a", CONFIG, quiet
    )
    broken = Compiled(program(bad_seed=1, bad_from=bad_from))
    lanes, _ = run_phase(broken, seeds, tmp_path / "b", CONFIG, quiet)
    whole, _ = run_phase(Compiled(program()), seeds, tmp_path / "c", CONFIG, quiet)
    assert np.asarray(lanes.diverged).tolist() == [NEVER, bad_from]
    kernels = [np.asarray(one.params["kernel"][...]) for one in (lanes, before, whole)]
    np.testing.assert_array_equal(kernels[0][1], kernels[1][1])
    np.testing.assert_array_equal(kernels[0][0], kernels[2][0])


def test_a_run_stops_when_all_lanes_have_diverged_and_names_the_step(tmp_path):
    rates = (float("nan"), float("nan"))
    with pytest.raises(Diverged, match="every lane of main-0-1 diverged, the last at step 1:"):
        run_phase(Compiled(program()), phase((0, 1), rates), tmp_path, CONFIG, quiet)


def test_lanes_of_one_seed_see_the_same_batches():
    batch = Data(program(), (3, 3, 4)).next()
    np.testing.assert_array_equal(batch["x"][0], batch["x"][1])
    assert (batch["x"][0] != batch["x"][2]).any()


def test_padding_is_left_out_of_scores():
    compiled = Compiled(program())
    lanes = compiled.program.init_lanes((0, 1), (0.1, 0.1))
    values, weights = compiled.evaluate(lanes.params, "test")
    assert values.shape == (2, 20)
    mean = compiled.program.task.metric.mean(values, weights)
    np.testing.assert_allclose(mean, values.mean(1))


def test_steps_between_checkpoints_must_be_a_multiple_of_those_between_logs():
    with pytest.raises(UserError, match=r"multiple of training\.log_every \(10\), got 25"):
        Phase("p", (0,), (0.1,), 10, log_every=10, evaluate_every=10, checkpoint_every=25)


def _largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "changed", "emptied"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(damage, tmp_path, capsys):
    whole, _ = run_phase(Compiled(program()), phase(), tmp_path / "whole", CONFIG, quiet)
    with pytest.raises(Killed):
        run_phase(Compiled(program()), phase(), tmp_path / "cut", CONFIG, killer(at=70))
    newest = tmp_path / "cut" / "checkpoints" / "main-0-1" / "60"
    file = _largest_file(newest / "lanes")
    data = bytearray(file.read_bytes())
    if damage == "changed":
        data[len(data) // 2] ^= 255
    file.write_bytes({"cut": data[: len(data) // 2], "changed": data, "emptied": b""}[damage])
    resumed, _ = run_phase(Compiled(program()), phase(), tmp_path / "cut", CONFIG, quiet)
    said = capsys.readouterr().err
    assert f"{newest} " in said
    assert "going on from the one before" in said
    for a, b in zip(leaves(whole), leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    assert read(tmp_path / "whole") == read(tmp_path / "cut")


@pytest.mark.slow
def test_the_mean_of_the_last_checkpoints(tmp_path):
    one = dataclasses.replace(phase(), checkpoints=3)
    lanes, _ = run_phase(Compiled(program()), one, tmp_path, CONFIG, quiet)
    template = jax.tree.map(lambda leaf: leaf[1], lanes.params)
    by_step = parameters_by_step(tmp_path, 1, template)
    assert list(by_step) == [60, 80, 100]
    mean, steps = trained_parameters(tmp_path, 1, template, average=3)
    assert steps == [60, 80, 100]
    kernels = [np.asarray(params["kernel"][...]) for params in by_step.values()]
    np.testing.assert_allclose(mean["kernel"][...], np.mean(kernels, 0), rtol=1e-6)
    last, _ = trained_parameters(tmp_path, 1, template)
    np.testing.assert_array_equal(last["kernel"][...], lanes.params["kernel"][...][1])
    with pytest.raises(UserError, match="holds 3 checkpoints, 4 were asked for"):
        trained_parameters(tmp_path, 1, template, average=4)


def test_a_run_stops_where_validation_no_longer_gets_better_and_stays_stopped(tmp_path):
    one = dataclasses.replace(phase(rates=(0.0, 0.0)), evaluate_every=10, patience=3)
    run_phase(Compiled(program()), one, tmp_path, CONFIG, quiet)
    # the first score is the best, three more are no better
    steps = [line["step"] for line in read(tmp_path) if line["split"] == "validation"]
    assert max(steps) == 40
    before = read(tmp_path)
    run_phase(Compiled(program()), one, tmp_path, CONFIG, quiet)
    assert read(tmp_path) == before


def test_a_lane_that_gets_better_keeps_all_going():
    patience = Patience(2, higher_is_better=False)
    for scores in ([1.0, 1.0], [1.0, 0.9], [2.0, float("nan")], [1.0, 0.95]):
        assert not patience.is_over
        patience.see(scores)
    assert patience.is_over
    again = Patience(2, higher_is_better=False)
    again.restore(json.loads(json.dumps(patience.state())))
    assert again.is_over


@pytest.mark.slow
def test_a_warm_start_begins_with_the_parameters_of_another_run(tmp_path, capsys):
    trained, _ = run_phase(Compiled(program()), phase(), tmp_path / "first", CONFIG, quiet)
    one = dataclasses.replace(
        phase(seeds=(1, 5), rates=(0.0, 0.0), steps=10), warm_start=str(tmp_path / "first")
    )
    lanes, _ = run_phase(Compiled(program()), one, tmp_path / "second", CONFIG, quiet)
    kernel = np.asarray(trained.params["kernel"][...])
    # seed 1 goes on from itself, seed 5 from the first one
    np.testing.assert_array_equal(lanes.params["kernel"][...], kernel[[1, 0]])
    assert "1 of 1 parameters from" in capsys.readouterr().err
    bad = dataclasses.replace(one, warm_start=str(tmp_path))
    with pytest.raises(UserError, match="holds no checkpoint of seed 0"):
        run_phase(Compiled(program()), bad, tmp_path / "third", CONFIG, quiet)


@pytest.mark.slow
def test_a_profile_is_written(tmp_path):
    run_phase(Compiled(program()), phase(steps=10), tmp_path, CONFIG, quiet, profile=2)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
