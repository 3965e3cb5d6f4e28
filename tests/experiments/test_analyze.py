"""An analysis of trained runs: pages, figures and numbers that agree with each other."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

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
        rule="gaussian(width=(1, 4), trainable=True):2, mix(learned, uniform):2",
        model__num_layers=1,
        model__features=16,
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
    command = [sys.executable, "-m", "experiments.analyze", f"--workdir={run}", "--rows=200"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    folder = run / "analysis" / "seed_0"
    page = (folder / "analysis.md").read_text()
    assert page in ended.stdout
    found = json.loads((folder / "analysis.json").read_text())
    (layer,) = found["layers"]
    for head, width in ((0, 1), (1, 4)):
        fit = layer["explained"][head]["plain"]
        assert fit["family"] == "gaussian"
        assert fit["share"] > 0.99
        assert fit["scale"] == pytest.approx(width, rel=0.05)
    assert "heads 0 to 1: gaussian width" in layer["learned"][0]
    assert "heads 2 to 3: gate of the first rule" in layer["learned"][1]
    swaps = found["swaps"]
    assert len(swaps["order"]) == 4
    assert f"As trained: {swaps['whole']:.4f}" in page
    for name in ("profiles.svg", "swaps.svg"):
        assert "<svg" in (folder / name).read_text()


@pytest.mark.slow
def test_a_gaussian_head_loses_nothing_when_it_is_swapped_for_its_kernel(run):
    task, model = load_model(run)
    layers = analysing.analyse(task, model, batches=1, count=200)
    swapper = analysing.Swapper(task, model, batches=1)
    kinds = analysing.replacements(layers)
    (path,) = (layer.path for layer in layers)
    none = {path: kinds["fitted kernels"][path].only([])}
    gaussian = {path: kinds["fitted kernels"][path].only([0, 1])}
    outputs = [np.asarray(swapper.outputs(some, "test")[0]) for some in (none, gaussian)]
    np.testing.assert_allclose(*outputs, atol=1e-3)
    silent = np.asarray(swapper.outputs({path: kinds["zero"][path].only([0, 1])}, "test")[0])
    assert np.abs(silent - outputs[0]).max() > 1e-3
