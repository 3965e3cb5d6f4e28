"""experiments.conformance as a user types it."""

import json
import pathlib
import shlex

import pytest

from tests.experiments import commands

ROOT = pathlib.Path(__file__).parents[2]


def run(arguments: str) -> commands.Ended:
    return commands.run("conformance", shlex.split(arguments))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--subject=jaxnn", "there is no subject 'jaxnn': did you mean 'jax.nn'?"),
        ("--subject=dense --check=masks", "There is no check 'masks'. Checks are named: no keys"),
        ("--subject=dense --dtype=int8", "dtype"),
    ],
)
def test_bad_input_ends_with_one_sentence(arguments, sentence, tmp_path):
    ended = run(f"{arguments} --output={tmp_path / 'out'}")
    assert ended.returncode == 2
    assert sentence in ended.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_tables_are_printed_and_written(tmp_path):
    ended = run(
        "--subject=dense --subject=jax.nn --check='no keys: zero' --check='shared heads' "
        f"--output={tmp_path}"
    )
    assert ended.returncode == 0, ended.stderr
    written = (tmp_path / "conformance.md").read_text()
    row = "| 1 | no keys: zero | holds 8 | **differs** 7 of 8 |"
    assert row in ended.stdout
    assert row in written
    assert "jax.nn" in written
    assert "expected 0, got" in written
    data = json.loads((tmp_path / "conformance.json").read_text())
    assert [report["subject"] for report in data["reports"]] == ["dense", "jax.nn"]
    assert {"jax", "date", "xla_flags", "dtypes"} <= set(data["environment"])
