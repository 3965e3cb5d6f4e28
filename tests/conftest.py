"""Strict numerics for every test, and the shapes of annotations checked as the code runs."""

import gc
import os
import pathlib

# Before JAX is imported: compiled without optimisation, which takes a third of the time, also in
# the processes that tests start. XLA_FLAGS= compiles as users do.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false",
)

import jax
import pytest
from jaxtyping import install_import_hook

# Tracing makes many small objects that live on: looking through them all takes a twentieth.
gc.set_threshold(200_000, 20, 100)

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_platforms", "cpu")

# an int is a float, as for every type checker (the numeric tower of PEP 484)
_TYPECHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
_hook = install_import_hook(["attn_jax"], _TYPECHECKER)


@pytest.fixture(scope="session")
def data_folder() -> pathlib.Path:
    """The folder of real data; tests that need it are skipped where it is not named."""
    folder = os.environ.get("ATTN_JAX_DATA")
    if not folder:
        pytest.skip("ATTN_JAX_DATA is unset: it names the folder of real data this test reads")
    return pathlib.Path(folder)
