"""Merging partial results; that they merge into the whole is asked by the conformance kit."""

import jax.numpy as jnp
import numpy as np

import attn_jax


def test_merge_of_parts_without_any_key_is_zero():
    output, log = attn_jax.merge(jnp.zeros((2, 3, 4, 5)), jnp.full((2, 3, 4), -jnp.inf))
    assert not np.any(output)
    assert np.all(log == -np.inf)
