"""What every command shares: flags, `--help_config`, and errors of one clear sentence."""

import pathlib
import re
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from experiments.config import Config, help_text, leaves, unknown_key
from experiments.options import UserError
from experiments.training.loop import Diverged

_HELP_CONFIG = flags.DEFINE_bool(
    "help_config", False, "print every key of the config, its default and its meaning, and stop"
)
_OVERRIDE = re.compile(r"^--?config\.([A-Za-z0-9_.]+)")


def define_config() -> flags.FlagHolder:
    """The flag --config=configs/NAME.py[:arg] with overrides --config.any.key=value."""
    return config_flags.DEFINE_config_file("config", None, "path of the config file, with :arg")


def run(main: Callable[[], None]) -> None:
    """Runs a command. Bad input ends with one sentence on stderr and status 2.

    A stop by the keyboard ends with status 130: what was finished is kept, and the same command
    resumes.
    """

    def guarded(argv: Sequence[str]) -> None:
        if argv[1:]:
            raise UserError(f"every argument must be a --flag, got {argv[1]!r}")
        main()

    try:
        app.run(guarded, flags_parser=_parse)
    except (UserError, Diverged) as error:
        sys.exit(_say(f"error: {error}", 2))
    except KeyboardInterrupt:
        sys.exit(_say("stopped: the same command resumes where this run was", 130))


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
    except OSError as error:
        raise UserError(f"the config file could not be read: {_first_path(argv)}") from error
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = logging.WARNING  # absl would show every library's messages
    return rest


def _explain(argv: Sequence[str], error: Exception) -> str:
    """Names the override that the config does not know."""
    from_file = [a for a in argv if not _OVERRIDE.match(a)]
    try:
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", None, "", flag_values=values)
        values(from_file, known_only=True)
        known = [key for key, _ in leaves(values["config"].value)]
    except Exception:  # the file itself is wrong: then its own error says more
        return f"the config could not be made: {error}"
    for argument in argv:
        match = _OVERRIDE.match(argument)
        if match and match[1] not in known:
            return unknown_key(match[1], known)
    return str(error)


def _first_path(argv: Sequence[str]) -> str:
    return next((a.partition("=")[2] for a in argv if a.startswith("--config=")), "no --config")


def read_config(flag: flags.FlagHolder) -> Config:
    """The config after overrides.

    Raises:
      UserError: no --config was given.

    """
    if flag.value is None:
        files = ", ".join(sorted(str(p) for p in pathlib.Path("configs").glob("*.py")))
        raise UserError(f"--config=FILE is needed, for instance one of: {files}")
    return flag.value


def asked_for_help(config: Config) -> bool:
    """Prints every key of the config where --help_config was given."""
    if _HELP_CONFIG.value:
        print(help_text(config))
    return _HELP_CONFIG.value
