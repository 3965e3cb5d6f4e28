"""Numbers that are printed recompute from each other; pages and pictures are written."""

import pathlib
import re

import numpy as np
import pytest

from experiments.arm import run_arm
from experiments.comparison import comparison_cells
from experiments.config import claim_workdir, comparison_config
from tests.experiments import commands

ROOT = pathlib.Path(__file__).parents[2]


def explain(*arguments):
    return commands.run("explain", arguments)


def columns(stdout):
    """The table: by side a mapping from a column's name to its numbers, and the sums below."""
    lines = [line for line in stdout.splitlines() if "┃" in line or "│" in line]
    sides, names = ([c.strip() for c in line.split("┃")][1:] for line in lines[:2])
    body = [[c.strip() for c in line.split("│")] for line in lines[2:]]
    found, side = {}, ""
    for index, name in enumerate(names):
        side = sides[index] or side
        cells = [row[index + 1] for row in body]
        numbers = [-np.inf if c == "masked" else float(c) for c in cells[:-1]]
        found.setdefault(side, {})[name] = (np.asarray(numbers), cells[-1])
    return found


def check(side):
    """Each column follows from those before it, within what four digits hold."""
    total = 0
    for name, (numbers, _) in side.items():
        if name.startswith("x "):
            product = float(name[2:]) * side["q k"][0]
            np.testing.assert_allclose(numbers, product, rtol=1e-3, atol=1e-3)
            total = total + numbers
        elif name.startswith(("log w(r)", "v tanh")):
            total = total + numbers
    logits = side["logit"][0]
    seen = np.isfinite(logits)
    np.testing.assert_allclose(logits[seen], np.broadcast_to(total, logits.shape)[seen], atol=1e-3)
    weights = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(side["weight"][0], weights, atol=2e-4)
    for entry in range(3):
        values, below = side[f"value {entry}"]
        assert float(below) == pytest.approx((side["weight"][0] * values).sum(), abs=2e-3)


@pytest.mark.slow
def test_rules_alone(tmp_path):
    ended = explain(
        "--rule=learned",
        "--rule=learned * gaussian(width=2)",
        f"--workdir={tmp_path}",
        "--text=Tommy can be annoying but he is a good dog.",
        "--query=he",
        "--head=1",
    )
    assert ended.returncode == 0, ended.stderr
    sides = columns(ended.stdout)
    assert list(sides) == ["learned", "learned * gaussian(width=2)"]
    for side in sides.values():
        check(side)
    r = np.arange(10) - 5
    np.testing.assert_allclose(
        sides["learned * gaussian(width=2)"]["log w(r)"][0], -((r / 2) ** 2) / 2, atol=1e-4
    )
    assert "head 1: what 'he' (position 5) looks at" in ended.stdout
    assert "annoying" in (tmp_path / "viewer.html").read_text()
    assert "annoying" in (tmp_path / "steps_1.svg").read_text()


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """A comparison of recall, three arms of a few steps."""
    folder = tmp_path_factory.mktemp("comparison")
    config = comparison_config(
        tasks=("recall",),
        arms=("learned", "gaussian", "table"),
        seeds=1,
        learning_rate=(0.01,),
        overrides=(
            "recall.training.steps=2",
            "recall.training.log_every=1",
            "recall.training.checkpoint_every=2",
            "recall.model.num_layers=2",
            "recall.model.features=16",
            "recall.task.test_items=8",
            "recall.task.validation_items=8",
        ),
    )
    claim_workdir(folder, config)
    for cell in comparison_cells(config, folder):
        run_arm(cell.config, cell.workdir, lambda *_: None, "a test")
    return folder


@pytest.mark.slow
def test_two_arms_of_a_comparison(comparison):
    ended = explain(f"--workdir={comparison}", "--attention=encoder/layers/1/attention")
    assert ended.returncode == 0, ended.stderr
    sides = columns(ended.stdout)
    assert list(sides) == ["learned", "gaussian"]
    for side in sides.values():
        check(side)
    assert re.search(r"words: .*k\d+=v\d+.*k\d+\?", ended.stdout)
    page = (comparison / "viewer.html").read_text()
    assert page.count('"part": "encoder attention"') == 4


@pytest.mark.slow
def test_bad_input_ends_with_one_sentence(comparison, tmp_path):
    for arguments, sentence in (
        ((f"--workdir={tmp_path / 'none'}",), "holds no run (no config.json)"),
        ((f"--workdir={comparison}", "--rule=gausian"), "it has learned, gaussian, table"),
        ((f"--workdir={comparison}", "--text=a b"), "recall has no words to read"),
        ((f"--workdir={comparison}", "--query=dog"), "--query must be a word of the text"),
        ((f"--workdir={comparison}", "--num_heads=2"), "--num_heads would do nothing"),
        ((f"--workdir={tmp_path}", "--rule=gausian", "--text=a b"), "did you mean 'gaussian'"),
    ):
        ended = explain(*arguments)
        assert ended.returncode == 2
        assert sentence in ended.stderr
        assert len(ended.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "none").exists()
