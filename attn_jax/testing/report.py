"""Runs the checks on a subject and tells what holds, what fails and what is not supported."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from attn_jax.testing.check import CHECKS, Case, Check
from attn_jax.testing.shrinking import smallest
from attn_jax.testing.subject import NotSupported, Subject, as_subject
from attn_jax.testing.trial import Failure, Trial

HOLDS, FAILS, DIFFERS, NOT_SUPPORTED = "holds", "fails", "differs", "not supported"
STATUSES = (HOLDS, FAILS, DIFFERS, NOT_SUPPORTED)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a case gave.

    Attributes:
      number: of the check in the list.
      check: its name.
      case: the case's name.
      dtype: of the trial.
      status: one of "holds", "fails", "differs", "not supported".
      detail: the smallest failing example, or why it is not supported.
      expected: at one place of that example, if it failed by a number.
      got: what was there instead.
      example: the call.
      size: how many numbers that call was given.

    """

    number: int
    check: str
    case: str
    dtype: str
    status: str
    detail: str = ""
    expected: str = ""
    got: str = ""
    example: str = ""
    size: int = 0


@dataclasses.dataclass(frozen=True)
class Row:
    """A check in one dtype: how many of its cases gave what, and the smallest failure."""

    number: int
    check: str
    dtype: str
    counts: dict[str, int]
    smallest: Outcome | None

    @property
    def status(self) -> str:
        """The worst that a case gave; not supported only if nothing was answered."""
        for status in (FAILS, DIFFERS, HOLDS):
            if self.counts[status]:
                return status
        return NOT_SUPPORTED

    def __str__(self) -> str:
        asked = sum(n for status, n in self.counts.items() if status != NOT_SUPPORTED)
        left = self.counts[NOT_SUPPORTED]
        if not asked:
            return NOT_SUPPORTED
        share = f"{self.counts[self.status]} of {asked}" if self.status != HOLDS else str(asked)
        return f"{self.status} ({share}{f', {left} not supported' if left else ''})"


@dataclasses.dataclass(frozen=True)
class Report:
    """What `run` found.

    Attributes:
      subject: the attention function.
      outcomes: of every case in every dtype.
      seconds: that it took, compilation included.

    """

    subject: Subject
    outcomes: tuple[Outcome, ...]
    seconds: float

    @property
    def failures(self) -> tuple[Outcome, ...]:
        """The cases that fail, the smallest example first."""
        failed = [outcome for outcome in self.outcomes if outcome.status == FAILS]
        return tuple(sorted(failed, key=lambda outcome: outcome.size))

    def count(self, status: str) -> int:
        """How many cases gave this status."""
        return sum(outcome.status == status for outcome in self.outcomes)

    def rows(self) -> tuple[Row, ...]:
        """A row for every check and dtype, in the order of the list."""
        groups: dict[tuple[int, str, str], list[Outcome]] = {}
        for outcome in self.outcomes:
            groups.setdefault((outcome.number, outcome.check, outcome.dtype), []).append(outcome)
        return tuple(_row(key, group) for key, group in groups.items())

    def summary(self) -> str:
        """One line: how many cases hold, fail, differ, are not supported."""
        words = {HOLDS: "hold", FAILS: "fail", DIFFERS: "differ", NOT_SUPPORTED: NOT_SUPPORTED}
        counts = ", ".join(f"{self.count(status)} {word}" for status, word in words.items())
        return f"{' '.join(filter(None, (self.subject.name, self.subject.version)))}: {counts}"

    def table(self) -> str:
        """Markdown: a row for every check, and below it the smallest example of each failure."""
        lines = ["| | check | dtype | outcome |", "| ---: | --- | --- | --- |"]
        rows = self.rows()
        lines += [f"| {r.number} | {r.check} | {r.dtype} | {r} |" for r in rows]
        examples = [r for r in rows if r.smallest is not None and r.status in (FAILS, DIFFERS)]
        lines += [""] * bool(examples)
        lines += [_example_text(row) for row in examples]
        return "\n".join([self.summary(), "", *lines])

    def to_json(self) -> dict[str, Any]:
        """The report as data for `json.dumps`."""
        return {
            "subject": self.subject.name,
            "version": self.subject.version,
            "notes": list(self.subject.notes),
            "differs": dict(self.subject.differs),
            "seconds": round(self.seconds, 1),
            "outcomes": [dataclasses.asdict(outcome) for outcome in self.outcomes],
        }


