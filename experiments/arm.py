"""One arm: a task under one rule, tuned by a pilot, trained with all its seeds, tested once.

Everything an arm leaves behind is in its workdir: config.json, tuning.json, metrics.jsonl,
events/, checkpoints/, seeds/SEED.npz, and at the end result.json and scores.npz.
"""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from experiments import tasks
from experiments.config import (
    Config,
    Reader,
    arm_config,
    check_ranges,
    check_workdir,
    claim_workdir,
    from_json,
    leaves,
    override,
    require_all_read,
    write_atomically,
)
from experiments.environment import versions
from experiments.imports import import_modules
from experiments.options import UserError
from experiments.training.cost import flops_per_example, measure, parameters
from experiments.training.lanes import NEVER, Lane, Program
from experiments.training.loop import LOWER, Compiled, Data, Diverged, Phase, run_phase
from experiments.training.optimizer import make_optimizer

OF_ALL_TRIALS = tuple(
    f"training.{key}"
    for key in (
        *("seeds", "steps", "learning_rate", "trials", "pilot_fraction"),
        *("log_every", "evaluate_every", "checkpoint_every", "checkpoints"),
        *("patience", "warm_start"),
    )
)
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The parts of `config.training` that are about an arm and not about one step."""

    seeds: int
    steps: int
    learning_rates: tuple[float, ...]
    pilot_steps: int
    patience: int
    intervals: Mapping[str, Any]

    def pilot(self, trial: int) -> Phase:
        """All learning rates of a trial at seed 0, with the schedule of a shorter run."""
        seeds = (0,) * len(self.learning_rates)
        return Phase(
            f"pilot-{trial}", seeds, self.learning_rates, self.pilot_steps, **self.intervals
        )

    def main(self, seeds: tuple[int, ...], learning_rate: float) -> Phase:
        """The given seeds at the chosen learning rate."""
        name = f"main-{seeds[0]}-{seeds[-1]}"
        rates = (learning_rate,) * len(seeds)
        return Phase(name, seeds, rates, self.steps, patience=self.patience, **self.intervals)


def read_recipe(training: Any) -> Recipe:
    """Reads and checks `config.training`.

    Raises:
      UserError: a number is out of its range.

    """
    if not training.learning_rate or min(training.learning_rate) <= 0:
        raise UserError(
            f"training.learning_rate must hold rates above 0, got {training.learning_rate}"
        )
    if not training.trials:
        raise UserError("training.trials must hold at least one setting, '' for none, got none")
    if not 0 < training.pilot_fraction <= 1:
        raise UserError(f"training.pilot_fraction must be in (0, 1], got {training.pilot_fraction}")
    intervals = {
        key: getattr(training, key)
        for key in ("log_every", "evaluate_every", "checkpoint_every", "checkpoints", "warm_start")
    }
    pilot_steps = max(1, round(training.steps * training.pilot_fraction))
    rates = tuple(float(rate) for rate in training.learning_rate)
    patience = training.patience
    recipe = Recipe(training.seeds, training.steps, rates, pilot_steps, patience, intervals)
    recipe.main((0,), rates[0])  # which checks the intervals
    return recipe


def trial_configs(config: Config) -> list[Config]:
    """The arm's config under each setting of `training.trials`."""
    return [_apply(config, trial) for trial in config.training.trials]


def _apply(config: Config, trial: str) -> Config:
    applied = config.copy_and_resolve_references()
    for assignment in filter(None, (part.strip() for part in trial.split(";"))):
        key, separator, value = assignment.partition("=")
        if not separator:
            raise UserError(f"a setting of training.trials must read key=value, got {assignment!r}")
        if key.strip() in OF_ALL_TRIALS:
            raise UserError(f"{key.strip()} is one for all settings of training.trials: {trial!r}")
        override(applied, key.strip(), value.strip())
    return applied


