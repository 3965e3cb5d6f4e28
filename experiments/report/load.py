"""What a report reads: finished arms from their workdirs, and a task's baselines, kept on disk."""

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Int

from experiments import tasks
from experiments.config import Config
from experiments.report.statistics import Estimate, interval
from experiments.tasks.base import Baseline
from experiments.tasks.metric import STATISTICS, Metric, Statistic
from experiments.training import metrics

FLOATS = ("values", "weights", "shown", "distance")


@dataclasses.dataclass(frozen=True, eq=False)
class Arm:
    """A finished arm.

    Attributes:
      result: what result.json holds.
      values: score of every seed on every test item; no seeds and no items in an arm that stopped.
      weights: of items in the headline.
      shown: of items in the columns by distance and by group, which may be more.
      cluster: of items.
      distance: of items, NaN where an item has none.
      group: of items, an index.
      validation: steps and validation scores of the main run, by seed.

    """

    result: Mapping[str, Any]
    values: Float64[np.ndarray, "seeds items"]
    weights: Float64[np.ndarray, " items"]
    shown: Float64[np.ndarray, " items"]
    cluster: Int[np.ndarray, " items"]
    distance: Float[np.ndarray, " items"]
    group: Int[np.ndarray, " items"]
    validation: Mapping[int, Sequence[tuple[int, float]]]

    @property
    def name(self) -> str:
        """The rule's label, and what an enlarged arm was matched in."""
        match = self.result.get("match")
        return f"{self.result['rule']} (match={match})" if match else self.result["rule"]

    @property
    def metric(self) -> Metric:
        """The task's headline score."""
        return Metric(**self.result["metric"])

    @property
    def selects(self) -> Metric:
        """What validation is scored by."""
        return Metric(**self.result["selects"])

    @property
    def statistic(self) -> Statistic:
        """The headline as statistics take it."""
        return STATISTICS[self.metric.statistic]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds that count: those that did not diverge and were scored."""
        lost = {lane["seed"] for lane in self.result["diverged"]}
        known = self.result["seeds"][: len(self.values)]
        return tuple(seed for seed in known if seed not in lost)

    def of(self, seeds: Sequence[int]) -> Float64[np.ndarray, "seeds items"]:
        """Scores of some seeds, in their order."""
        rows = [self.result["seeds"].index(seed) for seed in seeds]
        return self.values[rows]

    def estimate(self) -> Estimate | None:
        """The headline over the seeds that count, None where there is none."""
        if not self.seeds:
            return None
        return interval(self.of(self.seeds), self.weights, self.cluster, self.statistic)

    def last_validation(self) -> float | None:
        """The mean over seeds of the last validation score: what an arm may be chosen by."""
        curves = [self.validation[seed] for seed in self.seeds if self.validation.get(seed)]
        return float(np.mean([curve[-1][1] for curve in curves])) if curves else None


def load_arm(workdir: pathlib.Path) -> Arm:
    """Reads result.json, scores.npz and metrics.jsonl of an arm that finished or stopped."""
    workdir = pathlib.Path(workdir)
    result = json.loads((workdir / "result.json").read_text())
    scores = _scores(workdir / "scores.npz") if not result.get("stopped") else _no_scores()
    return Arm(result, **scores, validation=_validation(workdir, result["selects"]["name"]))


def _scores(path: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        floats = {name: file[name].astype(np.float64) for name in FLOATS}
        return {**floats, "cluster": file["cluster"], "group": file["group"]}


def _no_scores() -> dict[str, np.ndarray]:
    whole = {name: np.zeros(0, int) for name in ("cluster", "group")}
    floats = {name: np.zeros(0) for name in FLOATS}
    return {**floats, "values": np.zeros((0, 0)), **whole}


def _validation(workdir: pathlib.Path, metric: str) -> dict[int, list[tuple[int, float]]]:
    """Validation scores of the main run; pilots ran a shorter schedule."""
    curves: dict[int, list[tuple[int, float]]] = {}
    for line in metrics.read(workdir):
        main = line["phase"].startswith("main-") and line["split"] == "validation"
        if main and line.get(metric) is not None:
            curves.setdefault(line["seed"], []).append((line["step"], line[metric]))
    return {seed: sorted(curve) for seed, curve in sorted(curves.items())}


@dataclasses.dataclass(frozen=True)
class References:
    """What a task says of its test items beside the scores of arms.

    Attributes:
      baselines: with per-item scores, NaN where a reference does not exist.
      groups: names of the groups.
      distance_edges: ascending edges of the distance buckets.
      distance_name: axis label.

    """

    baselines: Sequence[Baseline]
    groups: Sequence[str]
    distance_edges: Sequence[float]
    distance_name: str


def save_baselines(config: Config, workdir: pathlib.Path, data_sha256: str) -> References:
    """A task's references, from `workdir`/baselines where the same data and options made them.

    A baseline may take longer than a small arm (n-grams, a width for each family), and a report
    is written again whenever seeds are added.
    """
    task = config.task.to_dict()
    said = json.dumps([task, data_sha256], sort_keys=True)
    key = hashlib.sha256(said.encode()).hexdigest()
    slug = re.sub(r"[^A-Za-z0-9]+", "_", f"{task['name']} {config.variant}").strip("_")
    path = pathlib.Path(workdir) / "baselines" / f"{slug}.npz"
    kept = _read_references(path, key) if path.exists() else None
    if kept is None:
        kept = _make_references(config)
        _write_references(path, key, kept)
    return kept


def _make_references(config: Config) -> References:
    task = tasks.get(config.task.name)(config.task)
    items = task.items("test")
    return References(
        tuple(task.baselines()),
        tuple(items.groups),
        tuple(float(edge) for edge in items.distance_edges),
        items.distance_name,
    )


def _write_references(path: pathlib.Path, key: str, references: References) -> None:
    facts = {
        "key": key,
        "names": [baseline.name for baseline in references.baselines],
        "groups": references.groups,
        "edges": references.distance_edges,
        "distance": references.distance_name,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    scores = [baseline.scores for baseline in references.baselines]
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, facts=np.array(json.dumps(facts)), scores=np.array(scores, np.float64))
    temporary.replace(path)


def _read_references(path: pathlib.Path, key: str) -> References | None:
    with np.load(path) as file:
        facts, scores = json.loads(str(file["facts"])), file["scores"]
    if facts["key"] != key:
        return None
    baselines = [Baseline(*pair) for pair in zip(facts["names"], scores, strict=True)]
    return References(
        tuple(baselines), tuple(facts["groups"]), tuple(facts["edges"]), facts["distance"]
    )
