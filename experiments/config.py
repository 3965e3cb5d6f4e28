"""Configs: declared options, overrides, the check that every key is read, and workdirs."""

import difflib
import hashlib
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from experiments import tabular, tasks
from experiments.arms import MAIN_ARMS
from experiments.options import Option, UserError

Config = Any
"""A ConfigDict: its keys are data, which no type checker knows."""

ARM_OPTIONS: Mapping[str, Any] = {
    "rule": Option("learned", "the rule of attention by name, see attn_jax.rules"),
    "label": Option("", "the arm's name in tables; empty: the rule itself"),
    "variant": Option("", "name of a harder form of the task, shown behind the task's name"),
    "match": Option("", "what an enlarged arm was matched in, for instance params; a label only"),
    "imports": Option((), "modules that are run first, such as one that registers a kernel"),
    "training": {
        "seeds": Option(3, "number of seeds; raising it later trains only the new ones", 1),
        "steps": Option(500, "optimiser steps of the main run", 1),
        "learning_rate": Option(
            (1e-3, 3e-3, 1e-2), "peak rate; more than one: a pilot of each chooses on validation"
        ),
        "trials": Option(
            ("",),
            "settings tried in the pilot, each 'key=value; key=value' of this config; '' is as is",
        ),
        "pilot_fraction": Option(0.25, "length of a pilot as a share of `steps`, at most 1", 0),
        "schedule": Option("cosine", "after the warm-up: cosine, rsqrt or constant"),
        "warmup_fraction": Option(0.05, "linear warm-up as a share of the run", 0, 1),
        "weight_decay": Option(0.01, "decoupled; never on biases, norms, widths, gates, tables", 0),
        "beta1": Option(0.9, "Adam's decay of the first moment", 0, 1),
        "beta2": Option(0.98, "Adam's decay of the second moment", 0, 1),
        "epsilon": Option(1e-9, "Adam's addend to the root of the second moment", 0),
        "clip_norm": Option(1.0, "gradients above this global norm are scaled to it; 0: never", 0),
        "label_smoothing": Option(
            0.0, "probability mass spread over all classes in the loss", 0, 1
        ),
        "log_every": Option(25, "steps between two lines of training metrics", 1),
        "evaluate_every": Option(125, "steps between two validation scores in the main run", 1),
        "checkpoint_every": Option(
            250, "steps between two checkpoints, a multiple of log_every", 1
        ),
        "patience": Option(
            0, "stop after so many validation scores that are no better than the best; 0: never", 0
        ),
        "warm_start": Option("", "workdir of a run whose parameters are the initial values"),
        "checkpoints": Option(2, "how many checkpoints are kept, the newest", 1),
    },
}
COMPARISON_OPTIONS: Mapping[str, Option] = {
    "tasks": Option(
        ("smoothing", "recall", "pronouns", "text"), "tasks, each with its configs/TASK.py"
    ),
    "arms": Option(MAIN_ARMS, "arms by name, see experiments/arms.py, or rules"),
    "size": Option("", "handed to every task's config: '', quick or full"),
    "seeds": Option(3, "seeds of every arm; raising it later trains only the new ones", 1),
    "learning_rate": Option((), "grid of peak rates of every arm; (): the task's own"),
    "budget": Option(1.0, "factor on every task's training steps", 0),
    "own_settings": Option(False, "every arm also tries three settings of its own in the pilot"),
    "match_params": Option(False, "add the best distance rule with as many parameters as learned"),
    "overrides": Option((), "further changes, each 'TASK.key=value': tagging.task.path=FOLDER"),
    "imports": Option((), "modules that are run first, such as one that registers a kernel"),
    "workers": Option(2, "processes, each bound to one core", 1),
}
KEYS_OF_A_RUN_NOT_OF_ITS_MEANING = ("training.seeds", "seeds", "workers", "imports")


def options_of(task: str) -> dict[str, Any]:
    """The tree of options of one task's arm.

    Raises:
      UserError: there is no such task.

    """
    kind = tasks.get(task)
    listed = ", ".join(sorted(tasks.names()))
    name = Option(task, f"the task, one of: {listed}; or a class of your own, module:Class")
    return {
        **ARM_OPTIONS,
        "task": {"name": name, **kind.options},
        "model": dict(kind.model_options),
    }


