"""The list of what there is: complete, narrowed by flags and words, with figures of README.md."""

import pathlib
import subprocess
import sys

import pytest

from attn_jax.kernels import KERNELS
from configs.recall import SIZES
from experiments import tasks
from experiments.arms import ARMS
from experiments.list import KINDS, _nothing, readme_results, table

README = r"""
# Results

| rule | recall: accuracy (%) | other: x | text: bits per byte |
| --- | ---: | ---: | ---: |
| learned \* table | 100.0 (99 to 100) | 1 | 2.2 (1 to 3) |
| *chance* | *12.5* | | |

| rule | seconds |
| --- | ---: |
| self | 1 |
"""
ROOT = pathlib.Path(__file__).parents[2]


def column(rows, title):
    index = rows[0].index(title)
    return [row[index] for row in rows[1:]]


def test_every_task_rule_arm_and_config_is_listed():
    assert column(table("tasks"), "task") == list(tasks.names())
    assert set(KERNELS) | {"learned", "self"} <= set(column(table("rules", in_full=False), "rule"))
    assert column(table("arms"), "arm") == list(ARMS)
    listed = column(table("configs", ("recall",)), "config")
    assert listed == ["configs/recall.py", *(f"configs/recall.py:{size}" for size in SIZES)]
    assert {"num_layers", "position_encoding", "cell"} <= set(column(table("models"), "key"))
    for kind in ("tasks", "rules", "arms", "models"):
        assert all(row[-1] for row in table(kind))


def test_costs_are_those_of_a_run_and_unknown_where_data_is_outside(monkeypatch):
    monkeypatch.setenv("ATTN_JAX_DATA", "/nowhere")
    rows = {row[0]: row for row in table("configs", ("adjacent",))}
    assert rows["configs/recall.py:adjacent"][2:4] == ("31,808", "3.15 M")
    for name in ("smoothing.py:nab", "tagging.py:deprel", "digits.py:mnist", "translation.py:big"):
        ((*_, row),) = [table("configs", (f"configs/{name}",))]
        assert row[2:4] == ("-", "-")


def test_words_narrow_every_kind():
    (_, row) = table("rules", ("EPANECHNIKOV", "radius"), in_full=False)
    assert row[1] == "radius=2, trainable=False, reach=None"
    assert column(table("rules", ("table", "step")), "parameter") == ["step=1"]
    assert all(len(table(kind, ("no such word",))) == 1 for kind in KINDS)


def test_results_are_the_means_of_tables_by_task_and_metric(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(README)
    found = readme_results(readme)
    assert set(found) == {("recall", "accuracy (%)"), ("text", "bits per byte")}
    assert found["recall", "accuracy (%)"]["learned * table"] == "100.0"
    assert found["text", "bits per byte"] == {"learned * table": "2.2"}
    assert readme_results(tmp_path / "none.md") == {}
    text = (ROOT / "README.md").read_text()
    rows = table("results")
    assert {"smoothing", "recall", "pronouns", "text", "tagging"} <= set(column(rows, "task"))
    assert all(cell in text for row in rows[1:] for cell in row[2:] if cell != "-")


def test_a_word_that_nothing_has_names_the_nearest():
    said = _nothing(["rules"], ["gausian"])
    assert said == "nothing here has 'gausian': did you mean 'gaussian'?"


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_ends_the_command_in_silence():
    command = [sys.executable, "-m", "experiments.list"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, cwd=ROOT) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