def _row(key: tuple[int, str, str], group: Sequence[Outcome]) -> Row:
    counts: dict[str, int] = dict.fromkeys(STATUSES, 0)
    for outcome in group:
        counts[outcome.status] += 1
    wrong = [outcome for outcome in group if outcome.status in (FAILS, DIFFERS)]
    return Row(*key, counts, min(wrong, key=lambda outcome: outcome.size, default=None))


def _example_text(row: Row) -> str:
    assert row.smallest is not None
    detail = row.smallest.detail.replace("\n", "\n  ")
    return f"- {row.number} {row.check}, {row.dtype}, {row.smallest.case}: {detail}"


def checks(names: Iterable[str | int] | None = None) -> tuple[Check, ...]:
    """The checks, or those whose name or number is among `names`, in the order of the list.

    Raises:
      ValueError: no check is called so.

    """
    ordered = sorted(CHECKS, key=lambda check: check.number)
    if names is None:
        return tuple(ordered)
    wanted = {str(name) for name in names}
    known = {check.name for check in ordered} | {str(check.number) for check in ordered}
    unknown = sorted(wanted - known)
    if unknown:
        raise ValueError(
            f"There is no check {unknown[0]!r}. Checks are named: "
            f"{', '.join(c.name for c in ordered)}; or by number, 1 to {ordered[-1].number}."
        )
    return tuple(c for c in ordered if c.name in wanted or str(c.number) in wanted)


@dataclasses.dataclass(frozen=True)
class BoundCase:
    """A case with its subject and dtype: calling it asks its question.

    Calling raises AssertionError with the smallest failing example if the subject is wrong, and
    `unittest.SkipTest`, which pytest shows as skipped, if it does not support what is asked or
    another convention was chosen on purpose.
    """

    check: Check
    case: Case
    trial: Trial

    def __call__(self) -> None:
        """Ask the question."""
        outcome = self.outcome()
        if outcome.status == FAILS:
            raise AssertionError(outcome.detail)
        if outcome.status != HOLDS:
            raise NotSupported(outcome.detail)

    def __str__(self) -> str:
        name, dtype = self.trial.subject.name, self.trial.dtype
        return f"{self.check.number} {self.check.name}: {self.case.name}, {name}, {dtype}"

    def outcome(self, shrink: bool = True) -> Outcome:
        """What the case gives; anything that the subject raises but NotSupported is a failure.

        Args:
          shrink: whether to look for a smaller example of a failure.

        """
        try:
            self.case(self.trial)
        except NotSupported as error:
            return self._outcome(NOT_SUPPORTED, detail=str(error))
        except AssertionError as error:
            return self._wrong(smallest(self.case, self.trial, error) if shrink else error)
        except Exception as error:  # a subject may raise anything: that fails its case, not the run
            first = str(error).partition("\n")[0]
            return self._wrong(AssertionError(f"raised {type(error).__name__}: {first}"))
        return self._outcome(HOLDS)

    def _wrong(self, error: AssertionError) -> Outcome:
        reason = self.trial.subject.differs.get(self.check.name)
        if not isinstance(error, Failure):
            reason = None  # an error is no convention
        detail = str(error) if reason is None else f"{reason}. {error}"
        given = {}
        if isinstance(error, Failure):
            given = {"expected": str(error.expected), "got": str(error.got), "size": error.size}
            given["example"] = error.example or ""
        return self._outcome(FAILS if reason is None else DIFFERS, detail=detail, **given)

    def _outcome(self, status: str, **fields: Any) -> Outcome:
        check, dtype = self.check, str(self.trial.dtype)
        return Outcome(check.number, check.name, self.case.name, dtype, status, **fields)


