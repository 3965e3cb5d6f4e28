"""The report of arms on disk, whose scores are drawn so that the right verdicts are known."""

import dataclasses
import json
import re
import shutil
import subprocess

import matplotlib.image
import numpy as np
import pytest

from experiments import tasks
from experiments.config import arm_config
from experiments.options import UserError
from experiments.report import shares
from experiments.report import tables as report_tables
from experiments.report.build import build
from experiments.report.figures import pictures
from experiments.report.load import References, load_arm, save_baselines
from experiments.report.pages import write
from experiments.tasks.base import Baseline, Metric

ITEMS, CLUSTER = 400, 4
ENVIRONMENT = {"jax": "0.10.2", "device": "cpu", "cores": 2}
ACCURACY = Metric("accuracy", "%", higher_is_better=True, margin=0.005, chance=0.125)
RMSE = Metric(
    "RMSE / SD", "", higher_is_better=False, margin=0.02, margin_is_relative=True, statistic="root"
)
RULES = {"self": 0.13, "gaussian": 0.14, "table": 0.3, "raw": 0.8, "learned": 0.95}
VERDICT_FIELDS = {"task", "a", "b", "difference", "ci95", "verdict", "p_holm", "margin"}
VERDICT_FIELDS |= {"equivalent", "retention"}
ROW_FIELDS = {"task", "rule", "metric", "higher_is_better", "mean", "ci95", "seeds", "per_seed"}
ROW_FIELDS |= {"params", "flops_per_example", "examples_per_second", "peak_bytes", "steps"}
ROW_FIELDS |= {"learning_rate", "split", "baselines", "by_distance", "by_group", "match", "tuning"}
ROW_FIELDS |= {"position_encoding", "diverged", "compile_seconds", "data_sha256", "command"}
ROW_FIELDS |= {"chance", "rule_spec"}


def draw(metric, level, seeds, items=ITEMS, groups=2, spread=0.005, shared=0):
    """Scores whose mean is near `level`: hits of an accuracy, squared errors of a root."""
    rows = []
    easy = np.random.default_rng(shared).random(items)
    for seed in seeds:
        generator = np.random.default_rng([seed, int(1000 * level)])
        at = level + spread * generator.normal()
        noise = 0.2 * (generator.random(items) - 0.5)
        if metric.statistic == "root":
            rows.append((at * (0.6 + 0.8 * easy) * (1 + noise)) ** 2)
        else:
            rows.append((np.clip(easy + noise, 0, 1) < at).astype(float))
    return np.stack(rows)


def facts(task, rule, metric, seeds, **changes):
    return {
        "task": task,
        "rule": rule,
        "rule_spec": f"{rule}()",
        "metric": dataclasses.asdict(metric),
        "selects": dataclasses.asdict(metric),
        "split": "test",
        "steps": 500,
        "batch_size": 32,
        "diverged": [],
        "params": 23_457,
        "flops_per_example": 2_562_048,
        "examples_per_second": 4100.0,
        "peak_bytes": 12_400_000,
        "position_encoding": "sinusoidal",
        "match": None,
        "command": "python -m experiments.compare",
        "environment": ENVIRONMENT,
        "data_sha256": "94f6d290",
        "padding": 0.04,
        "dropped": {"too long": 3},
        "learning_rate": 0.01,
        "tuning": {
            "grid": [0.003, 0.01],
            "scores": [[0.5, 0.6]],
            "setting": 0,
            "chosen": 0.01,
            "at_edge": True,
            "settings": [""],
        },
        "stopped": None,
        "compile_seconds": 3.5,
        "train_seconds": 15.0,
        "seeds": list(seeds),
        **changes,
    }


