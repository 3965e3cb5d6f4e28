"""Rows and verdicts of a report, from the scores of arms; every number here is JSON."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64

from experiments.options import UserError
from experiments.report.load import Arm, References
from experiments.report.statistics import (
    Difference,
    Estimate,
    Retention,
    by_bucket,
    equivalent,
    holm,
    interval,
    paired,
    retention,
    verdict,
)
from experiments.tasks.base import Baseline

REFERENCE, FLOOR = "learned", "self"
FURTHER_PAIRS = (
    ("table", "gaussian"),
    ("recurrent, last state only", "recurrent, additive attention"),
    ("fixed patterns, one learned head", "learned, eight heads"),
)
COPIED = (
    "rule_spec",
    "split",
    "steps",
    "params",
    "flops_per_example",
    "examples_per_second",
    "peak_bytes",
    "learning_rate",
    "position_encoding",
    "match",
    "diverged",
    "stopped",
    "compile_seconds",
    "train_seconds",
    "batch_size",
    "data_sha256",
    "padding",
    "dropped",
    "command",
)
SHARED = ("data_sha256", "padding", "dropped", "split", "share_of_train")
"""Likewise of a task."""
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Report:
    """A comparison as JSON.

    Attributes:
      rows: one for each arm of each task.
      verdicts: one for each declared pair of each task.
      tasks: what the arms of a task share, and notes on what has no verdict.
      environment: versions, machine and the command.

    """

    rows: list[Row]
    verdicts: list[Row]
    tasks: list[Row]
    environment: Row

    def of(self, task: str) -> tuple[list[Row], list[Row]]:
        """Rows and verdicts of one task."""
        rows = [row for row in self.rows if row["task"] == task]
        return rows, [one for one in self.verdicts if one["task"] == task]


def build(
    arms: Mapping[str, Sequence[Arm]],
    baselines: Mapping[str, References],
    *,
    command: str,
    environment: Mapping[str, Any],
) -> Report:
    """The report of arms by task.

    Raises:
      UserError: two arms of a task were not scored on the same items of the same data.

    """
    report = Report([], [], [], {**environment, "command": command})
    for task, members in arms.items():
        _require_same_items(task, members)
        report.rows.extend(_row(task, arm, baselines[task]) for arm in members)
        verdicts, notes = _verdicts(task, members)
        report.verdicts.extend(verdicts)
        report.tasks.append(_task(task, members, baselines[task], notes))
    return report


def _require_same_items(task: str, arms: Sequence[Arm]) -> None:
    scored = [arm for arm in arms if len(arm.values)]
    for arm in scored[1:]:
        first = scored[0]
        same = all(
            np.array_equal(getattr(arm, name), getattr(first, name))
            for name in ("weights", "shown", "cluster")
        )
        if not same or arm.result["data_sha256"] != first.result["data_sha256"]:
            raise UserError(
                f"the arms of {task} must share one test set, but {arm.name!r} and {first.name!r} "
                "were scored on different data: run one of them again"
            )


def _row(task: str, arm: Arm, references: References) -> Row:
    metric, tuning = arm.metric, arm.result.get("tuning") or {}
    copied = {name: arm.result.get(name) for name in COPIED}
    return {
        "task": task,
        "rule": arm.result["rule"],
        "name": arm.name,
        "metric": metric.name,
        "unit": metric.unit,
        "higher_is_better": metric.higher_is_better,
        "chance": metric.chance,
        **_score(arm),
        **copied,
        "tuning": {
            "grid": tuning.get("grid", []),
            "chosen": tuning.get("chosen"),
            "at_edge": bool(tuning.get("at_edge", False)),
            "setting": _setting(tuning),
            "scores": tuning.get("scores", []),
        },
        "baselines": [
            _baseline(arm, one.name, one.scores, references) for one in _existing(arm, references)
        ],
        "by_distance": _by_distance(arm, references) if arm.seeds else [],
        "by_group": _by_group(arm, references) if arm.seeds else [],
    }


def _setting(tuning: Mapping[str, Any]) -> str:
    """The chosen setting of several; "" where there was nothing to choose."""
    settings = tuning.get("settings") or [""]
    return settings[tuning.get("setting", 0)]


def _score(arm: Arm) -> Row:
    """Mean and interval over the seeds that count; no interval where it would claim too much."""
    estimate = arm.estimate()
    means = arm.metric.mean(arm.of(arm.seeds), arm.weights) if arm.seeds else []
    return {
        "mean": estimate.mean if estimate else None,
        "ci95": _possible(arm, _ends(estimate)),
        "seeds": list(arm.seeds),
        "per_seed": [float(mean) for mean in means],
    }


def _ends(estimate: Estimate | None) -> list[float] | None:
    """The interval; None with one seed, whose spread nobody knows, and with one cluster."""
    if estimate is None or estimate.seeds < 2 or not math.isfinite(estimate.standard_error):
        return None
    return [estimate.low, estimate.high]


def _possible(arm: Arm, ends: list[float] | None) -> list[float] | None:
    """The part of an interval where the score can be: what is cut off could cover nothing."""
    if ends is None:
        return None
    return [float(end) for end in np.clip(ends, 0, 1 if arm.metric.unit == "%" else None)]


def _existing(arm: Arm, references: References) -> list[Baseline]:
    """The baselines that have a score on some of the items."""
    fitting = [one for one in references.baselines if len(one.scores) == len(arm.weights)]
    return [one for one in fitting if np.isfinite(one.scores).any()]


def _baseline(
    arm: Arm, name: str, scores: Float64[np.ndarray, "items *K"], references: References
) -> Row:
    """A baseline's score, over the `n` items on which it exists."""
    # a score of an item may be several numbers, as BLEU's counts are
    finite = np.isfinite(scores).reshape(len(scores), -1).all(-1)
    exists, shown = (finite & (w > 0) for w in (arm.weights, arm.shown))
    groups = [
        {"group": group, "mean": _mean(arm, scores, shown & (arm.group == index))}
        for index, group in enumerate(references.groups)
    ]
    return {
        "name": name,
        "mean": _mean(arm, scores, exists),
        "n": int(exists.sum()),
        "of": int((arm.weights > 0).sum()),
        "by_group": [group for group in groups if group["mean"] is not None],
    }


