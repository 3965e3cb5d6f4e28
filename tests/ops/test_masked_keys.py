"""What a value behind no mask holds is seen; the rest is asked by the conformance kit."""

import jax.numpy as jnp
import numpy as np

from tests.ops.arrays import qkv
from tests.ops.implementations import attend, with_content


@with_content
def test_a_value_that_may_be_seen_is_seen_whatever_its_weight(implementation):
    """exp(-2000) is zero in float32; the mask lets NaN through."""
    query, key, value = qkv()
    bias = jnp.zeros((1, 1, 1, 9)).at[..., 4].set(-2000.0)
    mask = np.ones((1, 1, 6, 1), bool)
    output = attend(
        query,
        key,
        value.at[:, 4].set(jnp.nan),
        bias=bias,
        mask=mask & (np.arange(9).reshape(1, 1, 1, 9) < 8),
        implementation=implementation,
    )
    assert np.isnan(output).all()
