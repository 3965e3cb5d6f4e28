"""Contenders whose times are given, and reports that nobody had to measure."""

import numpy as np

from experiments.benchmark.case import Case, Contender, Memory, Prepared, Target

ANSWER = np.array([[1.0], [-4.0]])


def contender(name, seconds=(1.0,), answer=ANSWER, temporary=None, log=None, **options):
    """A contender whose samples take the given seconds in turn; `log` keeps the order of calls."""
    given = iter(seconds)

    def sample(calls):
        if log is not None:
            log.append(name)
        return calls * next(given)

    memory = None if temporary is None else Memory(temporary, 2 * temporary)
    prepared = Prepared(sample, lambda: [answer], memory)
    options = {"prepare": lambda: prepared, "expected": lambda: [ANSWER]} | options
    return Contender(name, **options)


def time_target(**limits):
    """A target for the time of the contender b, in units of that of a."""
    return Target("time", "b", "a", **limits)


def record(name="a", seconds=(1.0, 1.0), **changes):
    """What a case's record holds of one contender."""
    return {"name": name, "skipped": None, "wrong": False, "seconds": list(seconds)} | changes


def case_of(*contenders, targets=(), **options):
    """A case of contenders with an error of up to 0.1 allowed, one call a sample."""
    options = {"tolerance": 0.1, "calls": 1} | options
    return Case("toy case", "(2, 1) float32", lambda: contenders, targets, **options)


def report_of(cases, **changes):
    """A report of a suite with given records of cases."""
    environment = {
        "python": "3.11.7",
        "jax": "0.10.2",
        "torch": None,
        "device": "cpu",
        "processor": "Some Processor, avx2",
        "cores": 2,
        "cores of the machine": 4,
        "load": 0.5,
        "others": 0.01,
        "xla_flags": "",
        "date": "2026-01-02",
    }
    return {
        "suite": "cpu",
        "meaning": "Attention with content",
        "command": "python -m experiments.benchmark --suite=cpu",
        "environment": environment,
        "rounds": 2,
        "cases": cases,
    } | changes