def check_ranges(config: Config) -> None:
    """Raises UserError for a number outside of its option's range, or another task's config."""
    known = options_of(config.task.name) if "task" in config else COMPARISON_OPTIONS
    values = dict(leaves(config))
    for key, option in leaves(known):
        if key not in values:
            raise UserError(
                f"a config of the task {config.task.name} has a key {key}, which this one has not: "
                f"start from configs/{config.task.name}.py instead of setting task.name"
            )
        option.check(key, values[key])


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and leaves of a nested mapping, in order."""
    for key, value in tree.items():
        if isinstance(value, Mapping | ConfigDict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def comparison_config(**overrides: Any) -> Config:
    """The config of a comparison, with overrides.

    Raises:
      UserError: an override names no option of a comparison.

    """
    config = ConfigDict(_defaults(COMPARISON_OPTIONS))
    for key, value in overrides.items():
        override(config, key, value)
    return config.lock()


def arm_config(task: str, **overrides: Any) -> Config:
    """The config of one arm of `task`, with overrides written as `training__steps=500`.

    Raises:
      UserError: an override names no option of the task.

    """
    config = ConfigDict(_defaults(options_of(task)))
    for key, value in overrides.items():
        override(config, key.replace("__", "."), value)
    return config.lock()


def sized(sizes: Mapping[str, Mapping[str, Any]], argument: str) -> dict[str, Any]:
    """The overrides of the argument behind a config file's colon: names joined by commas.

    Raises:
      UserError: the file has no such size or variant.

    """
    overrides: dict[str, Any] = {}
    for name in filter(None, argument.split(",")):
        if name not in sizes:
            known = ", ".join(f":{size}" for size in sizes)
            raise UserError(f"this config file knows {known}, got :{name}")
        overrides |= sizes[name]
    return overrides


def _defaults(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value.default if isinstance(value, Option) else _defaults(value)
        for key, value in tree.items()
    }


def override(config: Config, key: str, value: Any) -> None:
    """Sets a dotted key; text is read as the type that the key has.

    Raises:
      UserError: no such key (names the nearest), or text that does not read as its type.

    """
    known = dict(leaves(config))
    if key not in known:
        raise UserError(unknown_key(key, list(known)))
    if isinstance(value, str) and not isinstance(known[key], str):
        value = _read(key, value, known[key])
    with config.unlocked():
        config.update_from_flattened_dict({key: value})


def _read(key: str, text: str, like: Any) -> Any:
    try:
        value = json.loads(text.strip().lower() if isinstance(like, bool) else text)
        if isinstance(like, tuple):
            return tuple(value) if isinstance(value, list) else (value,)
        if isinstance(like, bool) != isinstance(value, bool):
            raise ValueError
        return type(like)(value)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"config key {key} takes a {type(like).__name__} such as {like!r}, got {text!r}"
        ) from error


def unknown_key(key: str, known: list[str]) -> str:
    """One sentence that names an unknown key and the nearest valid one."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return (
        f"config has no key {key!r}: did you mean {near[0]!r}? --help_config lists every key"
        if near
        else f"config has no key {key!r}: it has no keys at all"
    )


class Reader:
    """A config whose attribute reads are remembered, so that a key nobody reads is found."""

    def __init__(self, tree: Config, prefix: str = "", log: set[str] | None = None):
        self._tree, self._prefix = tree, prefix
        self._log: set[str] = set() if log is None else log

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._tree:
            raise AttributeError(f"the config has no key {self._prefix + name!r}")
        value = self._tree[name]
        if isinstance(value, ConfigDict):
            return Reader(value, f"{self._prefix}{name}.", self._log)
        self._log.add(self._prefix + name)
        return value

    def unread(self) -> list[str]:
        """Keys below this node that nothing has read yet."""
        keys = (self._prefix + key for key, _ in leaves(self._tree))
        return [key for key in keys if key not in self._log]


