"""Commands of the project in processes of their own, as a user starts them.

Each is forked from a server that has imported what all of them need, which takes a process 3 to 5
seconds. What a command does from its arguments on is what `python -m` does: nothing of the test's
process is there, JAX has not started, and flags are not defined yet.
"""

import dataclasses
import multiprocessing
import os
import pathlib
import runpy
import sys
import tempfile
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).parents[2]
_FORKS = multiprocessing.get_context("forkserver")
# No command itself: each defines flags.
_FORKS.set_forkserver_preload(
    [
        "experiments.analysing",
        "experiments.comparison",
        "experiments.exported",
        "experiments.report.pages",
        "experiments.workdirs",
        "experiments.benchmark.report",
        "attn_jax.testing",
        "tensorboardX",
        "orbax.checkpoint",
    ]
)


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended, and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


def start(
    program: str,
    arguments: Sequence[str],
    folder: pathlib.Path = ROOT,
    streams: Sequence[str] = (os.devnull,) * 3,
):
    """A process that does `python -m experiments.PROGRAM ARGUMENTS` in a folder.

    Args:
      program: without "experiments.".
      arguments: of the command.
      folder: where it runs.
      streams: files of standard input, output and error.

    """
    given = (program, [*map(str, arguments)], str(folder), dict(os.environ), tuple(streams))
    process = _FORKS.Process(target=_command, args=given)
    process.start()
    return process


def run(
    program: str, arguments: Sequence[str], folder: pathlib.Path = ROOT, text: str = ""
) -> Ended:
    """Runs a command to its end, with `text` on its standard input."""
    with tempfile.TemporaryDirectory() as name:
        streams = [pathlib.Path(name) / stream for stream in ("stdin", "stdout", "stderr")]
        for stream in streams:
            stream.write_text(text if stream.name == "stdin" else "", encoding="utf-8")
        process = start(program, arguments, folder, [*map(str, streams)])
        process.join()
        written = [stream.read_text(encoding="utf-8") for stream in streams[1:]]
        return Ended(int(process.exitcode or 0), *written)


def _command(
    program: str,
    arguments: Sequence[str],
    folder: str,
    environment: dict[str, str],
    streams: Sequence[str],
) -> None:
    """What the forked process does."""
    for number, name in enumerate(streams):
        opened = os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, number)
    # the forked process has no standard input of its own to read
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[0:0] = [folder]
    sys.argv = [program, *arguments]
    runpy.run_module(f"experiments.{program}", run_name="__main__", alter_sys=True)