def write_arm(folder, values, result, group=None, distance=None, curves=True):
    folder.mkdir(parents=True)
    items = values.shape[1]
    metric = Metric(**result["metric"])
    weights = np.ones(items, np.float32)
    result = {"per_seed": metric.mean(values, weights).tolist(), **result}
    (folder / "result.json").write_text(json.dumps(result))
    np.savez(
        folder / "scores.npz",
        values=values.astype(np.float32),
        weights=weights,
        shown=weights,
        cluster=np.arange(items) // CLUSTER,
        distance=np.tile([1.0, 3.0, 6.0, np.nan], items // 4) if distance is None else distance,
        group=np.arange(items) // (items // 2) if group is None else group,
    )
    ends = (1.6, 1.2, 1.0) if metric.statistic == "root" else (0.4, 0.8, 1.0)
    lines = [
        {"phase": "main-0-2", "seed": seed, "step": step, "split": "validation"}
        | {result["selects"]["name"]: mean * end}
        for seed, mean in zip(result["seeds"], result["per_seed"], strict=True)
        for step, end in zip((125, 250, 375), ends, strict=True)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return load_arm(folder)


def references(metric):
    partial = np.where(np.arange(ITEMS) < ITEMS // 2, 0.1, np.nan)
    baselines = (Baseline("last value", np.full(ITEMS, 0.2)), Baseline("floor", partial))
    return References(baselines, ("smooth", "jumps"), (0.0, 2.0, 4.0, 8.0), "distance to the slot")


def make(folder, seeds=(0, 1, 2), metric=ACCURACY, task="recall", changed=None):
    arms = []
    for rule, level in RULES.items():
        changes = (changed or {}).get(rule, {})
        result = facts(task, rule, metric, seeds, **changes)
        name = rule.replace(" ", "")
        arms.append(write_arm(folder / task / name, draw(metric, level, seeds), result))
    return arms


def test_learning_curves_say_what_was_validated(tmp_path):
    nats = Metric("nats", "", higher_is_better=False, margin=0.02)
    arms = make(tmp_path, changed={rule: {"selects": dataclasses.asdict(nats)} for rule in RULES})
    drawn = {one.kind: one.figure.axes[0] for one in pictures(report_of(arms), arms, "recall")}
    assert drawn["learning"].get_ylabel() == "nats, lower is better"
    assert "chance" not in drawn["learning"].get_legend_handles_labels()[1]
    assert drawn["scores"].get_xlabel() == "accuracy (%), higher is better"


def report_of(arms, metric=ACCURACY, task="recall"):
    return build(
        {task: arms},
        {task: references(metric)},
        command="python -m experiments.compare",
        environment=ENVIRONMENT,
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report of two tasks, one of them with a diverged seed, and its folder."""
    folder = tmp_path_factory.mktemp("report")
    lost = {"gaussian": {"diverged": [{"seed": 1, "step": 77}]}}
    arms = {
        "recall (adjacent)": make(folder, task="recall (adjacent)", changed=lost),
        "smoothing": make(folder, metric=RMSE, task="smoothing"),
    }
    found = {"recall (adjacent)": references(ACCURACY), "smoothing": references(RMSE)}
    report = build(arms, found, command="the command", environment=ENVIRONMENT)
    return report, arms, folder, write(report, arms, folder)


def verdict_of(report, a, b="learned"):
    return next(one for one in report.verdicts if (one["a"], one["b"]) == (a, b))


def test_rows_and_verdicts_hold_every_field(written):
    report = json.loads((written[2] / "report.json").read_text())
    assert {"rows", "verdicts", "environment"} <= set(report)
    assert len(report["rows"]) == 2 * len(RULES)
    for row in report["rows"]:
        assert set(row) >= ROW_FIELDS
        assert row["ci95"][0] < row["mean"] < row["ci95"][1]
        assert [one["n"] for one in row["by_distance"]] == [ITEMS // 4] * 4
        assert row["by_distance"][-1]["lo"] is None  # items without a distance
        assert [one["group"] for one in row["by_group"]] == ["smooth", "jumps"]
        assert row["tuning"] == row["tuning"] | {"grid": [0.003, 0.01], "at_edge": True}
    for verdict in report["verdicts"]:
        assert set(verdict) >= VERDICT_FIELDS
    assert report["environment"] == ENVIRONMENT | {"command": "the command"}


def test_declared_pairs_are_each_rule_against_learned_and_table_against_gaussian(written):
    pairs = [(one["a"], one["b"]) for one in written[0].of("smoothing")[1]]
    assert pairs == [
        ("self", "learned"),
        ("gaussian", "learned"),
        ("table", "learned"),
        ("raw", "learned"),
        ("table", "gaussian"),
    ]


def test_json_has_no_number_that_is_not_finite(written):
    def refuse(name):
        raise AssertionError(name)

    json.loads((written[2] / "report.json").read_text(), parse_constant=refuse)


def test_mean_is_of_per_seed_scores(written):
    for row in written[0].rows:
        assert row["mean"] == pytest.approx(np.mean(row["per_seed"]))


def test_verdicts_know_the_better_arm_in_both_directions(written):
    higher, lower = (written[0].of(task)[1] for task in ("recall (adjacent)", "smoothing"))
    assert higher[0]["verdict"] == "b better"  # learned has more hits than self
    assert lower[0]["verdict"] == "a better"  # and, as drawn, larger errors


def test_relative_margin_is_of_the_reference(written):
    rows, verdicts = written[0].of("smoothing")
    learned = next(row["mean"] for row in rows if row["rule"] == "learned")
    assert verdicts[0]["margin"] == pytest.approx(0.02 * learned)


def test_retention_is_the_share_of_what_content_adds(tmp_path):
    arms = make(tmp_path)
    report = report_of(arms)
    means = {row["rule"]: row["mean"] for row in report.rows}
    share = (means["table"] - means["self"]) / (means["learned"] - means["self"])
    verdict = verdict_of(report, "table")
    assert verdict["retention"] == pytest.approx(share)
    assert verdict["retention_of"] == "learned"
    assert verdict["retention_ci95"][0] < share < verdict["retention_ci95"][1]


def test_retention_is_undefined_without_self(tmp_path):
    arms = [arm for arm in make(tmp_path) if arm.name != "self"]
    report = report_of(arms)
    assert all(one["retention"] is None for one in report.verdicts)
    assert "no arm self" in " ".join(report.tasks[0]["notes"])


def test_best_content_arm_is_chosen_on_validation(tmp_path):
    arms = make(tmp_path)
    flattering = {seed: [(1, 2.0)] for seed in (0, 1, 2)}
    arms = [
        dataclasses.replace(arm, validation=flattering) if arm.name == "raw" else arm
        for arm in arms
    ]
    assert verdict_of(report_of(arms), "table")["retention_of"] == "raw"


def test_diverged_seed_is_left_out_of_both_sides_and_named(written):
    report, _, folder, _ = written
    rows, verdicts = report.of("recall (adjacent)")
    row = next(row for row in rows if row["rule"] == "gaussian")
    assert row["seeds"] == [0, 2]
    assert len(row["per_seed"]) == 2
    assert row["diverged"] == [{"seed": 1, "step": 77}]
    pair = next(one for one in verdicts if one["a"] == "gaussian")
    assert pair["seeds"] == 2
    assert "seed 1 at step 77" in (folder / "report.md").read_text()


def test_an_arm_that_stopped_has_a_row_and_no_verdict(tmp_path):
    arms = make(tmp_path)
    result = facts("recall", "uniform", ACCURACY, (0, 1, 2), stopped="every lane diverged")
    result |= {"per_seed": [None] * 3, "tuning": None, "learning_rate": None}
    folder = tmp_path / "stopped"
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(result))
    stopped = load_arm(folder)
    report = report_of([stopped, *arms])
    assert report.rows[0]["mean"] is None
    assert all("uniform" not in (one["a"], one["b"]) for one in report.verdicts)
    assert "every lane diverged" in " ".join(report.tasks[0]["notes"])
    write(report, {"recall": [stopped, *arms]}, tmp_path / "out")
    assert "every lane diverged" in report_tables.arm_summary(stopped.result)


def test_one_seed_makes_no_claim(tmp_path):
    report = report_of(make(tmp_path, seeds=(0,)))
    assert all(row["ci95"] is None for row in report.rows)
    assert all(one["ci95"] is None for row in report.rows for one in row["by_distance"])
    for verdict in report.verdicts:
        assert verdict["verdict"] == "no difference at this n"
        assert verdict["p_holm"] is None
        assert not verdict["equivalent"]
        assert "supports no claim" in report_tables.sentence(verdict, report.rows[0])


def test_arms_scored_on_different_items_are_refused(tmp_path):
    arms = make(tmp_path)
    other = dataclasses.replace(arms[0], result={**arms[0].result, "data_sha256": "other"})
    with pytest.raises(UserError, match="different data"):
        report_of([other, *arms[1:]])


def test_items_beyond_the_last_edge_have_an_open_bucket(tmp_path):
    arms = make(tmp_path)
    short = dataclasses.replace(references(ACCURACY), distance_edges=(2.0, 4.0))
    report = build({"recall": arms}, {"recall": short}, command="", environment={})
    buckets = [(one["lo"], one["hi"], one["n"]) for one in report.rows[0]["by_distance"]]
    assert buckets == [(None, 2.0, 100), (2.0, 4.0, 100), (4.0, None, 100), (None, None, 100)]


def test_a_matched_arm_is_an_arm_of_its_own(tmp_path):
    arms = make(tmp_path)
    gaussian = next(arm for arm in arms if arm.name == "gaussian")
    matched = dataclasses.replace(gaussian, result={**gaussian.result, "match": "params"})
    report = report_of([*arms, matched])
    assert verdict_of(report, "gaussian (match=params)")
    assert len([row for row in report.rows if row["rule"] == "gaussian"]) == 2


def test_sentences_say_points_and_direction(written):
    rows, verdicts = written[0].of("recall (adjacent)")
    said = report_tables.sentence(verdicts[0], rows[0])
    assert said.startswith("On recall (adjacent), learned is better than self: accuracy higher by")
    assert " points, 95 % interval " in said
    rows, verdicts = written[0].of("smoothing")
    said = report_tables.sentence(verdicts[0], rows[0])
    assert said.startswith("On smoothing, self is better than learned: RMSE / SD lower by 0.8")


def test_tables_hold_chance_and_baselines(written):
    report, _, folder, _ = written
    names = [row[0] for row in report_tables.headline(report, "recall (adjacent)").rows]
    assert names[-3:] == ["chance", "last value", "floor (on 200 of 400 items)"]
    for page in ("report.md", "report.html"):
        text = (folder / page).read_text()
        assert all(name in text for name in names)
        assert "12.5" in text
        assert "edge of grid" in text


def test_page_asks_nobody_for_anything(written):
    page = (written[2] / "report.html").read_text()
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!#)", page)
    assert not re.search(r"<(?:script|link|iframe|img|object)\b|@import|url\((?!#)", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)
    assert page.count("<svg") == 10


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1400])
def test_page_opens_in_a_browser_without_an_error(written, tmp_path, width):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed: this test opens the page in it")
    page, picture = written[2] / "report.html", tmp_path / "page.png"
    quiet = ("--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync")
    command = [chromium, "--headless", "--no-sandbox", *quiet, "--enable-logging=stderr", "--v=0"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1000"]
    command += [f"--screenshot={picture}", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in shown.stderr
    pixels = matplotlib.image.imread(picture)
    assert pixels.shape[1] == width
    # text and figures: a page that failed to draw is of one colour
    assert pixels.std() > 0.05


@pytest.mark.slow
def test_output_is_deterministic(written):
    report, arms, folder, paths = written
    before = {path: path.read_bytes() for path in paths}
    again = write(report, arms, folder / "again")
    assert [path.name for path in again] == [path.name for path in paths]
    for old, new in zip(paths, again, strict=True):
        assert before[old] == new.read_bytes()


def test_markdown_names_every_figure(written):
    folder = written[2]
    linked = re.findall(r"\]\(([^)]+\.svg)\)", (folder / "report.md").read_text())
    assert len(linked) == 10
    assert all((folder / path).exists() for path in linked)


def test_baselines_are_computed_once_for_the_same_data_and_options(tmp_path, monkeypatch):
    few = {"task__test_items": 20, "task__validation_items": 20}
    config = arm_config("recall", **few)
    first = save_baselines(config, tmp_path, "a hash")
    other = save_baselines(arm_config("recall", variant="adjacent", **few), tmp_path, "a hash")
    assert [one.name for one in other.baselines] == [one.name for one in first.baselines]
    monkeypatch.setattr(tasks, "get", lambda name: pytest.fail("computed again"))
    again = save_baselines(config, tmp_path, "a hash")
    for old, new in zip(first.baselines, again.baselines, strict=True):
        assert old.name == new.name
        np.testing.assert_array_equal(old.scores, new.scores)
    assert dataclasses.replace(again, baselines=()) == dataclasses.replace(first, baselines=())
    with pytest.raises(pytest.fail.Exception):
        save_baselines(config, tmp_path, "the hash of other data")


def test_terminal_texts(written):
    _, arms, _, _ = written
    arm = arms["recall (adjacent)"][1]
    text = report_tables.arm_summary(arm.result, arm.estimate())
    for part in ("accuracy (%)", "over 2 seeds", "seed 1 at step 77", "edge of grid", "23,457"):
        assert part in text
    text = report_tables.sweep_table({one.name: one for one in arms["smoothing"]})
    assert "RMSE / SD" in text
    assert len(text.splitlines()) == 1 + len(RULES)


def of_shares(folder, levels):
    """A report of one task on shares 1/4, 1/2 and 1, with the levels of arms at each."""
    arms, found = {}, {}
    for index, (share, name) in enumerate(
        ((1, "tags"), (0.25, "tags (quarter)"), (0.5, "tags (half)"))
    ):
        arms[name] = [
            write_arm(
                folder / str(index) / rule,
                draw(ACCURACY, at[share], (0, 1, 2)),
                facts(name, rule, ACCURACY, (0, 1, 2), share_of_train=share),
            )
            for rule, at in levels.items()
        ]
        found[name] = references(ACCURACY)
    return build(arms, found, command="the command", environment=ENVIRONMENT), arms


@pytest.mark.slow
def test_shares_of_the_data_make_a_curve_with_the_crossover(tmp_path):
    levels = {
        "table": {0.25: 0.75, 0.5: 0.7, 1: 0.75},
        "gaussian": {0.25: 0.3, 0.5: 0.4, 1: 0.45},
        "self": {0.25: 0.4, 0.5: 0.95, 1: 0.99},
        "learned": {0.25: 0.55, 0.5: 0.8, 1: 0.9},
        "learned * table": {0.25: 0.6, 0.5: 0.8, 1: 0.9},
    }
    report, arms = of_shares(tmp_path, levels)
    ((name, family),) = shares.families(report).items()
    assert (name, [one["share_of_train"] for one in family]) == ("tags", [0.25, 0.5, 1])
    assert shares.sentences(report, family) == [
        "learned overtakes table between 1/4 of train, where it is behind, and 1/2.",
        "learned against gaussian: ahead at every share, no crossover seen.",
        "learned against self: no crossover seen, it is not ahead at the largest share.",
    ]
    header = list(shares.table(report, family).header)
    assert header == ["rule", "1/4 of train", "1/2 of train", "1 of train"]
    text = (tmp_path / "page" / "report.md", tmp_path / "page" / "report.html")
    write(report, arms, tmp_path / "page")
    assert all(f"tags: {shares.TITLE.lower()}" in path.read_text() for path in text)
    assert (tmp_path / "page" / "figures" / "tags_shares.svg").exists()


def test_a_task_on_all_its_data_has_no_curve(written):
    assert not shares.families(written[0])


def test_items_may_have_several_scores(tmp_path):
    """As BLEU's have, baselines too: lengths, matches and n-grams of each sentence."""
    metric = Metric("BLEU", "", higher_is_better=True, margin=0.5, statistic="bleu")
    rng = np.random.default_rng(0)

    def counts(seeds, share):
        length = rng.integers(8, 12, (seeds, ITEMS, 1)).astype(float)
        total = np.maximum(length - np.arange(4), 0)
        return np.concatenate([length, length, rng.binomial(total.astype(int), share), total], -1)

    arms = [
        write_arm(tmp_path / rule, counts(2, share), facts("translation", rule, metric, (0, 1)))
        for rule, share in (("learned", 0.6), ("gaussian", 0.4))
    ]
    source = Baseline("the source itself", counts(1, 0.1)[0])
    known = References((source,), ("near", "far"), (0.0, 2.0, 8.0), "words")
    report = build({"translation": arms}, {"translation": known}, command="c", environment={})
    (learned, gaussian) = report.rows
    assert learned["mean"] > gaussian["mean"] > learned["baselines"][0]["mean"] > 0
    assert learned["baselines"][0]["n"] == ITEMS
    page = write(report, {"translation": arms}, tmp_path / "out", {"translation": "weights.html"})[
        2
    ]
    assert 'href="weights.html"' in page.read_text()
