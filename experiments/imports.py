"""A user's own files: modules that a flag names, and classes by import path."""

import importlib
import inspect
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, TypeVar

from experiments.options import UserError

Kind = TypeVar("Kind")


def import_module(name: str) -> ModuleType:
    """The module of a name, from the current folder or wherever Python looks.

    Raises:
      UserError: there is none; what goes wrong inside of it is raised as it is.

    """
    if name.endswith(".py") or not all(part.isidentifier() for part in name.split(".")):
        hint = name.removesuffix(".py").replace("/", ".").lstrip(".")
        raise UserError(
            f"a module is named as in Python's import statement, got {name!r}: write {hint!r}"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise UserError(
            f"a module must lie in the current folder or on PYTHONPATH, got {name!r}: "
            f"there is no {error.name!r} in {os.getcwd()}"
        ) from error


def import_modules(config: Any) -> None:
    """The modules of `config.imports`, which may register what the config names."""
    for name in config.get("imports", ()):
        import_module(name)


def is_import_path(name: str) -> bool:
    """Whether a name reads module:Class."""
    return ":" in name


def classes(module: ModuleType, kind: type[Kind]) -> Sequence[type[Kind]]:
    """The subclasses of `kind` that a module defines."""
    return [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, kind)
        and value.__module__ == module.__name__
    ]


def import_class(path: str, kind: type[Kind]) -> type[Kind]:
    """The class `module:Class`, a subclass of `kind` with nothing left to override.

    Raises:
      UserError: there is no such module or class, or it is no complete subclass.

    """
    module_name, _, name = path.partition(":")
    module = import_module(module_name)
    found = getattr(module, name, None)
    complete = f"a subclass of {kind.__name__} with all its abstract methods"
    if not (isinstance(found, type) and issubclass(found, kind)):
        names = ", ".join(one.__name__ for one in classes(module, kind))
        raise UserError(
            f"{path} must be {complete}, got {found!r}: {module.__file__} has {names or 'none'}"
        )
    if inspect.isabstract(found):
        missing = ", ".join(sorted(vars(found)["__abstractmethods__"]))
        raise UserError(f"{path} must be {complete}: write {missing}")
    return found