def make_program(config: Config) -> tuple[Program, Recipe]:
    """Builds everything of an arm that its config describes and checks that every key is read.

    Raises:
      UserError: a key that nothing reads, a rule with no such name, missing data.

    """
    import_modules(config)
    check_ranges(config)
    reader = Reader(config)
    task = tasks.get(reader.task.name)(reader.task)
    rule, model = reader.rule, reader.model
    optimizer = make_optimizer(reader.training)
    smoothing = reader.training.label_smoothing
    try:
        program = Program(
            task, lambda rngs: task.build(rule, model, rngs=rngs), optimizer, smoothing
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    if program.label_smoothing and not task.classifies:
        raise UserError(
            f"training.label_smoothing needs classes, which {task.name} has not: leave it at 0"
        )
    recipe = read_recipe(reader.training)
    _ = reader.label, reader.variant, reader.match, reader.imports, reader.training.trials
    require_all_read(reader, dict(leaves(arm_config(config.task.name))))
    return program, recipe


def run_arm(
    config: Config, workdir: pathlib.Path, progress: Progress, made_by: str, profile: int = 0
) -> dict[str, Any]:
    """Tunes, trains and tests an arm, resuming what is there; returns its result.

    Args:
      config: the arm's config.
      workdir: where everything of the run is kept.
      progress: called with a phase's name, the steps done and their number.
      made_by: the command, for the record.
      profile: steps of the main run to trace, see `run_phase`.

    Raises:
      UserError: the config or the data is wrong; nothing has been written then.
      Diverged: no lane is left. result.json says so as well.

    """
    trials = trial_configs(config)
    programs = [make_program(trial)[0] for trial in trials]
    recipe = make_program(config)[1]
    claim_workdir(workdir, config)
    for name, text in programs[0].task.artefacts.items():
        write_atomically(workdir / name, text)
    compiled = [Compiled(program) for program in programs]
    seeds = range(recipe.seeds)
    try:
        tuning = _tune(compiled, recipe, workdir, config, progress)
        chosen = compiled[tuning["setting"]]
        for group in _groups(workdir, recipe):
            phase = recipe.main(group, tuning["chosen"])
            _train(chosen, phase, workdir, config, progress, profile)
        joined = _join_seeds(workdir, chosen.program, recipe)
        if len(joined["diverged"]) == recipe.seeds:
            last = max(lane["step"] for lane in joined["diverged"])
            raise Diverged(f"every seed diverged, the last at step {last}: {LOWER}")
        from experiments import examples  # brings matplotlib, which commands should not wait for

        examples.keep(chosen.program, workdir, joined["diverged"])
    except Diverged as stop:
        failure = {"seeds": list(seeds), "per_seed": [None] * len(seeds), "stopped": str(stop)}
        _write_result(workdir, _facts(config, trials[0], programs[0], recipe, made_by) | failure)
        raise
    facts = _facts(config, trials[tuning["setting"]], chosen.program, recipe, made_by)
    facts |= {"learning_rate": tuning["chosen"], "tuning": tuning, "stopped": None}
    return _write_result(workdir, facts | joined)


def finished(workdir: pathlib.Path, config: Config) -> dict[str, Any] | None:
    """The result of a workdir that holds all seeds of this very config, else None.

    Raises:
      UserError: the workdir holds another config.

    """
    path = workdir / "result.json"
    if not path.exists():
        return None
    check_workdir(workdir, config)
    result = json.loads(path.read_text())
    return result if len(result["seeds"]) == config.training.seeds else None


def has_cost(workdir: pathlib.Path) -> bool:
    """Whether the result of a finished arm holds its speed and memory."""
    return "peak_bytes" in json.loads((workdir / "result.json").read_text())


def add_cost(workdir: pathlib.Path) -> dict[str, Any]:
    """Measures speed and memory of a finished arm and adds them to its result."""
    result = json.loads((workdir / "result.json").read_text())
    config = from_json((workdir / "config.json").read_text())
    setting = result.get("tuning", {}).get("setting", 0)
    program, _ = make_program(trial_configs(config)[setting])
    cost = measure(program)
    kept = {n: cost[n] for n in ("examples_per_second", "peak_bytes", "compile_seconds")}
    return _write_result(workdir, result | kept)


def lane_steps(config: Config) -> int:
    """Steps of single lanes that an arm takes in all, pilots included."""
    recipe = read_recipe(config.training)
    pilots = len(config.training.trials) * len(recipe.learning_rates)
    pilot = recipe.pilot_steps * pilots if pilots > 1 else 0
    return recipe.steps * recipe.seeds + pilot


def _tune(
    compiled: list[Compiled],
    recipe: Recipe,
    workdir: pathlib.Path,
    config: Config,
    progress: Progress,
) -> dict[str, Any]:
    path = workdir / "tuning.json"
    if path.exists():
        return json.loads(path.read_text())
    settings = list(config.training.trials)
    if len(settings) == len(recipe.learning_rates) == 1:
        choice: dict[str, Any] = {"setting": 0, "chosen": recipe.learning_rates[0]}
        return choice | {"grid": list(recipe.learning_rates), "settings": settings, "scores": []}
    scores = np.stack(
        [
            _pilot_scores(one, recipe.pilot(index), workdir, config, progress)
            for index, one in enumerate(compiled)
        ]
    )
    selecting = compiled[0].program.task.selecting
    tuning = choose(scores, recipe.learning_rates, selecting.higher_is_better)
    tuning["settings"] = settings
    write_atomically(path, json.dumps(tuning, indent=2) + "\n")
    for index in range(len(compiled)):
        shutil.rmtree(workdir / "checkpoints" / f"pilot-{index}", ignore_errors=True)
    return tuning


def _pilot_scores(
    compiled: Compiled, phase: Phase, workdir: pathlib.Path, config: Config, progress: Progress
) -> np.ndarray:
    """Validation scores of a pilot, one a learning rate; NaN where the lane diverged."""
    try:
        lanes, _ = run_phase(compiled, phase, workdir, config.to_dict(), progress)
    except Diverged:
        return np.full(len(phase.seeds), np.nan)
    metric = compiled.program.task.selecting
    scores = metric.mean(*compiled.evaluate(lanes.params, "validation"))
    return np.where(np.asarray(lanes.diverged) == NEVER, scores, np.nan)


def choose(scores: np.ndarray, rates: tuple[float, ...], higher_is_better: bool) -> dict[str, Any]:
    """The best setting and learning rate by validation score [settings, rates].

    Raises:
      Diverged: every score is NaN.

    """
    if np.isnan(scores).all():
        raise Diverged(f"every learning rate of the grid diverged in the pilot: {LOWER}")
    best = np.nanargmax(scores) if higher_is_better else np.nanargmin(scores)
    setting, rate = (int(i) for i in np.unravel_index(best, scores.shape))
    ends = (min(rates), max(rates))
    return {
        "grid": list(rates),
        "scores": [[None if np.isnan(s) else float(s) for s in row] for row in scores],
        "setting": setting,
        "chosen": rates[rate],
        "at_edge": len(rates) > 1 and rates[rate] in ends,
    }


def _groups(workdir: pathlib.Path, recipe: Recipe) -> list[tuple[int, ...]]:
    """The seeds still to train, in the groups in which they were or will be started."""
    done = {seed for seed in range(recipe.seeds) if _seed_file(workdir, seed).exists()}
    started = [
        tuple(range(int(first), int(last) + 1))
        for _, first, last in (
            path.name.split("-") for path in sorted(workdir.glob("checkpoints/main-*-*"))
        )
    ]
    groups = [group for group in started if not done.issuperset(group)]
    rest = sorted(set(range(recipe.seeds)) - done - {seed for group in groups for seed in group})
    return groups + ([tuple(rest)] if rest else [])


def _seed_file(workdir: pathlib.Path, seed: int) -> pathlib.Path:
    return workdir / "seeds" / f"{seed}.npz"


def _train(
    compiled: Compiled,
    phase: Phase,
    workdir: pathlib.Path,
    config: Config,
    progress: Progress,
    profile: int,
) -> None:
    """Trains and tests some seeds; where all of them diverge, other seeds still count."""
    try:
        lanes, seconds = run_phase(compiled, phase, workdir, config.to_dict(), progress, profile)
    except Diverged as stop:
        lanes, seconds = stop.lanes, 0.0
    _test(compiled, lanes, tuple(phase.seeds), workdir, seconds)


def _test(
    compiled: Compiled, lanes: Lane, seeds: tuple[int, ...], workdir: pathlib.Path, seconds: float
) -> None:
    """One look at the test split: per-item scores of each seed."""
    values, weights = compiled.evaluate(lanes.params, "test")
    (workdir / "seeds").mkdir(exist_ok=True)
    for index, seed in enumerate(seeds):
        path = _seed_file(workdir, seed)
        temporary = path.with_suffix(".tmp.npz")
        np.savez(
            temporary,
            values=values[index].astype(np.float32),
            weights=weights,
            diverged=int(lanes.diverged[index]),
            seconds=seconds / len(seeds),
        )
        temporary.replace(path)


def _join_seeds(workdir: pathlib.Path, program: Program, recipe: Recipe) -> dict[str, Any]:
    """Writes scores.npz of all seeds and returns their means."""
    parts = [np.load(_seed_file(workdir, seed)) for seed in range(recipe.seeds)]
    values = np.stack([part["values"] for part in parts])
    weights = parts[0]["weights"]
    items = program.task.items("test")
    headline = weights if items.beyond is None else np.where(items.beyond, 0, weights)
    np.savez(
        workdir / "scores.npz",
        values=values,
        weights=headline.astype(np.float32),
        shown=weights.astype(np.float32),
        cluster=items.cluster,
        distance=items.distance,
        group=items.group,
    )
    diverged = [
        {"seed": seed, "step": int(part["diverged"])}
        for seed, part in enumerate(parts)
        if part["diverged"] != NEVER
    ]
    means = program.task.metric.mean(values.astype(np.float64), headline)
    return {
        "seeds": list(range(recipe.seeds)),
        "per_seed": [float(mean) if np.isfinite(mean) else None for mean in means],
        "diverged": diverged,
        "train_seconds": sum(float(part["seconds"]) for part in parts),
    }


def _facts(
    config: Config, used: Config, program: Program, recipe: Recipe, made_by: str
) -> dict[str, Any]:
    """What a result says beside its scores."""
    batch = Data(program, (0,)).next()
    one_lane = {name: array[0] for name, array in batch.items()}
    return {
        "task": f"{config.task.name} ({config.variant})" if config.variant else config.task.name,
        "rule": config.label or config.rule,
        "rule_spec": used.rule,
        "metric": dataclasses.asdict(program.task.metric),
        "selects": dataclasses.asdict(program.task.selecting),
        "split": "test",
        "steps": recipe.steps,
        "batch_size": len(next(iter(one_lane.values()))),
        "diverged": [],
        "params": parameters(program),
        "flops_per_example": flops_per_example(program, one_lane),
        "position_encoding": used.model.get("position_encoding"),
        "match": config.match or None,
        "command": made_by,
        "environment": versions(),
        **program.task.describe(),
    }


def _write_result(workdir: pathlib.Path, result: dict[str, Any]) -> dict[str, Any]:
    write_atomically(workdir / "result.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    return result
