"""The registry of tasks: a task is imported when it is asked for."""

import difflib
import importlib

from experiments.options import UserError
from experiments.tasks.base import Task

_CLASSES = {
    "pronouns": "Pronouns",
    "recall": "Recall",
    "smoothing": "Smoothing",
    "tagging": "Tagging",
    "text": "Text",
    "translation": "Translation",
}


def names() -> tuple[str, ...]:
    """The names of all tasks."""
    return tuple(_CLASSES)


def get(name: str) -> type[Task]:
    """The class of a task.

    Raises:
      UserError: there is no such task; names the nearest.

    """
    if name not in _CLASSES:
        near = difflib.get_close_matches(name, _CLASSES, n=1, cutoff=0.0)[0]
        raise UserError(f"there is no task {name!r}: did you mean {near!r}?")
    return getattr(importlib.import_module(f"experiments.tasks.{name}"), _CLASSES[name])
