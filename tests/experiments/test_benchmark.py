"""The benchmark's harness: what it times, compares, marks and writes. No test looks at a clock."""

import dataclasses
import importlib
import json
import os
import pathlib
import subprocess
import sys
import time
import xml.etree.ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmark import (
    compiled,
    cpu,
    exact,
    filters,
    gpu,
    machine,
    page,
    peers,
    plot,
    proximity,
    report,
    suites,
    tables,
)
from experiments.benchmark.case import Absent, Target
from experiments.benchmark.derivatives import gradient
from experiments.benchmark.measure import compared, interleaved, judged, measure, ratio
from experiments.options import UserError
from tests.experiments import commands
from tests.experiments.benchmark_toys import (
    ANSWER,
    case_of,
    contender,
    record,
    report_of,
    time_target,
)
from tests.ops import reference

ROOT = pathlib.Path(__file__).parents[2]
PLENTY = 1e12


def quiet(*_):
    pass


def measured(case, rounds=3, available_bytes=PLENTY):
    return measure(case, rounds, available_bytes, quiet)


def by_name(result):
    return {one["name"]: one for one in result["contenders"]}


# --- rounds and ratios


def test_every_contender_runs_once_a_round_and_the_order_moves_on():
    order = []
    samples = {n: lambda n=n: order.append(n) or float(len(order)) for n in "abc"}
    times = interleaved(samples, 4)
    assert order == [*"abc", *"bca", *"cab", *"abc"]
    assert times == {"a": [1, 6, 8, 10], "b": [2, 4, 9, 11], "c": [3, 5, 7, 12]}


def test_a_ratio_is_formed_within_each_round():
    # The machine is ten times slower in the second round: neither side's ratio notices.
    assert ratio([2.0, 30.0, 4.0], [1.0, 10.0, 1.0]) == {"median": 3, "least": 2, "most": 4}


def test_a_case_times_its_contenders_in_turn_and_judges_the_median():
    log = []
    case = case_of(
        contender("a", (1.0, 10.0, 1.0), log=log),
        contender("b", (2.0, 30.0, 4.0), log=log),
        targets=[time_target(at_least=3, goal="7"), time_target(at_most=2.9), time_target()],
    )
    result = measured(case)
    assert log == ["a", "b", "b", "a", "a", "b"]
    assert by_name(result)["b"]["seconds"] == [2, 30, 4]
    assert [one["verdict"] for one in result["targets"]] == ["met", "missed", ""]
    assert result["targets"][0]["value"] == {"median": 3, "least": 2, "most": 4}
    assert result["targets"][0]["goal"] == "7"


@pytest.mark.parametrize(
    ("each", "tried", "calls"), [(0.01, [1, 10], 10), (0.2, [1], 1)], ids=["short", "long"]
)
def test_calls_are_warmed_up_and_repeated_until_they_are_long(each, tried, calls):
    counts = []
    prepared = contender("a").prepare()
    timed = dataclasses.replace(prepared, seconds=lambda n: counts.append(n) or each * n)
    case = case_of(contender("a", prepare=lambda: timed), calls=None, rounds_factor=2)
    result = measured(case, rounds=2)
    assert counts == [*tried, *(1, calls) * 4]
    assert by_name(result)["a"]["seconds"] == pytest.approx([each] * 4)


# --- answers


def test_a_wrong_contender_is_timed_marked_and_decides_nothing():
    wrong = contender("b", (9.0,) * 3, answer=ANSWER + 0.5)
    case = case_of(contender("a", (1.0,) * 3), wrong, targets=[time_target(at_least=2)])
    result = measured(case)
    assert not by_name(result)["a"]["wrong"]
    b = by_name(result)["b"]
    assert b["wrong"]
    assert b["error"] == 0.5
    assert b["relative_error"] == 0.125
    assert result["targets"][0]["verdict"] == "none: b wrong"
    made = report_of([result])
    assert tables.measured(made)[2][-1] == "WRONG: relative error above 0.1"
    assert report.wrong(made) == ["b (toy case)"]


@pytest.mark.parametrize("answer", [ANSWER * np.nan, ANSWER[:1]], ids=["nan", "shape"])
def test_nan_and_another_shape_are_wrong(answer):
    result = compared([answer], [ANSWER], 0.1)
    assert result["wrong"]
    assert result["error"] is None
    json.dumps(result, allow_nan=False)


