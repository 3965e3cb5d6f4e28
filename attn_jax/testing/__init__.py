"""A conformance kit: hand it any attention function, and read what holds and what does not.

    from attn_jax import testing

    report = testing.run(my_attention, dtypes=("float32", "bfloat16"))
    print(report.table())

docs/conformance.md says what every check demands. Hypothesis (extra `testing`) draws shapes, masks
and parameters on top of a fixed grid of cases.
"""

from attn_jax.testing import (
    anything,  # noqa: F401 (each module enters its checks)
    derivatives,  # noqa: F401
    distance,  # noqa: F401
    masked,  # noqa: F401
    numerics,  # noqa: F401
    parameters,  # noqa: F401
    partial,  # noqa: F401
    shapes,  # noqa: F401
    transformations,  # noqa: F401
)
from attn_jax.testing.check import CHECKS, DTYPES
from attn_jax.testing.dense import from_dense
from attn_jax.testing.example import Example, Sizes, draw
from attn_jax.testing.reference import Precision, Reference
from attn_jax.testing.report import (
    Outcome,
    Report,
    assert_conforms,
    cases,
    checks,
    comparison,
    run,
)
from attn_jax.testing.subject import NotSupported, Subject, ours

__all__ = [
    "CHECKS",
    "DTYPES",
    "Example",
    "NotSupported",
    "Outcome",
    "Precision",
    "Reference",
    "Report",
    "Sizes",
    "Subject",
    "assert_conforms",
    "cases",
    "checks",
    "comparison",
    "draw",
    "from_dense",
    "ours",
    "run",
]
