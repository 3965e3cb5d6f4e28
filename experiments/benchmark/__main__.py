"""The command `python -m experiments.benchmark`: runs a suite, or writes the page of runs."""

import pathlib
import shlex
import sys

from absl import flags

from experiments import cli, tabular
from experiments.benchmark import machine, page, report, suites, tables
from experiments.options import UserError
from experiments.progress import Bar

_SUITE = flags.DEFINE_string("suite", None, f"what is measured: {', '.join(suites.SUITES)}")
_ONLY = flags.DEFINE_string("only", "", "part of the names of the cases that are to run")
_ROUNDS = flags.DEFINE_integer(
    "rounds",
    None,
    "interleaved rounds; the median counts; the default is the suite's",
    lower_bound=1,
)
_THREADS = flags.DEFINE_integer("threads", 2, "cores that a suite on a CPU uses", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", "runs/benchmark", "folder of the JSON files and figures")
_WRITE = flags.DEFINE_string(
    "write",
    None,
    "also write this page from the JSON files in --output; other suites keep their sections",
)


def main() -> None:
    """Runs the suite, prints its tables, writes its files and the page that is asked for."""
    if _SUITE.value is None and _WRITE.value is None:
        raise UserError(
            f"--suite=NAME is needed ({', '.join(suites.SUITES)}), or --write=FILE for the page"
        )
    off = [] if _SUITE.value is None else _measure(_SUITE.value)
    if _WRITE.value is not None:
        for path in page.write(pathlib.Path(_WRITE.value), pathlib.Path(_OUTPUT.value)):
            print(f"wrote {path}")
    if off:
        sys.exit(f"wrong or failed, see the table: {'; '.join(off)}")


def _measure(name: str) -> list[str]:
    """Runs a suite; returns the contenders that were wrong or failed."""
    suite = suites.find(name)
    cases = suites.chosen(suite.cases(), _ONLY.value)
    machine.prepare(suite.platform, _THREADS.value)
    rounds = _ROUNDS.value or suite.rounds
    with Bar() as bar:
        made = report.run(name, suite, cases, rounds, _command(name, rounds), bar)
    print(page.made(made))
    print(tabular.text(tables.measured(made)))
    print()
    print(tabular.text(tables.reached(made)))
    for path in report.write(made, pathlib.Path(_OUTPUT.value), _ONLY.value):
        print(f"wrote {path}")
    return report.wrong(made)


def _command(name: str, rounds: int) -> str:
    """The command that repeats the figures, wherever their files are written to."""
    only = [f"--only={shlex.quote(_ONLY.value)}"] if _ONLY.value else []
    options = [f"--suite={name}", *only, f"--rounds={rounds}", f"--threads={_THREADS.value}"]
    return " ".join(["python -m experiments.benchmark", *options])


if __name__ == "__main__":
    cli.run(main)
