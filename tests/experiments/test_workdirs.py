"""What a trained run is good for, from its workdir alone: translations, scores, means, exports."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from experiments.arm import run_arm
from experiments.config import arm_config
from experiments.options import UserError
from experiments.translating import translate
from experiments.workdirs import Translator, load_model, read_config
from tests.experiments import commands

ROOT = pathlib.Path(__file__).parents[2]
WORDS = ["eins", "zwei", "drei", "vier"]
ENGLISH = ["one", "two", "three", "four"]
ALONE = """
import sys
for name in ("flax", "attn_jax", "experiments", "optax", "orbax"):
    sys.modules[name] = None
import numpy as np
from run import load
inputs = dict(np.load(sys.argv[1]))
np.savez(sys.argv[2], **{name: np.asarray(x) for name, x in load()(**inputs).items()})
"""


def command(program, *arguments, text=""):
    return commands.run(program, arguments, text=text)


def alone(folder, inputs, tmp_path):
    """Outputs of an exported model in a process without Flax and without this project."""
    np.savez(tmp_path / "inputs.npz", **inputs)
    script = tmp_path / "alone.py"
    script.write_text(ALONE)
    ended = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "inputs.npz"), str(tmp_path / "out.npz")],
        env={"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return dict(np.load(tmp_path / "out.npz"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of translation of four number words, a few steps long."""
    folder = tmp_path_factory.mktemp("translation")
    rng = np.random.default_rng(0)
    lines = set()
    while len(lines) < 300:
        ids = rng.integers(0, 4, rng.integers(1, 6))
        lines.add(f"{' '.join(ENGLISH[i] for i in ids)}\t{' '.join(WORDS[i] for i in ids)}\n")
    (folder / "numbers.tsv").write_text("".join(sorted(lines)))
    config = arm_config(
        "translation",
        task__data=str(folder / "numbers.tsv"),
        task__vocabulary=264,
        task__row=24,
        task__batch_size=4,
        task__extra=4,
        task__beam=2,
        model__num_layers=1,
        model__features=16,
        model__num_heads=2,
        training__seeds=1,
        training__learning_rate=(1e-2,),
        training__steps=12,
        training__log_every=4,
        training__evaluate_every=12,
        training__checkpoint_every=4,
        training__checkpoints=3,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(folder / "tfds"))
        run_arm(config, folder / "run", lambda *_: None, "a test")
        yield folder / "run"


@pytest.mark.slow
def test_a_run_translates_from_its_workdir_alone(run, tmp_path):
    translator = Translator.load(run, average=2)
    assert translator.steps == [8, 12]
    sources = ["eins zwei", "vier drei drei"]
    expected = translate(translator.model, translator.subwords, sources, translator.search())
    (tmp_path / "in.txt").write_text("".join(f"{s}\n" for s in sources))
    (tmp_path / "ref.txt").write_text("one two\nfour three three\n")
    ended = command(
        "translate",
        f"--workdir={run}",
        "--average=2",
        f"--input={tmp_path / 'in.txt'}",
        f"--references={tmp_path / 'ref.txt'}",
        "--scores",
        "--n_best=2",
    )
    assert ended.returncode == 0, ended.stderr
    rows = [line.split("\t") for line in ended.stdout.splitlines()]
    assert len(rows) == 4
    assert [row[2] for row in rows[::2]] == [one.text for one in expected]
    assert float(rows[0][0]) == pytest.approx(expected[0].score, abs=1e-4)
    assert "BLEU" in ended.stderr
    assert "version:" in ended.stderr


@pytest.mark.slow
def test_bleu_at_every_checkpoint_and_bad_input(run, tmp_path):
    ended = command("translate", f"--workdir={run}", "--split=test", "--every_checkpoint")
    assert ended.returncode == 0, ended.stderr
    assert [line.split("\t")[0] for line in ended.stdout.splitlines()] == ["4", "8", "12"]
    assert "nrefs:" in ended.stderr
    assert f"wrote {run / 'by_step_test.svg'}" in ended.stderr
    assert "chrF2" in (run / "by_step_test.svg").read_text()
    (tmp_path / "bad.txt").write_bytes(b"eins\n\xff\n")
    ended = command("translate", f"--workdir={run}", f"--input={tmp_path / 'bad.txt'}")
    assert ended.returncode == 2
    assert "bad.txt, line 2: not UTF-8" in ended.stderr
    ended = command("translate", f"--workdir={run}", "--split=test", "--input=a", "--references=b")
    assert ended.returncode == 2
    assert "--input, --references would do nothing beside --split" in ended.stderr


@pytest.mark.slow
def test_what_is_no_run_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        read_config(tmp_path)
    with pytest.raises(UserError, match="no checkpoint of seed 7"):
        Translator.load(run, seed=7)
    with pytest.raises(UserError, match="must hold a run of tagging, got one of translation"):
        read_config(run, task="tagging")


@pytest.mark.slow
def test_an_exported_translator_runs_alone(run, tmp_path):
    output = tmp_path / "exported"
    ended = command(
        "export", f"--workdir={run}", f"--output={output}", "--batch_size=2", "--source_length=16"
    )
    assert ended.returncode == 0, ended.stderr
    translator = Translator.load(run)
    sources = ["eins zwei", "vier drei drei"]
    source = np.zeros((2, 16), np.int32)
    ids = translator.subwords.encode(sources)
    for row, one in enumerate(ids):
        source[row, : len(one) + 1] = [*one, 2]
    length = np.array([len(one) + 1 for one in ids], np.int32)
    found = alone(output, {"source": source, "length": length}, tmp_path)
    expected = translate(translator.model, translator.subwords, sources, translator.search())
    for row, one in enumerate(expected):
        assert tuple(found["tokens"][row, 0, : found["lengths"][row, 0]]) == one.tokens
        assert found["score"][row, 0] == pytest.approx(one.score, abs=1e-5)
    signature = json.loads((output / "signature.json").read_text())
    assert signature["inputs"]["source"] == {"shape": [2, 16], "dtype": "int32"}


@pytest.mark.slow
def test_an_exported_classifier_runs_alone(tmp_path):
    config = arm_config(
        "recall",
        model__num_layers=1,
        training__seeds=1,
        training__learning_rate=(1e-2,),
        training__steps=2,
        training__log_every=2,
        training__checkpoint_every=2,
        task__test_items=8,
        task__validation_items=8,
    )
    run_arm(config, tmp_path / "run", lambda *_: None, "a test")
    output = tmp_path / "exported"
    ended = command("export", f"--workdir={tmp_path / 'run'}", f"--output={output}")
    assert ended.returncode == 0, ended.stderr
    task, model = load_model(tmp_path / "run")
    inputs = {name: array[:1] for name, array in task.evaluation("test")[0].items()}
    found = alone(output, inputs, tmp_path)
    np.testing.assert_allclose(found["outputs"], model(inputs), atol=1e-5)
