"""An analysis of trained runs: pages, figures and numbers that agree with each other."""

import json
import pathlib

import numpy as np
import pytest

from attn_jax.analysis import Fit, Replacement, attentions
from experiments.arm import run_arm
from experiments.config import arm_config
from experiments.swaps import Swapper
from experiments.workdirs import load_model
from tests.experiments import commands

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of recall under two rules, two steps long."""
    folder = tmp_path_factory.mktemp("run")
    config = arm_config(
        "recall",
        rule="gaussian(width=4, trainable=True):1, mix(learned, uniform):1",
        model__num_layers=1,
        model__features=16,
        model__num_heads=2,
        task__test_items=64,
        task__validation_items=64,
        training__seeds=2,
        training__learning_rate=(0.01,),
        training__steps=2,
        training__log_every=1,
        training__checkpoint_every=2,
    )
    run_arm(config, folder, lambda *_: None, "a test")
    return folder


@pytest.mark.slow
def test_a_run_is_analysed_from_its_workdir(run):
    ended = commands.run("analyze", [f"--workdir={run}", "--rows=64", "--seed=0", "--seed=1"])
    assert ended.returncode == 0, ended.stderr
    folders = [run / "analysis" / f"seed_{seed}" for seed in (0, 1)]
    seeds = [json.loads((folder / "analysis.json").read_text()) for folder in folders]
    folder, found = folders[0], seeds[0]
    page = (folder / "analysis.md").read_text()
    assert page in ended.stdout
    (layer,) = found["layers"]
    fit = layer["explained"][0]["plain"]
    assert fit["family"] == "gaussian"
    assert fit["share"] > 0.99
    assert fit["scale"] == pytest.approx(4, rel=0.05)
    assert "heads 0 to 0: gaussian width" in layer["learned"][0]
    assert "heads 1 to 1: gate of the first rule" in layer["learned"][1]
    swaps = found["swaps"]
    assert len(swaps["order"]) == 2
    assert f"As trained: {100 * swaps['whole']:.1f}." in page
    for name in ("profiles.svg", "swaps.svg"):
        assert "<svg" in (folder / name).read_text()
    over = (run / "analysis" / "seeds.md").read_text()
    assert over in ended.stdout
    wholes = 100 * np.array([one["swaps"]["whole"] for one in seeds])
    assert f"| 0 | {wholes.mean():.1f} (" in over
    shares = [
        np.nanmean([head["plain"]["share"] for head in one["layers"][0]["explained"]])
        for one in seeds
    ]
    assert f"| {layer['path']} | {np.mean(shares):.3f} (" in over
    assert "| kept of what heads add to the mean, all replaced |" in over.splitlines()[-1]
    assert "- seed 1, " in over
    profile = layer["profile"]
    at_zero = profile["relative"].index(0)
    assert profile["weight"][0][at_zero] == pytest.approx(layer["statistics"]["itself"][0])
    assert "<svg" in (run / "analysis" / "swaps.svg").read_text()


@pytest.mark.slow
def test_a_gaussian_head_loses_nothing_when_it_is_swapped_for_its_kernel(run):
    task, model = load_model(run)
    swapper = Swapper(task, model, batches=1)
    (path,) = attentions(model)
    (width,) = np.exp(attentions(model)[path].groups[0].branches[0].kernels[0].log_width[...])
    own = Fit("gaussian", float(width), 0.0, 0.0, None, np.nan, np.nan)
    silent = {path: Replacement.zero(2).only([0])}
    swapped = {path: Replacement.of([own, own]).only([0])}
    whole = {path: Replacement.zero(2).only([])}
    outputs = [np.asarray(swapper.outputs(some, "test")[0]) for some in (whole, swapped, silent)]
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-4)
    assert np.abs(outputs[2] - outputs[0]).max() > 1e-3
    assert swapper.score(whole, "test") == swapper.larger_is_better(whole, "test")
