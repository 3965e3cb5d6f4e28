"""Metrics as JSON lines and as TensorBoard events."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from experiments.config import write_atomically

FILE = "metrics.jsonl"


class Metrics:
    """Appends metrics of one phase; what a killed run wrote past its checkpoint is dropped."""

    def __init__(self, workdir: pathlib.Path, phase: str, resumed_at: int):
        self._phase = phase
        path = workdir / FILE
        if path.exists():
            kept = [line for line in read(workdir) if not self._is_past(line, resumed_at)]
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lines = path.open("a")
        # It imports torch where there is one, which takes as long as all else.
        from tensorboardX import SummaryWriter

        self._events = SummaryWriter(
            str(workdir / "events" / phase), purge_step=resumed_at + 1 if resumed_at else None
        )

    def _is_past(self, line: Mapping[str, Any], step: int) -> bool:
        return line["phase"] == self._phase and line["step"] > step

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._events.close()

    def write(self, step: int, split: str, lane: Mapping[str, Any], values: Mapping[str, float]):
        """One line for one lane, which `lane` names; a value that is not finite becomes null."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = {"phase": self._phase, **lane, "step": step, "split": split, **finite}
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()
        label = "_".join(f"{key}_{value:g}" for key, value in lane.items())
        for name, value in values.items():
            self._events.add_scalar(f"{split}/{name}/{label}", value, step)


def read(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """All lines of a workdir; a last line cut short by a kill is left out."""
    path = workdir / FILE
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
