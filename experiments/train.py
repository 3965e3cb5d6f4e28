"""Trains one arm with all its seeds, tests it and prints its score.

    python -m experiments.train --config=configs/recall.py --config.rule='gaussian(width=4)'

The same command resumes a run that was stopped; a larger --config.training.seeds trains only the
new seeds.
"""

import pathlib

from absl import flags

from experiments import cli
from experiments.arm import add_cost, finished, has_cost, run_arm
from experiments.config import default_workdir, override
from experiments.environment import command
from experiments.progress import Bar
from experiments.report.load import load_arm
from experiments.report.tables import arm_summary

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "where the run is kept; the default is runs/TASK/RULE-HASH"
)


_WARM_START = flags.DEFINE_string(
    "warm_start", None, "begin with the parameters of this run; sets config.training.warm_start"
)
_EARLY_STOPPING = flags.DEFINE_integer(
    "early_stopping",
    None,
    "stop after so many validations without a better score; sets config.training.patience",
    lower_bound=0,
)
_PROFILE = flags.DEFINE_integer(
    "profile", 0, "trace so many steps by JAX's profiler into WORKDIR/profile", lower_bound=0
)


def main() -> None:
    """Runs the arm of --config in --workdir."""
    config = cli.read_config(_CONFIG)
    for key, flag in (("warm_start", _WARM_START), ("patience", _EARLY_STOPPING)):
        if flag.value is not None:
            override(config, f"training.{key}", flag.value)
    if cli.asked_for_help(config):
        return
    workdir = pathlib.Path(_WORKDIR.value or default_workdir(config))
    print(f"workdir: {workdir}", flush=True)
    result = finished(workdir, config)
    if result is None:
        with Bar() as bar:
            result = run_arm(config, workdir, bar, command(), _PROFILE.value)
    if not has_cost(workdir):
        result = add_cost(workdir)
    print(arm_summary(result, load_arm(workdir).estimate()))
    print(f"wrote {workdir / 'result.json'} and {workdir / 'scores.npz'}")


if __name__ == "__main__":
    cli.run(main)