def cases(
    subject: Subject | Callable[..., Any],
    *,
    dtypes: Sequence[str] = ("float32",),
    only: Iterable[str | int] | None = None,
    examples: int = 20,
    optimize: bool = True,
) -> list[BoundCase]:
    """Every case of every check, each of which raises AssertionError when called and wrong.

    They are made for `pytest.mark.parametrize("case", testing.cases(function), ids=str)`.

    Args:
      subject: an attention function called as `attn_jax.attention`, or a `Subject`.
      dtypes: of query, key and value: "float32", "bfloat16", "float16", "float64".
      only: names or numbers of the checks; None takes all.
      examples: how many Hypothesis draws for each case of check 20; 0 draws none.
      optimize: whether XLA optimises programs for a CPU as it does for users; without, the kit
        takes less than half the time.

    Raises:
      ValueError: there is no such check.

    """
    chosen = checks(only)
    trials = [
        Trial(as_subject(subject), dtype, examples=examples, optimize=optimize) for dtype in dtypes
    ]
    return [
        BoundCase(check, case, trial)
        for trial in trials
        for check in chosen
        if str(trial.dtype) in check.dtypes
        for case in check.cases()
    ]


def run(
    subject: Subject | Callable[..., Any],
    *,
    dtypes: Sequence[str] = ("float32",),
    only: Iterable[str | int] | None = None,
    examples: int = 20,
    optimize: bool = True,
    progress: Callable[[Outcome], None] | None = None,
) -> Report:
    """Ask every case, and report.

    Args:
      subject: see `cases`.
      dtypes: see `cases`.
      only: see `cases`.
      examples: see `cases`.
      optimize: see `cases`.
      progress: called with every outcome as it comes.

    """
    start, outcomes = time.perf_counter(), []
    failed: set[tuple[str, Trial]] = set()
    for case in cases(subject, dtypes=dtypes, only=only, examples=examples, optimize=optimize):
        place = (case.check.name, case.trial)
        # one small example of each failing check is enough to read, and others take their time
        outcomes.append(case.outcome(shrink=place not in failed))
        if outcomes[-1].status in (FAILS, DIFFERS):
            failed.add(place)
        if progress is not None:
            progress(outcomes[-1])
    return Report(as_subject(subject), tuple(outcomes), time.perf_counter() - start)


def assert_conforms(subject: Subject | Callable[..., Any], **options: Any) -> Report:
    """Run the checks, and raise AssertionError with the table if any fails.

    Args:
      subject: see `cases`.
      **options: those of `run`.

    """
    report = run(subject, **options)
    if report.failures:
        raise AssertionError(report.table())
    return report


def comparison(reports: Sequence[Report]) -> str:
    """Markdown: checks as rows, a column for each report; then notes on the subjects.

    A cell says what the check gave in the worst of the report's dtypes.
    """
    names = [report.subject.name for report in reports]
    lines = [
        f"| | check | {' | '.join(names)} |",
        f"| ---: | --- |{' --- |' * len(names)}",
    ]
    for check in checks():
        cells = [_cell(report, check.name) for report in reports]
        if any(cells):
            lines.append(f"| {check.number} | {check.name} | {' | '.join(cells)} |")
    totals = [
        f"{r.count(HOLDS)} / {r.count(HOLDS) + r.count(FAILS) + r.count(DIFFERS)}" for r in reports
    ]
    lines.append(f"| | *holds / asked* | {' | '.join(totals)} |")
    return "\n".join(lines)


def _cell(report: Report, check: str) -> str:
    counts: dict[str, int] = dict.fromkeys(STATUSES, 0)
    for row in report.rows():
        if row.check == check:
            counts = {status: counts[status] + row.counts[status] for status in counts}
    if not any(counts.values()):
        return ""
    asked = counts[HOLDS] + counts[FAILS] + counts[DIFFERS]
    for status in (FAILS, DIFFERS):
        if counts[status]:
            return f"**{status}** {counts[status]} of {asked}"
    return f"holds {asked}" if asked else "–"
