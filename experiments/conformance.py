"""The conformance kit on our implementations and on other libraries, as tables.

    python -m experiments.conformance --subject=dense --subject=jax.nn --dtype=float32

A subject is one of `attn_jax.implementations()` or of `attn_jax.testing.peers.names()`; a peer
that is not installed is left out by name. Without --subject all are run. docs/conformance.md says
what every check demands.
"""

import difflib
import json
import os
import pathlib
from collections.abc import Sequence

import jax
from absl import flags

import attn_jax
from attn_jax import testing
from attn_jax.testing import peers
from experiments import cli
from experiments.config import write_atomically
from experiments.environment import command, versions
from experiments.options import UserError

_SUBJECT = flags.DEFINE_multi_string("subject", [], "attention functions; none: all there are")
_DTYPE = flags.DEFINE_multi_enum(
    "dtype", ["float32"], list(testing.DTYPES), "of query, key and value"
)
_CHECK = flags.DEFINE_multi_string("check", [], "names or numbers of checks; none: all")
_EXAMPLES = flags.DEFINE_integer(
    "examples", 20, "how many Hypothesis draws for each of its cases", lower_bound=0
)
_OPTIMIZE = flags.DEFINE_bool(
    "optimize", True, "let XLA optimise what it compiles for a CPU; without, half the time"
)
_OUTPUT = flags.DEFINE_string("output", "runs/conformance", "folder of the JSON and Markdown files")


def main() -> None:
    """Runs the kit on every subject, prints the tables and writes them."""
    known = (*attn_jax.implementations(), *peers.names())
    subjects = [_subject(name, known) for name in _SUBJECT.value or known]
    _check_names(_CHECK.value)
    reports = []
    for subject in subjects:
        if isinstance(subject, str):
            print(subject, flush=True)
            continue
        print(f"{subject.name} ...", flush=True)
        # Other libraries promote ranks: their code is not held to our tests' strictness.
        with jax.numpy_rank_promotion("allow"):
            reports.append(
                testing.run(
                    subject,
                    dtypes=_DTYPE.value,
                    only=_CHECK.value or None,
                    examples=_EXAMPLES.value,
                    optimize=_OPTIMIZE.value,
                )
            )
        print(f"{reports[-1].table()}\n\n{reports[-1].seconds:.0f} s\n", flush=True)
    left_out = [subject for subject in subjects if isinstance(subject, str)]
    if reports:
        print(testing.comparison(reports))
        _write(pathlib.Path(_OUTPUT.value), reports, left_out)


def _subject(name: str, known: Sequence[str]) -> testing.Subject | str:
    """The subject, or the sentence that says why it is left out."""
    if name in attn_jax.implementations():
        return testing.ours(name)
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        raise UserError(f"there is no subject {name!r}: {hint}")
    try:
        return peers.get(name)
    except peers.Absent as absent:
        return str(absent)


def _check_names(names: Sequence[str]) -> None:
    try:
        testing.checks(names or None)
    except ValueError as error:
        raise UserError(str(error)) from error


def _write(folder: pathlib.Path, reports: Sequence[testing.Report], left_out: list[str]) -> None:
    """conformance.json holds every outcome, conformance.md the tables."""
    environment = {**versions(), "dtypes": list(_DTYPE.value), "optimize": _OPTIMIZE.value}
    data = {
        "environment": environment,
        "command": command(),
        "left out": left_out,
        "reports": [report.to_json() for report in reports],
    }
    write_atomically(folder / "conformance.json", json.dumps(data, indent=2) + "\n")
    write_atomically(folder / "conformance.md", _markdown(reports, environment, left_out))
    print(f"XLA_FLAGS={os.environ.get('XLA_FLAGS', '')!r}; wrote {folder}/conformance.md and .json")


def _markdown(
    reports: Sequence[testing.Report], environment: dict[str, object], left_out: list[str]
) -> str:
    made = ", ".join(f"{name} {environment[name]}" for name in ("date", "python", "jax", "cores"))
    xla = environment["xla_flags"] or "none"
    dtypes = ", ".join(_DTYPE.value)
    notes = [
        f"- {r.subject.name} {r.subject.version}: {'; '.join(r.subject.notes)}."
        for r in reports
        if r.subject.notes
    ]
    return "\n".join(
        [
            f"`{command()}`: {made}; XLA_FLAGS: {xla}; {dtypes}.",
            "",
            testing.comparison(reports),
            "",
            *notes,
            *(f"- {sentence}." for sentence in left_out),
            "",
            *(f"{report.table()}\n" for report in reports),
        ]
    )


if __name__ == "__main__":
    cli.run(main)
