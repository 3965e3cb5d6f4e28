"""The registry of tasks: a task is imported when it is asked for."""

import difflib
import importlib

from experiments.imports import import_class, is_import_path
from experiments.options import UserError
from experiments.tasks.base import Task

_CLASSES = {
    "digits": "Digits",
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
    """The class of a task by name, or of a user's own by import path, module:Class.

    Raises:
      UserError: there is no such task, names the nearest; or see `import_class`.

    """
    if is_import_path(name):
        return import_class(name, Task)  # pyright: ignore[reportAbstractUsage]
    if name not in _CLASSES:
        near = difflib.get_close_matches(name, _CLASSES, n=1, cutoff=0.0)[0]
        raise UserError(f"there is no task {name!r}: did you mean {near!r}?")
    return getattr(importlib.import_module(f"experiments.tasks.{name}"), _CLASSES[name])
