"""Commands as a user types them: bad input ends with one sentence, and touches nothing."""

import json
import pathlib
import shlex

import pytest

from tests.experiments import commands

ROOT = pathlib.Path(__file__).parents[2]
SMALL = (
    "--config=configs/recall.py --config.model.num_layers=1 --config.training.steps=4 "
    "--config.training.seeds=1 "
    "--config.training.learning_rate='(0.01,)' --config.training.log_every=2 "
    "--config.training.checkpoint_every=2 --config.task.test_items=8 "
    "--config.task.validation_items=8"
)
BROKEN = "1\tDogs\tdog\tNOUN\t_\t_\t0\troot\t_\t_\n2\tbark\tbark\tVERB\n\n"


def run(program: str, arguments: str) -> commands.Ended:
    return commands.run(program, shlex.split(arguments))


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "arguments", "sentence"),
    [
        (
            "train",
            "--config=configs/recall.py --config.modle.num_layers=3",
            "config has no key 'modle.num_layers': did you mean 'model.num_layers'?",
        ),
        (
            "train",
            "--config=configs/smoothing.py --config.task.path=elsewhere",
            "nothing reads the config key task.path in this run",
        ),
        (
            "train",
            "--config=configs/tagging.py --config.task.path={data}",
            "en-ud-train.conllu, line 2",
        ),
        (
            "train",
            "--config=configs/recall.py --config.rule='learned * gausian(width=4)'",
            "unknown rule 'gausian' in 'learned * gausian(width=4)': did you mean 'gaussian'?",
        ),
        (
            "train",
            "--config=configs/recall.py --config.model.num_layers=two",
            "num_layers",
        ),
        ("train", "", "--config=FILE is needed"),
        ("train", "--config=configs/recall.py:huge", ":quick, :full, :adjacent, got :huge"),
        ("train", "--config=configs/recall.py extra", "every argument must be a --flag"),
        (
            "compare",
            "--config=configs/compare.py --config.arms='(\"gausian\",)'",
            "there is no arm 'gausian': did you mean 'gaussian'?",
        ),
        (
            "sweep",
            "--config=configs/recall.py --axis=num_layer=1,2",
            "did you mean 'model.num_layers'?",
        ),
    ],
)
def test_bad_input_ends_with_one_sentence_before_anything_is_written(
    program, arguments, sentence, tmp_path
):
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        (data / f"en-ud-{split}.conllu").write_text(BROKEN)
    workdir = tmp_path / "run"
    ended = run(program, f"{arguments.format(data=data)} --workdir={workdir}")
    assert ended.returncode == 2
    assert sentence in ended.stderr
    said = [line for line in ended.stderr.splitlines() if line]
    assert len(said) == 1
    assert said[0].startswith("error: ")
    assert not workdir.exists()


@pytest.mark.slow
def test_a_finished_run_is_kept_and_another_config_is_refused(tmp_path):
    workdir = tmp_path / "run"
    first = run("train", f"{SMALL} --workdir={workdir}")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith(f"workdir: {workdir}\n")
    before = files(workdir)
    result = json.loads(before[str(workdir / "result.json")])
    assert result["seeds"] == [0]

    again = run("train", f"{SMALL} --workdir={workdir}")
    assert again.returncode == 0
    assert files(workdir) == before

    refused = run("train", f"{SMALL} --config.rule=uniform --workdir={workdir}")
    assert refused.returncode == 2
    assert "rule: 'learned' -> 'uniform'" in refused.stderr
    assert files(workdir) == before

    more = run("train", f"{SMALL} --config.training.seeds=2 --workdir={workdir}")
    assert more.returncode == 0, more.stderr
    grown = json.loads((workdir / "result.json").read_text())
    assert grown["seeds"] == [0, 1]
    assert grown["per_seed"][0] == result["per_seed"][0]
    kept = {name: data for name, data in files(workdir).items() if "main-0-0" in name}
    assert kept == {name: data for name, data in before.items() if "main-0-0" in name}


@pytest.mark.slow
def test_help_config_prints_every_key_with_default_and_meaning():
    shown = run("train", "--config=configs/recall.py --help_config")
    assert shown.returncode == 0
    keys = {line.split()[0] for line in shown.stdout.splitlines()[1:]}
    assert {"--config.rule", "--config.model.num_layers", "--config.training.seeds"} <= keys
    assert all(len(line.split(maxsplit=2)) == 3 for line in shown.stdout.splitlines())


@pytest.mark.slow
def test_a_dry_run_counts_and_estimates_and_writes_nothing(tmp_path):
    axes = "--axis=rule='learned;gaussian(width=4)' --axis=num_layers=1,2"
    shown = run("sweep", f"{SMALL} {axes} --dry_run --workdir={tmp_path / 'sweep'}")
    assert shown.returncode == 0, shown.stderr
    assert "4 cells, 0 done, 4 to run" in shown.stdout
    assert "rule=gaussian(width=4), num_layers=2" in shown.stdout
    assert "minutes" in shown.stdout
    assert not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_a_sweep_runs_its_cells_once_and_prints_a_table(tmp_path):
    command = f"{SMALL} --axis=rule=self,uniform --workers=2 --workdir={tmp_path / 'sweep'}"
    ran = run("sweep", command)
    assert ran.returncode == 0, ran.stderr
    table = [line for line in ran.stdout.splitlines() if line.startswith("rule=")]
    assert len(table) == 2
    before = files(tmp_path / "sweep")
    again = run("sweep", command)
    assert "2 cells, 2 done, 0 to run" in again.stdout
    assert files(tmp_path / "sweep") == before