def _mean(
    arm: Arm, scores: Float64[np.ndarray, "items *K"], inside: Bool[np.ndarray, " items"]
) -> float | None:
    return float(arm.metric.mean(scores[inside], arm.shown[inside])) if inside.any() else None


def _by_distance(arm: Arm, references: References) -> list[Row]:
    missing = np.isnan(arm.distance)
    if missing.all():
        return []
    rows = by_bucket(
        arm.of(arm.seeds),
        arm.shown,
        arm.cluster,
        arm.distance,
        _covering(references.distance_edges, arm.distance[~missing]),
        arm.statistic,
        never=bool(missing.any()),
    )
    claims = len(arm.seeds) > 1
    return [{**row, "ci95": _possible(arm, row["ci95"] if claims else None)} for row in rows]


def _covering(edges: Sequence[float], distance: Float64[np.ndarray, " known"]) -> list[float]:
    """Edges with an open bucket at an end that some item lies beyond: none is left out."""
    below = [-math.inf] if distance.min() < edges[0] else []
    above = [math.inf] if distance.max() >= edges[-1] else []
    return [*below, *edges, *above]


def _by_group(arm: Arm, references: References) -> list[Row]:
    rows, values = [], arm.of(arm.seeds)
    for index, name in enumerate(references.groups):
        inside = (arm.group == index) & (arm.shown > 0)
        if inside.any():
            estimate = interval(
                values[:, inside], arm.shown[inside], arm.cluster[inside], arm.statistic
            )
            shown = {"mean": estimate.mean, "ci95": _possible(arm, _ends(estimate))}
            rows.append({"group": name, "n": int(inside.sum()), **shown})
    return rows


def _task(
    task: str, arms: Sequence[Arm], references: References, notes: Sequence[str]
) -> dict[str, Any]:
    arm = next((arm for arm in arms if len(arm.values)), arms[0])
    known = arm.distance[~np.isnan(arm.distance)]
    return {
        "task": task,
        **arm.result["metric"],
        "items": int((arm.weights > 0).sum()),
        "clusters": len(np.unique(arm.cluster[arm.weights > 0])),
        "distance_name": references.distance_name,
        "whole_distances": bool((known == np.round(known)).all()),
        "groups": list(references.groups),
        **{name: arm.result.get(name) for name in SHARED},
        "notes": [*_lost(arms), *notes],
    }


def _lost(arms: Sequence[Arm]) -> list[str]:
    """A sentence for every arm that lost seeds or stopped."""
    notes = []
    for arm in arms:
        lanes = [f"seed {lane['seed']} at step {lane['step']}" for lane in arm.result["diverged"]]
        if arm.result.get("stopped"):
            notes.append(f"{arm.name} has no score: {arm.result['stopped']}.")
        elif lanes:
            notes.append(
                f"{arm.name} diverged in {', '.join(lanes)}: left out of its score, and of both "
                "sides of its pairs."
            )
    return notes


