"""The best rule of distance, given as many parameters as learned attention has.

The headline comparison is unmatched in size: a rule of distance has no query and key
projections. The matched arm spends what it saved on a wider feed-forward layer.
"""

import json
from collections.abc import Sequence

from experiments.arm import make_program, trial_configs
from experiments.cells import Cell
from experiments.config import Config, default_workdir, override
from experiments.report.load import load_arm
from experiments.training.cost import parameters

DISTANCE_RULES = ("gaussian", "exponential", "table")
REFERENCE = "learned"


def matched_in_parameters(cells: Sequence[Cell]) -> list[Cell]:
    """One more cell a task: its best distance rule by validation score, as large as `learned`.

    A task without a feed-forward layer, or a comparison without `learned` or without a rule of
    distance, gets none.
    """
    by_task: dict[tuple[str, str], dict[str, Cell]] = {}
    for cell in cells:
        by_task.setdefault((cell.config.task.name, cell.config.variant), {})[cell.config.label] = (
            cell
        )
    return [cell for arms in by_task.values() for cell in _matched(arms)]


def _matched(arms: dict[str, Cell]) -> list[Cell]:
    candidates = [arms[rule] for rule in DISTANCE_RULES if rule in arms]
    candidates = [cell for cell in candidates if _validation_score(cell) is not None]
    if REFERENCE not in arms or not candidates:
        return []
    if "mlp_features" not in arms[REFERENCE].config.model:
        return []
    best = max(candidates, key=lambda cell: _validation_score(cell) or 0.0)
    config = _as_chosen(best)
    target = _parameters(_as_chosen(arms[REFERENCE]))
    override(config, "training.trials", ("",))
    override(config, "model.mlp_features", _matching_width(config, target))
    override(config, "match", "params")
    root = best.workdir.parent.parent
    name = f"{best.name} (as many parameters as {REFERENCE})"
    return [Cell(name, config, default_workdir(config, str(root)))]


def _as_chosen(cell: Cell) -> Config:
    """The config of a finished arm with the setting that its pilot chose."""
    result = json.loads((cell.workdir / "result.json").read_text())
    setting = result.get("tuning", {}).get("setting", 0)
    return trial_configs(cell.config)[setting].copy_and_resolve_references()


def _validation_score(cell: Cell) -> float | None:
    """The last validation score, mean over seeds, negated where lower is better."""
    arm = load_arm(cell.workdir)
    score = arm.last_validation()
    return score if score is None or arm.metric.higher_is_better else -score


def _parameters(config: Config, mlp_features: int | None = None) -> int:
    sized = config.copy_and_resolve_references()
    if mlp_features is not None:
        override(sized, "model.mlp_features", mlp_features)
    return parameters(make_program(sized)[0])


def _matching_width(config: Config, target: int) -> int:
    """The width of the feed-forward layer that comes nearest to `target` parameters.

    Parameters are linear in the width, so two counts give the line.
    """
    start = config.model.mlp_features or 4 * config.model.features
    base, next_one = _parameters(config, start), _parameters(config, start + 1)
    return max(1, start + round((target - base) / (next_one - base)))