def test_errors_are_relative_to_the_largest_entry_of_the_same_result():
    result = compared(
        [np.array([1.0, 100.5]), np.array(2.25)], [np.array([1.0, 100]), 2 * ANSWER[0, 0]], 1
    )
    assert result["error"] == 0.5
    assert result["relative_error"] == 0.125


def test_only_every_stride_th_row_is_compared():
    answer = np.arange(12.0).reshape(1, 6, 2)
    one = contender("a", answer=answer, stride=3, expected=lambda: [answer[:, ::3]])
    assert by_name(measured(case_of(one), 1))["a"]["error"] == 0


# --- contenders that do not run


def test_an_absent_peer_is_skipped_by_name_and_the_rest_goes_on(monkeypatch):
    def no_torch(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name="torch")

    monkeypatch.setattr(importlib, "import_module", no_torch)
    there = peers.torch_forward([np.ones((1, 2, 1, 1), np.float32)] * 3, lambda: [ANSWER])
    result = measured(
        case_of(contender("a", (1.0,) * 3), there, targets=[Target("time", "torch SDPA", "a")])
    )
    reason = "torch is not installed: pip install '.[peers]'"
    assert by_name(result)["torch SDPA"]["skipped"] == reason
    assert by_name(result)["a"]["seconds"] == [1, 1, 1]
    assert result["targets"][0]["verdict"] == "none: torch SDPA not measured"
    assert not report.wrong(report_of([result]))


def test_a_peer_that_does_not_import_says_why(monkeypatch):
    def broken(name):
        raise ImportError("needs jax of tomorrow\nand more")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(Absent, match=r"tokamax does not import: ImportError: needs jax of tom\w+$"):
        peers.module("tokamax")


def test_a_failure_ends_a_row_and_not_the_run():
    def fail():
        raise RuntimeError("no such kernel\ntraceback")

    result = measured(case_of(contender("a", prepare=fail), contender("b", (1.0,) * 3)))
    assert by_name(result)["a"]["skipped"] == "failed: RuntimeError: no such kernel"
    assert by_name(result)["b"]["seconds"] == [1, 1, 1]
    assert report.wrong(report_of([result])) == ["a (toy case)"]


def test_what_does_not_fit_into_memory_is_not_run():
    log = []
    case = case_of(contender("a", temporary=int(3e9), log=log))
    result = measured(case, available_bytes=4e9)
    assert by_name(result)["a"]["skipped"] == "needs 6 GB, 4 GB may be taken"
    assert not log


def test_what_is_only_compiled_states_its_memory():
    log = []
    one = contender("a", temporary=500, run=False, log=log)
    targets = [
        Target("temporary memory", "a", at_most=500),
        Target("memory", "a", at_most=500),
        Target("time", "a", at_most=1),
    ]
    result = measured(case_of(one, targets=targets))
    verdicts = [target["verdict"] for target in result["targets"]]
    assert verdicts == ["met", "missed", "none: a not measured"]
    assert not log


def test_memory_ratios_come_from_the_compiler():
    records = {n: record(n, memory={"temporary": t, "total": 9}) for n, t in (("a", 0), ("b", 40))}
    target = judged(Target("temporary memory", "b", "a", at_least=20), records)
    assert target["value"]["median"] == 40
    assert target["verdict"] == "met"
    # [256, 256] float32 in, a row out, and between them a matrix that is used twice.
    twice = compiled.prepare(lambda x: jnp.sort(x @ x).T @ x[0], [np.ones((256, 256), np.float32)])
    assert twice.memory.temporary >= 4 * 256**2
    assert twice.memory.total >= twice.memory.temporary + 4 * 256**2
    np.testing.assert_array_equal(twice.outputs()[0], np.full(256, 256.0**2))


# --- suites


def test_an_unknown_suite_or_case_is_an_error_with_the_nearest_name():
    with pytest.raises(UserError, match="no suite 'proximty': did you mean 'proximity'"):
        suites.find("proximty")
    with pytest.raises(UserError, match="'windw' in its name: did you mean 'window of 64"):
        suites.chosen(cpu.cases(), "windw")


