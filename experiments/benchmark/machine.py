"""The machine a benchmark runs on: its cores, memory and words that describe it."""

import contextlib
import importlib.metadata
import math
import os
import pathlib
import re
from typing import Any, Literal

import jax

from experiments.environment import versions
from experiments.options import UserError

PEERS = ("scipy", "tokamax", "torch")
_TASKS = pathlib.Path("/proc/self/task")
_VECTORS = ("avx512f", "avx2", "asimd")


def prepare(platform: Literal["cpu", "gpu"] | None, threads: int) -> None:
    """Binds the process to cores and JAX to a platform; comes before JAX's first computation.

    XLA's and torch's pools of threads take the size of the set of cores that is bound here. Each
    of their threads gets a core of its own (see `place_threads` for XLA's; OpenMP places torch's):
    left to itself, the system at times keeps two on one core for the whole run.

    Raises:
      UserError: there are fewer cores than threads, or the platform is missing.

    """
    if platform == "gpu":
        _check_gpu()
        return
    if platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
    if len(cores()) < threads:
        raise UserError(
            f"--threads={threads} needs as many cores, this process may use {len(cores())}: "
            f"choose --threads={len(cores())}"
        )
    os.environ.setdefault("OMP_PROC_BIND", "true")
    os.environ.setdefault("OMP_PLACES", "cores")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores()[:threads])
    elif len(cores()) > threads:
        raise UserError(
            f"this system binds no process to cores, so --threads={threads} would not hold: "
            f"choose --threads={len(cores())}"
        )


def cores() -> list[int]:
    """The cores that this process may use: any of its threads, for some are bound to one."""
    if hasattr(os, "sched_getaffinity"):
        found: set[int] = set()
        for thread in _threads():
            with contextlib.suppress(ProcessLookupError):  # it has ended since
                found |= os.sched_getaffinity(thread)
        return sorted(found)
    return list(range(os.cpu_count() or 1))


def place_threads() -> None:
    """Binds each of XLA's threads to a core of its own, on systems that name threads."""
    workers = [t for t, name in _threads().items() if name == "tf_XLAEigen"]
    available = cores()
    for place, thread in enumerate(sorted(workers)):
        os.sched_setaffinity(thread, {available[place % len(available)]})


def _threads() -> dict[int, str]:
    """The names of this process's threads by number; 0 is the one that asks."""
    if not _TASKS.exists():
        return {0: ""}
    names = {}
    for task in _TASKS.iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended since
            names[int(task.name)] = (task / "comm").read_text().strip()
    return names


def _check_gpu() -> None:
    if jax.default_backend() != "gpu":
        raise UserError(
            "the suite gpu needs a GPU, and JAX sees only "
            f"{jax.devices()[0].device_kind}: install '.[cuda13]' on a machine that has one, or "
            "choose --suite=cpu"
        )


def available_bytes() -> float:
    """Memory that a program may still take; infinity where the system does not say.

    On a CPU a quarter of what the system has left stays free: for the exact answers, the inputs of
    other contenders, and whoever else works there.
    """
    stated = jax.devices()[0].memory_stats()
    if stated:
        return stated["bytes_limit"] - stated["bytes_in_use"]
    path = pathlib.Path("/proc/meminfo")
    stated = re.search(
        r"^MemAvailable:\s*(\d+) kB", path.read_text() if path.exists() else "", re.M
    )
    return 0.75 * 1024 * int(stated[1]) if stated else math.inf


def environment() -> dict[str, Any]:
    """`versions()` with those of installed peers, the processor, and how busy the machine is."""
    there = versions() | {name: _version(name) for name in PEERS} | {"processor": processor()}
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    return there | {"cores of the machine": os.cpu_count(), "load": load}


class Others:
    """What other processes take of the machine's cores, from here on."""

    def __init__(self) -> None:
        self._start = _ticks()

    def share(self) -> float | None:
        """Of all cores, between 0 and 1; None where the system does not say."""
        end = _ticks()
        if self._start is None or end is None:
            return None
        busy, own, total = (b - a for a, b in zip(self._start, end, strict=True))
        return min(1.0, max(0.0, (busy - own) / total)) if total > 0 else None


def _ticks() -> tuple[float, float, float] | None:
    """Seconds of all cores that were busy, of this process and its children, and of all cores."""
    path = pathlib.Path("/proc/stat")
    if not path.exists():
        return None
    spent = [
        int(x) / os.sysconf("SC_CLK_TCK") for x in path.read_text().split("\n", 1)[0].split()[1:9]
    ]
    idle = spent[3] + spent[4]
    return sum(spent) - idle, sum(os.times()[:4]), sum(spent)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The model of the processor and its widest vectors, as far as the system tells."""
    path = pathlib.Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    has = set(flags[1].split()) if flags else set()
    vectors = next((name for name in _VECTORS if name in has), "vectors unknown")
    return f"{model[1].strip() if model else 'processor unknown'}, {vectors}"
