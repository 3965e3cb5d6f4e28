"""Progress with the time left: a bar on a terminal, a line now and then elsewhere."""

import sys
import time

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 10.0


class Bar:
    """Shows how far named pieces of work are; use as a context manager and call it."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns) if sys.stderr.isatty() else None
        self._tasks: dict[str, tuple[int, float]] = {}
        self._last_line = time.monotonic()

    def __enter__(self) -> "Bar":
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()

    def __call__(self, name: str, done: int, total: int) -> None:
        """Says that `done` of `total` units of the work called `name` are done."""
        if self._progress:
            self._show(self._progress, name, done, total)
        else:
            self._print(name, done, total)

    def _show(self, progress: Progress, name: str, done: int, total: int) -> None:
        if name not in self._tasks:
            self._tasks[name] = int(progress.add_task(name, total=total)), 0.0
        progress.update(self._tasks[name][0], completed=done)  # pyright: ignore[reportArgumentType]

    def _print(self, name: str, done: int, total: int) -> None:
        now = time.monotonic()
        first, start = self._tasks.setdefault(name, (done, now))
        if done < total and now - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        rate = (done - first) / (now - start) if now > start else 0.0
        left = f", about {(total - done) / rate:.0f} s left" if rate and done < total else ""
        print(f"{name}: {done} of {total}{left}", file=sys.stderr, flush=True)