def test_cases_are_chosen_by_a_part_of_their_names():
    names = [case.name for case in suites.chosen(cpu.cases(), "causal")]
    assert names == ["forward, causal", "forward and backward, causal"]


@pytest.mark.parametrize("name", suites.SUITES)
def test_names_of_cases_are_unique_and_cover_the_goals(name):
    cases = suites.find(name).cases()
    assert len({case.name for case in cases}) == len(cases)
    goals = {target.goal for case in cases for target in case.targets if target.goal}
    assert goals == {"cpu": {*"123459"}, "proximity": {*"678"}}.get(name, set())


def test_the_suite_gpu_says_what_it_needs():
    with pytest.raises(UserError, match="the suite gpu needs a GPU, and JAX sees only cpu"):
        machine.prepare("gpu", 2)


def test_more_threads_than_cores_are_refused():
    with pytest.raises(UserError, match=r"--threads=4096 needs as many cores, .* may use \d+"):
        machine.prepare("cpu", 4096)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [*cpu.cases(256), *proximity.cases(512)], ids=lambda case: case.name
)
def test_every_contender_answers_the_question_of_its_case(case, monkeypatch):
    """At a short length, and without torch.compile, which would take half a minute.

    tokamax promotes ranks, and looks for its flags in the command line, which is pytest's here.
    """
    monkeypatch.setattr(sys, "argv", sys.argv[:1])
    left_out = ("torch FlexAttention",)
    kept = [one for one in case.contenders() if one.name not in left_out]
    short = dataclasses.replace(case, contenders=lambda: kept, calls=1, rounds_factor=1)
    known = {one.name for one in case.contenders()}
    assert {n for t in case.targets for n in (t.of, t.to) if n} <= known
    judgeable = [t for t in case.targets if t.of not in left_out]
    with jax.numpy_rank_promotion("allow"):
        result = measured(dataclasses.replace(short, targets=judgeable), rounds=1)
    off = report.wrong(report_of([result]))
    assert not off, [one["skipped"] for one in result["contenders"]]
    assert by_name(result)[kept[0].name]["seconds"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting", [(2, 128, 2, 16), (1, 128, 2, 16, True), (2, 64, 2, 8, False, True)]
)
def test_the_settings_of_the_suite_gpu_ask_the_same_question_of_all(setting):
    """On a CPU only two of the three contenders run."""
    for case in gpu.cases((gpu.Setting(*setting),)):
        kept = [one for one in case.contenders() if one.name != gpu.CUDNN]
        short = dataclasses.replace(case, contenders=lambda kept=kept: kept, calls=1, targets=())
        assert not report.wrong(report_of([measured(short, rounds=1)]))


def test_flops_are_those_of_two_products():
    assert gpu.Setting(2, 8, 3, 5).flops == 2 * (2 * 2 * 3 * 8 * 8 * 5)
    assert gpu.Setting(2, 8, 3, 5, causal=True).flops == 2 * 2 * 3 * 8 * 8 * 5


# --- the exact answers


def test_the_exact_answer_is_that_of_loops():
    query, key, value = np.random.default_rng(0).normal(size=(3, 2, 6, 2, 4))
    allowed = np.random.default_rng(1).random((6, 6)) < 0.6
    allowed[2] = False
    bias = np.random.default_rng(2).normal(size=(2, 6, 6))
    expected, _ = reference.attention(
        query,
        key,
        value,
        log_weight=lambda head, r: -abs(r) / 3.0,
        bias=np.broadcast_to(bias, (2, 2, 6, 6)),
        allowed=np.broadcast_to(allowed, (2, 2, 6, 6)),
    )

    def attend(query, key, value, bias, seen, stride=1):
        return exact.attention(
            query,
            key,
            value,
            log_weight=lambda r: -abs(r) / 3.0,
            bias=bias,
            allowed=lambda i, j: seen[i, j],
            stride=stride,
        )

    (got,) = exact.answer(attend, query, key, value, bias, allowed)()
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    assert not got[:, 2].any()
    (rows,) = exact.answer(lambda *x: attend(*x, stride=2), query, key, value, bias, allowed)()
    np.testing.assert_allclose(rows, got[:, ::2], rtol=1e-12)


