"""Programs of these tests run once or twice: the time to compile them counts."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="package")
def _compile_fast():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
