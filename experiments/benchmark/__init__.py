"""Benchmarks: programs that repeat a claim about speed or memory as a ratio measured in one run.

    python -m experiments.benchmark --suite=cpu
    python -m experiments.benchmark --suite=proximity --only='width 32' --rounds=9
    python -m experiments.benchmark --write=docs/performance.md

A suite is a list of cases (`case.py`). In each case contenders answer the same question on the
same inputs: `measure.py` checks every answer against dense float64, times them in interleaved
rounds and forms the ratios that the targets speak of. Peers are optional: one that is not
installed is skipped by name.

cpu: attention with content. proximity: attention by distance alone. gpu: attention with content in
bfloat16. lanes: what training four seeds in one vmapped step costs, in units of training one.
"""