def test_the_exact_gradient_is_that_of_differences():
    query, key, value, cotangent = np.random.default_rng(0).normal(size=(4, 1, 5, 1, 3))

    def attend(query, key, value, width):
        return exact.attention(query, key, value, log_weight=lambda r: -jnp.square(r / width))

    *_, slope = exact.answer(gradient(attend), cotangent, query, key, value, 2.0)()
    step = 1e-6
    high, low = (exact.answer(attend, query, key, value, 2.0 + d)()[0] for d in (step, -step))
    assert slope == pytest.approx(((high - low) * cotangent).sum() / (2 * step), rel=1e-7)


def test_the_length_of_a_transform_has_small_factors():
    assert [filters.smooth_length(n) for n in (1, 7, 11, 121, 8352)] == [1, 8, 12, 125, 8640]


# --- what is written


def finished_report():
    target = {
        "goal": "1",
        "quantity": "time",
        "of": "b",
        "to": "a",
        "at_least": 2.0,
        "at_most": None,
        "value": {"median": 3.0, "least": 2.5, "most": 1234.5},
        "verdict": "met",
    }
    memory = {
        **target,
        "quantity": "memory",
        "of": "a",
        "to": None,
        "at_least": None,
        "at_most": 1.5e9,
        "value": dict.fromkeys(("median", "least", "most"), 2e9),
        "verdict": "missed",
    }
    skipped = record("b", (), skipped="b is not installed")
    first = record("a", (0.002, 0.004, 0.003), error=1.5e-7, memory={"temporary": 34e6, "total": 1})
    case = {"name": "forward", "inputs": "(1, 2) float32", "tolerance": 1e-5, "flops": 3e9}
    return report_of([case | {"contenders": [first, skipped], "targets": [target, memory]}])


def test_tables_are_rendered_from_the_report_alone():
    made = json.loads(json.dumps(finished_report()))
    assert tables.measured(made)[1:] == [
        ("forward", "a", "3", "2 to 4", "34", "1.5e-07", "1 TFLOP/s"),
        ("forward", "b", "-", "-", "-", "-", "b is not installed"),
    ]
    assert tables.reached(made)[1:] == [
        ("1", "forward", "b / a, time", "at least 2", "3", "2.5 to 1,234", "met"),
        ("1", "forward", "a, memory", "at most 1,500 MB", "2,000 MB", "-", "missed"),
    ]


def test_the_figure_shows_every_ratio_and_no_other_quantity():
    drawn = plot.svg(finished_report())
    assert drawn == plot.svg(finished_report())
    texts = [e.text for e in xml.etree.ElementTree.fromstring(drawn).iter() if e.text]
    assert "b / a, time" in texts
    assert "forward" in texts
    assert "a, memory" not in texts


def test_json_and_figure_are_written_and_a_part_never_replaces_a_suite(tmp_path):
    made = finished_report()
    whole = report.write(made, tmp_path, "")
    part = report.write(made, tmp_path, "width 32")
    assert [path.name for path in whole] == ["cpu.json", "cpu.svg"]
    assert [path.name for path in part] == ["cpu-width_32.json", "cpu-width_32.svg"]
    assert json.loads(whole[0].read_text()) == json.loads(json.dumps(made))
    assert whole[1].read_text().startswith("<?xml")


def test_the_page_holds_command_date_machine_versions_flags_table_and_figure(tmp_path):
    runs = tmp_path / "runs"
    report.write(finished_report(), runs, "")
    written = page.write(tmp_path / "docs" / "performance.md", runs)
    assert [path.name for path in written] == ["performance.md", "performance_cpu.svg"]
    text = written[0].read_text()
    for part in (
        "## cpu: Attention with content",
        "`python -m experiments.benchmark --suite=cpu`",
        "2026-01-02; Some Processor, avx2, 2 of 4 cores (load 0.5 before the run, 1 % of the "
        "machine taken by others during it); ",
        "; python 3.11.7, jax 0.10.2; XLA_FLAGS not set; rounds: 2.",
        "| 1 | forward | b / a, time | at least 2 | 3 | 2.5 to 1,234 | met |",
        "(figures/performance_cpu.svg)",
    ):
        assert part in text
    assert "torch None" not in text
    assert "conformance.md" not in text
    (tmp_path / "docs" / "conformance.md").write_text("")
    page.write(written[0], runs)
    assert "conformance.md" in written[0].read_text()


