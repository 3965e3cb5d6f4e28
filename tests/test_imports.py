"""Imports run one way: experiments -> attn_jax.{analysis, viz, nn, decoding} -> ops -> jax."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
OUTSIDE_THE_LIBRARY = {"absl", "ml_collections", "configs", "experiments", "tensorflow_datasets"}
UPPER_LIBRARY = ("attn_jax.analysis", "attn_jax.viz", "attn_jax.nn", "attn_jax.decoding")


def imported_modules(path: pathlib.Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def violations(path: pathlib.Path) -> set[str]:
    """Modules that a file of the library must not import."""
    modules = imported_modules(path)
    wrong = {name for name in modules if name.split(".")[0] in OUTSIDE_THE_LIBRARY}
    if "ops" in path.parts:
        above = (*UPPER_LIBRARY, "flax", "optax", "matplotlib")
        wrong |= {n for n in modules if any(n == a or n.startswith(a + ".") for a in above)}
    return wrong


@pytest.mark.parametrize(
    "path", sorted((ROOT / "attn_jax").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_library_imports_only_downwards(path):
    assert not violations(path)


def test_a_violation_is_seen(tmp_path):
    path = tmp_path / "ops" / "bad.py"
    path.parent.mkdir()
    path.write_text("from attn_jax.nn import attention\nimport absl.flags\n")
    assert violations(path) == {"absl.flags", "attn_jax.nn", "attn_jax.nn.attention"}


def test_configs_do_not_import_commands():
    for path in (ROOT / "configs").glob("*.py"):
        allowed = {"experiments.arms", "experiments.config", "experiments.options"}
        mine = {n for n in imported_modules(path) if n.startswith("experiments")}
        assert all(any(n == a or n.startswith(a + ".") for a in allowed) for n in mine), path


@pytest.mark.slow
def test_the_library_needs_only_jax_and_jaxtyping():
    code = (
        "import sys, attn_jax;"
        "loaded = {n.split('.')[0] for n in sys.modules};"
        "extra = loaded & {'flax', 'optax', 'absl', 'matplotlib', 'grain', 'beartype'};"
        "assert not extra, extra"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
