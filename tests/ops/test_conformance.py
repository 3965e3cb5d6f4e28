"""Every implementation passes the conformance kit: all that applies to it, in every dtype."""

import pytest

from attn_jax import testing
from tests.ops.implementations import EVERY

FLOAT32, *OTHERS = testing.DTYPES
DTYPES = [FLOAT32, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in OTHERS)]
SUBJECTS = {name: testing.ours(name) for name in EVERY}


@pytest.mark.parametrize("check", [check.name for check in testing.checks()])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", EVERY)
def test_implementation_conforms(implementation, dtype, check):
    report = testing.run(SUBJECTS[implementation], dtypes=[dtype], only=[check], optimize=False)
    assert not report.failures, report.table()
    if implementation == "dense":
        assert report.count("holds") == len(report.outcomes), report.table()