def test_a_page_keeps_the_sections_of_suites_that_were_run_elsewhere(tmp_path):
    path, made = tmp_path / "performance.md", finished_report()
    for suite, date in (("proximity", "2026-01-02"), ("cpu", "2026-01-03"), ("cpu", "2026-01-04")):
        runs = tmp_path / date
        dated = made | {"suite": suite, "environment": made["environment"] | {"date": date}}
        report.write(dated, runs, "")
        page.write(path, runs)
    text = path.read_text()
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        f"## cpu: {made['meaning']}",
        f"## proximity: {made['meaning']}",
    ]
    assert "2026-01-04" in text
    assert "2026-01-02" in text
    assert "2026-01-03" not in text
    before = text
    page.write(path, runs)
    assert path.read_text() == before


def test_a_thread_that_ends_meanwhile_is_left_out(tmp_path, monkeypatch):
    """Between the list of threads and what is asked of each."""
    of_process = machine.cores()
    ended = 2**22 - 1  # the system counts threads no further
    names = {os.getpid(): "python", ended: "tf_XLAEigen"}
    for thread in names:
        (tmp_path / str(thread)).mkdir()
    monkeypatch.setattr(machine, "_TASKS", tmp_path)
    (tmp_path / str(os.getpid()) / "comm").write_text("python\n")
    assert machine._threads() == {os.getpid(): "python"}
    monkeypatch.setattr(machine, "_threads", lambda: names)
    assert set(machine.cores()) <= set(of_process)
    assert machine.cores()


def test_a_run_on_a_busy_machine_is_not_to_be_quoted():
    made = finished_report()
    assert "quote no time" not in page.made(made)
    for name, much in (("load", 3.5), ("others", 0.2)):
        busy = made | {"environment": made["environment"] | {name: much}}
        assert page.made(busy).endswith("quote no time and no ratio of this run.**")
        assert f"{3.5 if name == 'load' else 20:g}" in page.made(busy)


@pytest.mark.slow
def test_what_other_processes_take_is_seen():
    own = machine.Others()
    sum(i * i for i in range(3_000_000))
    share = own.share()
    assert share is None or 0 <= share <= 1
    if share is not None:
        # a process that is nobody's child yet, so that its time is not ours
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
            seen = machine.Others()
            time.sleep(1)
            assert seen.share() > 0.5 / (os.cpu_count() or 1)
            other.kill()


def test_a_page_of_no_runs_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"holds none of cpu.json, .*: run a suite first"):
        page.write(tmp_path / "performance.md", tmp_path)


def test_the_environment_tells_neither_host_nor_path():
    there = machine.environment()
    assert {"jax", "processor", "cores", "xla_flags", "date", "torch", "tokamax"} <= set(there)
    assert not any("/" in str(value) for key, value in there.items() if key != "xla_flags")


# --- the command


def run(*arguments):
    return commands.run("benchmark", arguments)


@pytest.mark.slow
def test_bad_input_ends_with_one_sentence_before_anything_is_written(tmp_path):
    ended = run("--suite=cpu", "--only=smal (", f"--output={tmp_path / 'out'}")
    assert ended.returncode == 2
    assert "did you mean 'small (" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_suite_is_run_printed_and_written(tmp_path):
    page_path = tmp_path / "docs" / "performance.md"
    threads = f"--threads={min(2, len(machine.cores()))}"
    ended = run(*("--suite=cpu", "--only=small (2", "--rounds=1", threads, f"--output={tmp_path}"))
    assert ended.returncode == 0, ended.stderr
    assert "jax.nn / attn_jax, time" in ended.stdout
    assert "XLA_FLAGS" in ended.stdout
    made = json.loads((tmp_path / "cpu-small_2.json").read_text())
    expected = f"python -m experiments.benchmark --suite=cpu --only='small (2' --rounds=1 {threads}"
    assert made["command"] == expected
    assert len(made["cases"][0]["contenders"][0]["seconds"]) == 5
    (tmp_path / "cpu-small_2.json").rename(tmp_path / "cpu.json")
    again = run(f"--write={page_path}", f"--output={tmp_path}")
    assert again.returncode == 0, again.stderr
    assert "## cpu" in page_path.read_text()
