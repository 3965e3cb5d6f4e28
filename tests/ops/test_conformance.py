"""Every fast implementation passes the conformance kit in float32, as far as there is time for.

`python -m experiments.conformance` asks everything, in every dtype, and `dense` as well.
"""

import pytest

from attn_jax import testing
from tests.ops.implementations import EVERY

# Rows without keys, masked NaN, extreme logits: other tests hold distance and what JAX transforms.
NUMBERS = (1, 2, 4)
SUBJECTS = {name: testing.ours(name) for name in EVERY}


@pytest.mark.slow
@pytest.mark.parametrize("check", [c.name for c in testing.checks() if c.number in NUMBERS])
@pytest.mark.parametrize("implementation", sorted(set(EVERY) - {"dense"}))
def test_implementation_conforms(implementation, check):
    report = testing.run(SUBJECTS[implementation], only=[check], optimize=False)
    assert not report.failures, report.table()
