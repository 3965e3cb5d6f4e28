"""An analysis of trained runs: pages, figures and numbers that agree with each other."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from attn_jax.analysis import Fit, Replacement, attentions
from experiments import analysing
from experiments.arm import run_arm
from experiments.config import arm_config
from experiments.workdirs import load_model

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of recall under two rules, a few steps long."""
    folder = tmp_path_factory.mktemp("run")
    config = arm_config(
        "recall",
        rule="gaussian(width=4, trainable=True):1, mix(learned, uniform):1",
        model__num_layers=1,
        model__features=16,
        model__num_heads=2,
        task__test_items=64,
        task__validation_items=64,
        training__seeds=1,
        training__learning_rate=(0.01,),
        training__steps=2,
        training__log_every=1,
        training__checkpoint_every=2,
    )
    run_arm(config, folder, lambda *_: None, "a test")
    return folder


@pytest.mark.slow
def test_a_run_is_analysed_from_its_workdir(run):
    command = [sys.executable, "-m", "experiments.analyze", f"--workdir={run}", "--rows=64"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    folder = run / "analysis" / "seed_0"
    page = (folder / "analysis.md").read_text()
    assert page in ended.stdout
    found = json.loads((folder / "analysis.json").read_text())
    (layer,) = found["layers"]
    fit = layer["explained"][0]["plain"]
    assert fit["family"] == "gaussian"
    assert fit["share"] > 0.99
    assert fit["scale"] == pytest.approx(4, rel=0.05)
    assert "heads 0 to 0: gaussian width" in layer["learned"][0]
    assert "heads 1 to 1: gate of the first rule" in layer["learned"][1]
    swaps = found["swaps"]
    assert len(swaps["order"]) == 2
    assert f"As trained: {swaps['whole']:.4f}" in page
    for name in ("profiles.svg", "swaps.svg"):
        assert "<svg" in (folder / name).read_text()


@pytest.mark.slow
def test_a_gaussian_head_loses_nothing_when_it_is_swapped_for_its_kernel(run):
    task, model = load_model(run)
    swapper = analysing.Swapper(task, model, batches=1)
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