def require_all_read(reader: Reader, defaults: Mapping[str, Any]) -> None:
    """Stops a run whose config holds a key that nothing reads and that is not at its default.

    A key at its default that this variant does not need (a rate of an unused schedule, say)
    asks for nothing; a changed one would be ignored silently.

    Raises:
      UserError: names the keys.

    """
    config = dict(leaves(reader._tree))
    ignored = [key for key in reader.unread() if config[key] != defaults.get(key)]
    if ignored:
        raise UserError(
            f"nothing reads the config key {', '.join(ignored)} in this run: "
            "leave it at its default or choose the variant that uses it"
        )


def help_text(config: Config) -> str:
    """Every key of a config with its value and meaning, a line each."""
    known = options_of(config.task.name) if "task" in config else COMPARISON_OPTIONS
    meanings = {key: option.meaning for key, option in leaves(known)}
    rows = [(f"--config.{k}", repr(v), meanings[k]) for k, v in leaves(config)]
    return tabular.text([("key", "default", "meaning"), *rows])


def to_json(config: Config) -> str:
    """The whole config as text; equal configs give equal text."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> Config:
    """The inverse of `to_json` (lists come back as tuples)."""

    def tuples(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: tuples(v) for k, v in value.items()}
        return tuple(tuples(v) for v in value) if isinstance(value, list) else value

    return ConfigDict(tuples(json.loads(text))).lock()


def completed(config: Config) -> Config:
    """A stored config with the options that came after it, at their defaults: as it was run.

    Raises:
      UserError: its task is not found.

    """
    known = options_of(config.task.name) if "task" in config else COMPARISON_OPTIONS
    values = {**dict(leaves(_defaults(known))), **dict(leaves(config))}
    whole = ConfigDict(_defaults(known))
    with whole.unlocked():
        whole.update_from_flattened_dict(values)
    return whole.lock()


def differences(old: Config, new: Config) -> list[str]:
    """`key: old -> new` for every key that changes what a run means."""
    a, b = dict(leaves(old)), dict(leaves(new))
    keys = [k for k in sorted({*a, *b}) if k not in KEYS_OF_A_RUN_NOT_OF_ITS_MEANING]
    missing = object()
    return [
        f"{k}: {a.get(k, '(absent)')!r} -> {b.get(k, '(absent)')!r}"
        for k in keys
        if a.get(k, missing) != b.get(k, missing)
    ]


def digest(config: Config) -> str:
    """Eight hexadecimal digits that change with every key that changes what a run means."""
    meaning = {k: v for k, v in leaves(config) if k not in KEYS_OF_A_RUN_NOT_OF_ITS_MEANING}
    return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()[:8]


def default_workdir(config: Config, root: str = "runs") -> pathlib.Path:
    """runs/TASK/RULE-HASH."""
    name = config.label or config.rule
    slug = re.sub(r"[^A-Za-z0-9]+", "_", name.replace("*", "x")).strip("_")[:48]
    task = config.task.name.replace(":", ".")
    return pathlib.Path(root) / task / f"{slug}-{digest(config)}"


def check_workdir(workdir: pathlib.Path, config: Config) -> None:
    """Checks that a workdir is new or holds this config; writes nothing.

    Raises:
      UserError: the workdir holds another config; names the differences.

    """
    path = workdir / "config.json"
    if path.exists():
        changed = differences(completed(from_json(path.read_text())), completed(config))
        if changed:
            raise UserError(
                f"{workdir} holds a run of another config ({'; '.join(changed)}): "
                "choose another --workdir, or repeat the command it was made with"
            )
    elif workdir.exists() and any(workdir.iterdir()):
        raise UserError(
            f"{workdir} is not empty and holds no run (no config.json): choose another --workdir"
        )


def claim_workdir(workdir: pathlib.Path, config: Config) -> None:
    """Writes the config into a workdir that is new or holds the same one.

    Raises:
      UserError: see `check_workdir`; nothing is written then.

    """
    check_workdir(workdir, config)
    write_atomically(workdir / "config.json", to_json(config))


def write_atomically(path: pathlib.Path, text: str) -> None:
    """A reader, or a run killed meanwhile, sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)
