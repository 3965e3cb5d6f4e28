"""A user's own kernel, task and model, by import path in a flag: the example of README.md."""

import json
import pathlib
import re
import shlex
import sys

import pytest

from attn_jax import kernels
from experiments import tasks
from experiments.arm import make_program
from experiments.arms import arm_rule, arm_trials
from experiments.cells import _in_workers
from experiments.cli import with_own_task
from experiments.comparison import comparison_cells, split_variant, task_config
from experiments.config import (
    claim_workdir,
    comparison_config,
    default_workdir,
    from_json,
    leaves,
    override,
    to_json,
)
from experiments.imports import import_module
from experiments.options import UserError
from experiments.training.cost import parameters
from experiments.workdirs import read_config
from tests.experiments import commands

ROOT = pathlib.Path(__file__).parents[2]
SECTION = re.search(
    r"^## Your own task, rule or model$(.*?)^## ", (ROOT / "README.md").read_text(), re.M | re.S
)
assert SECTION is not None
EXAMPLE, COMMANDS = re.findall(r"^```(?:python)?\n(.*?)^```$", SECTION[1], re.M | re.S)
SMALL = (
    "--config.training.steps=2 --config.training.seeds=1 --config.training.learning_rate=0.01, "
    "--config.training.log_every=1 --config.training.checkpoint_every=1 "
    "--config.task.test_items=8 --config.task.validation_items=8 --config.model.features=8"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the example as mine.py, in which commands run; what it registers leaves."""
    (tmp_path / "mine.py").write_text(EXAMPLE)
    before = dict(kernels.KERNELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("mine", None)
    for name in set(kernels.KERNELS) - set(before):
        del kernels._KERNELS[name]


def command(name: str) -> str:
    (line,) = re.findall(rf"^python -m experiments\.{name} (.*)$", COMMANDS, re.M)
    return line.replace("--config=configs", f"--config={ROOT}/configs")


def run(name: str, arguments: str, folder: pathlib.Path) -> commands.Ended:
    return commands.run(name, shlex.split(arguments), folder)


@pytest.mark.slow
def test_the_sweep_of_the_example_takes_its_steps(folder):
    ran = run("sweep", f"{command('sweep')} --import=mine {SMALL} --dry_run", folder)
    assert ran.returncode == 0, ran.stderr
    assert "2 cells, 0 done, 2 to run" in ran.stdout
    assert "runs/mine.TwoModels/rule_cauchy_scale_4-" in ran.stdout
    assert "minutes, from a few timed steps" in ran.stdout


def test_a_run_names_its_modules_and_is_read_again(folder):
    config = with_own_task(task_config("recall", ""), "mine:TwoModels")
    override(config, "rule", "cauchy(scale=4)")
    override(config, "imports", ("mine",))
    sys.modules.pop("mine")
    del kernels._KERNELS["cauchy"]
    claim_workdir(folder / "run", config)
    stored = read_config(folder / "run")
    assert "cauchy" in kernels.KERNELS
    assert type(make_program(stored)[0].task).__name__ == "TwoModels"


def rule_and_task(config_json: str) -> tuple[str, str]:
    """What a worker makes of a config."""
    program, _ = make_program(from_json(config_json))
    return type(program.task).__name__, "cauchy" in kernels.KERNELS


@pytest.mark.slow
def test_workers_import_the_modules_of_a_config(folder):
    config = with_own_task(task_config("recall", ""), "mine:TwoModels")
    override(config, "rule", "cauchy(scale=4)")
    override(config, "imports", ("mine",))
    found = dict(_in_workers(rule_and_task, {"own": (to_json(config),)}, 2))
    assert found == {"own": ("TwoModels", True)}


@pytest.mark.slow
def test_what_an_imported_module_registers_is_listed_with_what_to_try_next(folder):
    shown = run("list", command("list"), folder)
    assert shown.returncode == 0, shown.stderr
    assert "scale=1.0" in shown.stdout
    assert "models:" not in shown.stdout
    assert "python -m experiments.train --config=configs/recall.py" in shown.stdout


def test_the_rule_of_the_example_can_be_trained(folder):
    import_module("mine")
    config = task_config("recall", "")
    override(config, "rule", re.search(r"--config\.rule='(.*?)'", command("train"))[1])
    override(config, "imports", ("mine",))
    of_rule = parameters(make_program(config)[0])
    override(config, "rule", "gaussian(trainable=True)")
    assert of_rule == parameters(make_program(config)[0])


@pytest.mark.slow
def test_an_option_that_the_task_has_not_ends_with_one_sentence(folder):
    arguments = "--config.task.name=mine:TwoModels --config.task.slot=3"
    ended = run("train", f"--config={ROOT}/configs/recall.py {arguments}", folder)
    assert ended.returncode == 2
    assert ended.stderr.startswith(
        "error: config has no key 'task.slot': did you mean 'task.slots'"
    )
    assert len(ended.stderr.splitlines()) == 1


def test_a_comparison_takes_tasks_and_rules_of_ones_own(folder):
    import_module("mine")
    config = comparison_config(
        tasks=("recall", "mine:TwoModels"),
        arms=("learned", "cauchy(scale=4)"),
        overrides=("mine:TwoModels.task.slots=4", "mine:TwoModels.task.queries=2"),
        imports=("mine",),
        size="quick",
        own_settings=True,
    )
    cells = comparison_cells(config, folder)
    assert [cell.name for cell in cells][-1] == "mine:TwoModels / cauchy(scale=4)"
    own = cells[-1].config
    assert (own.imports, own.rule, own.task.slots) == (("mine",), "cauchy(scale=4)", 4)
    assert own.training.steps == 40
    assert cells[-1].workdir.parent == folder / "mine.TwoModels"
    assert make_program(from_json(json.dumps(own.to_dict())))[0].task.slots == 4


def test_a_module_may_have_the_config_of_its_task(folder):
    with (folder / "mine.py").open("a") as file:
        file.write(
            "\n\ndef get_config(size=''):\n    from experiments.config import arm_config\n\n"
            "    return arm_config('mine:TwoModels', training__steps=len(size))\n"
        )
    assert task_config("mine:TwoModels", "full").training.steps == 4


def test_the_settings_of_a_config_stay_with_another_task(folder):
    base = task_config("recall", "adjacent")
    override(base, "label", "base")
    own = with_own_task(base, "mine:TwoModels")
    assert own.task.name == "mine:TwoModels"
    assert (own.variant, own.label, own.task.binding) == ("", "", "joint")
    kept = [
        key for key, _ in leaves(base) if key.startswith(("training.", "model.")) or key == "rule"
    ]
    assert all(dict(leaves(own))[key] == dict(leaves(base))[key] for key in kept)
    assert with_own_task(base, "pronouns") is base
    assert with_own_task(base, None) is base


def test_names_of_modules_do_not_change_what_a_run_means(folder):
    config = task_config("recall", "")
    before = default_workdir(config)
    override(config, "imports", ("mine",))
    assert default_workdir(config) == before


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("recall", ("recall", "")),
        ("recall:adjacent", ("recall", "adjacent")),
        ("a.b:C", ("a.b:C", "")),
        ("a.b:C:hard", ("a.b:C", "hard")),
    ],
)
def test_a_task_and_its_variant_are_told_apart(name, parts):
    assert split_variant(name) == parts


CLASSES = """
from experiments.tasks.base import Task
from experiments.tasks.recall import Recall

class Half(Task):
    def describe(self):
        return {}

class Whole(Recall):
    pass
"""


def test_classes_that_are_no_complete_tasks_are_refused(folder, monkeypatch):
    (folder / "some_classes.py").write_text(CLASSES)
    (folder / "broken.py").write_text("import no_such_package\n")
    assert tasks.get("some_classes:Whole").name == "recall"
    with pytest.raises(UserError, match=r"Half must be .* abstract methods: write __init__, base"):
        tasks.get("some_classes:Half")
    with pytest.raises(UserError, match=r"got None: .*some_classes\.py has Half, Whole"):
        tasks.get("some_classes:Hole")
    with pytest.raises(UserError, match=r"the current folder or on PYTHONPATH, got 'some_class'"):
        tasks.get("some_class:Whole")
    with pytest.raises(UserError, match=r"a module is named as .* got '': "):
        tasks.get(":Whole")
    with pytest.raises(UserError, match=r"import statement, got 'a/mine\.py': write 'a\.mine'"):
        tasks.get("a/mine.py:Whole")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        tasks.get("broken:Whole")


def test_an_arm_may_be_a_rule_and_has_settings_like_the_others():
    place = {"num_heads": 4, "causal": False, "cross": False}
    assert arm_rule("window(radius=3)", **place) == "window(radius=3)"
    assert arm_trials("dot * window", **place) == arm_trials("learned", **place)
    assert arm_trials("window", **place) == arm_trials("table", **place)
    with pytest.raises(
        UserError, match=r"no arm 'gausian\(width=3\)', and as a rule: unknown rule"
    ):
        arm_rule("gausian(width=3)", **place)
    with pytest.raises(UserError, match="no arm 'tabel': did you mean 'table'"):
        arm_rule("tabel", **place)