def _verdicts(task: str, arms: Sequence[Arm]) -> tuple[list[Row], list[str]]:
    """The declared pairs with Holm's p-values over this task, and notes on what is missing."""
    best, notes = _best_content(arms), []
    pairs = []
    for a, b in _declared(arms):
        seeds = [seed for seed in a.seeds if seed in b.seeds]
        if seeds:
            pairs.append((a, b, _difference(a, b, seeds)))
        else:
            notes.append(f"{a.name} and {b.name} have no verdict: no seed of both was scored.")
    claims = [pair for pair in pairs if pair[2].estimate.seeds > 1]
    adjusted = iter(holm([difference.p for _, _, difference in claims]))
    verdicts = []
    for a, b, difference in pairs:
        p = float(next(adjusted)) if difference.estimate.seeds > 1 else None
        kept = _retention(a, arms, best)
        verdicts.append(_verdict(task, a, b, difference, p, kept, best))
    return verdicts, notes + _without_retention(arms, best)


def _declared(arms: Sequence[Arm]) -> list[tuple[Arm, Arm]]:
    """Each arm against `learned`, then `FURTHER_PAIRS`."""
    by_name = {arm.name: arm for arm in arms}
    pairs = []
    if REFERENCE in by_name:
        pairs = [(arm, by_name[REFERENCE]) for arm in arms if arm.name != REFERENCE]
    further = [pair for pair in FURTHER_PAIRS if all(name in by_name for name in pair)]
    return pairs + [(by_name[a], by_name[b]) for a, b in further]


def _difference(a: Arm, b: Arm, seeds: Sequence[int]) -> Difference:
    return paired(a.of(seeds), b.of(seeds), a.weights, a.cluster, a.statistic)


def _verdict(
    task: str,
    a: Arm,
    b: Arm,
    difference: Difference,
    p: float | None,
    kept: Retention | None,
    best: Arm | None,
) -> Row:
    metric, estimate = a.metric, difference.estimate
    margin = metric.margin
    if metric.margin_is_relative:
        margin *= abs(float(np.mean(metric.mean(b.of(b.seeds), b.weights))))
    return {
        "task": task,
        "a": a.name,
        "b": b.name,
        "difference": estimate.mean,
        "ci95": _ends(estimate),
        "verdict": verdict(estimate, 1.0 if p is None else p, margin, metric.higher_is_better),
        "p": difference.p if p is not None else None,
        "p_holm": p,
        "margin": margin,
        "equivalent": equivalent(estimate, margin),
        "seeds": estimate.seeds,
        "retention": kept.value if kept else None,
        "retention_ci95": [kept.low, kept.high] if kept else None,
        "retention_of": best.name if kept and best else None,
    }


def is_content(name: str) -> bool:
    """Whether an arm is one of content: among these retention takes the best."""
    return name in ("raw", REFERENCE) or name.startswith(f"{REFERENCE} *")


def _best_content(arms: Sequence[Arm]) -> Arm | None:
    """The best arm of content, by validation where all have it: choosing on test is peeking."""
    candidates = [
        arm for arm in arms if is_content(arm.name) and not arm.result.get("match") and arm.seeds
    ]
    scores = {id(arm): arm.last_validation() for arm in candidates}
    metric = arms[0].selects
    if None in scores.values():
        scores, metric = {id(arm): _score(arm)["mean"] for arm in candidates}, arms[0].metric
    sign = 1 if metric.higher_is_better else -1
    return max(candidates, key=lambda arm: sign * (scores[id(arm)] or 0.0), default=None)


def _retention(arm: Arm, arms: Sequence[Arm], best: Arm | None) -> Retention | None:
    """The share of the best content arm's gain over `self` that an arm keeps, where defined."""
    floor = next((one for one in arms if one.name == FLOOR), None)
    if floor is None or best is None:
        return None
    seeds = [seed for seed in arm.seeds if seed in floor.seeds and seed in best.seeds]
    if len(seeds) < 2:
        return None
    rule, self_, content = (one.of(seeds) for one in (arm, floor, best))
    return retention(rule, self_, content, arm.weights, arm.cluster, arm.statistic)


def _without_retention(arms: Sequence[Arm], best: Arm | None) -> list[str]:
    """Why no arm of a task has a retention, if so."""
    if best is None:
        return ["Retention is undefined: there is no scored arm of content."]
    if all(arm.name != FLOOR for arm in arms):
        return ["Retention is undefined: there is no arm self."]
    if _retention(best, arms, best) is None:
        return [
            f"Retention is undefined: what {best.name} adds to self cannot be told from nothing "
            "with these seeds."
        ]
    return []
