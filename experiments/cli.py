"""What every command shares: flags, `--help_config`, and errors of one clear sentence."""

import importlib.util
import os
import pathlib
import re
import select
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from experiments.config import (
    Config,
    arm_config,
    help_text,
    leaves,
    override,
    unknown_key,
)
from experiments.imports import import_module, import_modules, is_import_path
from experiments.options import UserError
from experiments.training.loop import Diverged

_HELP_CONFIG = flags.DEFINE_bool(
    "help_config", False, "print every key of the config, its default and its meaning, and stop"
)
_IMPORT = flags.DEFINE_multi_string(
    "import", [], "module to run first, such as one of yours that registers a kernel; repeatable"
)
_OVERRIDE = re.compile(r"^--?config\.([A-Za-z0-9_.]+)")


def define_config() -> flags.FlagHolder:
    """The flag --config=configs/NAME.py[:arg] with overrides --config.any.key=value."""
    flag = config_flags.DEFINE_config_file("config", None, "path of the config file, with :arg")
    defined = flags.FLAGS["config"]
    defined.parser = _ConfigParser(defined.parser)
    return flag


class _ConfigParser(flags.ArgumentParser):
    """Reads a config file; --config.task.name=module:Class puts a user's task in place of its own.

    The overrides of a config are read as it is loaded, so its keys must be those of that task.
    """

    def __init__(self, reads_files: flags.ArgumentParser):
        self._reads_files = reads_files

    def parse(self, argument: Any) -> Any:
        """The config of a path, which fails when it is used if there is no such file."""
        config = self._reads_files.parse(argument)
        try:
            return with_own_task(config, _value(sys.argv, "config.task.name"))
        except OSError:
            return config


def with_own_task(config: Config, name: str | None) -> Config:
    """A config with the keys of the task `module:Class`; other names leave it as it is.

    The file's rule and its settings of model and training stay, as far as the task has them; the
    task's options are at their defaults.

    Raises:
      UserError: there is no such task.

    """
    if name is None or not is_import_path(name) or "task" not in config:
        return config
    own = arm_config(name)
    known, dropped = dict(leaves(own)), ("variant", "label")
    for key, value in leaves(config):
        if key in known and key not in dropped and not key.startswith("task."):
            override(own, key, value)
    return own


def run(main: Callable[..., None], *, takes_words: bool = False) -> None:
    """Runs a command. Bad input ends with one sentence on stderr and status 2.

    A stop by the keyboard ends with status 130: what was finished is kept, and the same command
    resumes. A reader of the output that stops reading ends it in silence with status 141.

    Args:
      main: the command; it takes the arguments that are no flags if `takes_words`.
      takes_words: whether there may be such.

    """

    def guarded(argv: Sequence[str]) -> None:
        if argv[1:] and not takes_words:
            raise UserError(f"every argument must be a --flag, got {argv[1]!r}")
        for name in _IMPORT.value:
            import_module(name)
        main(*argv[1:])

    try:
        app.run(guarded, flags_parser=_parse)
    except (UserError, Diverged) as error:
        sys.exit(_say(f"error: {error}", 2))
    except KeyboardInterrupt:
        sys.exit(_say("stopped: the same command resumes where this run was", 130))
    except BrokenPipeError:
        if _is_read():
            raise
        # Such as `head`, which has seen enough; at its end Python would write once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _is_read() -> bool:
    """Whether anybody still reads what this process prints, as far as the system tells."""
    if not hasattr(select, "poll"):
        return True
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    return not any(event & (select.POLLERR | select.POLLHUP) for _, event in output.poll(0))


def _say(message: str, status: int) -> int:
    print(message, file=sys.stderr, flush=True)
    return status


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        rest = flags.FLAGS(list(argv))
    except flags.Error as error:
        raise UserError(f"{error}; --help lists the flags") from error
    except (KeyError, AttributeError) as error:
        raise UserError(_explain(argv, error)) from error
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = logging.WARNING  # absl would show every library's messages
    return rest


def _explain(argv: Sequence[str], error: Exception) -> str:
    """Names the override that the config does not know."""
    path, _, size = _first_path(argv).partition(":")
    config = config_module(path).get_config(*[size] * bool(size))
    config = with_own_task(config, _value(argv, "config.task.name"))
    known = [key for key, _ in leaves(config)]
    for argument in argv:
        match = _OVERRIDE.match(argument)
        if match and match[1] not in known:
            return unknown_key(match[1], known)
    return str(error)


def config_module(path: str) -> Any:
    """The module of a config file."""
    spec = importlib.util.spec_from_file_location("config_of_a_command", path)
    module = importlib.util.module_from_spec(spec)  # pyright: ignore[reportArgumentType]
    spec.loader.exec_module(module)  # pyright: ignore[reportOptionalMemberAccess]
    return module


def _first_path(argv: Sequence[str]) -> str:
    """The value of --config."""
    value = _value(argv, "config")
    return "no --config" if value is None else value


def _value(argv: Sequence[str], flag: str) -> str | None:
    """The value of --flag=VALUE or of --flag VALUE; None where it is not given."""
    for place, argument in enumerate(argv):
        name, _, value = argument.partition("=")
        if name.lstrip("-") == flag:
            return value or "".join(argv[place + 1 : place + 2])
    return None


def read_config(flag: flags.FlagHolder, kind: str = "task") -> Config:
    """The config after overrides.

    Args:
      flag: what `define_config` returned.
      kind: "task" for the config of an arm, "tasks" for that of a comparison.

    Returns:
      The config, with the modules of --import among its `imports`, all of them imported.

    Raises:
      UserError: no --config was given, or one of the other kind; a module is not found.

    """
    if _first_path(sys.argv) == "no --config":
        files = ", ".join(sorted(str(p) for p in pathlib.Path("configs").glob("*.py")))
        raise UserError(f"--config=FILE is needed, for instance one of: {files}")
    try:
        config = flag.value
        fits = kind in config
    except OSError as error:
        raise UserError(f"the config file could not be read: {_first_path(sys.argv)}") from error
    if not fits:
        command = "train or sweep" if kind == "tasks" else "compare"
        raise UserError(f"this config is one for experiments.{command}: it has no key {kind!r}")
    override(config, "imports", tuple(dict.fromkeys((*config.imports, *_IMPORT.value))))
    import_modules(config)
    return config


def asked_for_help(config: Config) -> bool:
    """Prints every key of the config where --help_config was given."""
    if _HELP_CONFIG.value:
        print(help_text(config))
    return _HELP_CONFIG.value
