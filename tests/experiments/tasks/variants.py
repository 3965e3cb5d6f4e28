"""Tasks as their configs make them, with changed options."""

from experiments import tasks
from experiments.comparison import task_config
from experiments.config import override


def make(name, argument="", **options):
    """A task; an option is a key of `config.task`."""
    config = task_config(name, argument)
    for key, value in options.items():
        override(config, f"task.{key}", value)
    return tasks.get(name)(config.task)


def baseline(task, name, group=None):
    """The score of a baseline, over all test items or those of one group."""
    scores = next(b.scores for b in task.baselines() if b.name == name)
    kept = task.items("test").group == group if group is not None else slice(None)
    weights = scores[kept] * 0 + 1
    return float(task.metric.mean(scores[kept], weights))
