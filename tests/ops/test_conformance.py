"""Every implementation passes the conformance kit: all of it in float32, in other dtypes what
depends on the dtype. `python -m experiments.conformance` asks everything in every dtype."""

import pytest

from attn_jax import testing
from tests.ops.implementations import EVERY

FLOAT32, *OTHERS = testing.DTYPES
# Rows without keys, sums of many terms, log-normalisers; not what JAX transforms.
OF_DTYPE = (1, 4, 13)
SUBJECTS = {name: testing.ours(name) for name in EVERY}


def names(numbers=None):
    return [check.name for check in testing.checks() if not numbers or check.number in numbers]


@pytest.mark.parametrize(
    ("dtype", "check"),
    [(FLOAT32, name) for name in names()]
    + [
        pytest.param(dtype, name, marks=pytest.mark.slow)
        for dtype in OTHERS
        for name in names(OF_DTYPE)
    ],
)
@pytest.mark.parametrize("implementation", EVERY)
def test_implementation_conforms(implementation, dtype, check):
    report = testing.run(SUBJECTS[implementation], dtypes=[dtype], only=[check], optimize=False)
    assert not report.failures, report.table()
    if implementation == "dense":
        assert report.count("holds") == len(report.outcomes), report.table()
