"""Strict numerics for every test, and the shapes of annotations checked as the code runs."""

import os
import pathlib

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_platforms", "cpu")

_hook = install_import_hook(["attn_jax"], "beartype.beartype")


@pytest.fixture(scope="session")
def data_folder() -> pathlib.Path:
    """The folder of real data; tests that need it are skipped where it is not named."""
    folder = os.environ.get("ATTN_JAX_DATA")
    if not folder:
        pytest.skip("ATTN_JAX_DATA is unset: it names the folder of real data this test reads")
    return pathlib.Path(folder)
