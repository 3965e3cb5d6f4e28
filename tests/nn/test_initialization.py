"""Initial values depend on the seed and on a parameter's path, and on nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_jax.nn import (
    Decoder,
    Encoder,
    MultiHeadAttention,
    named,
    no_weight_decay,
)
from tests.nn.models import EVERY_RULE, FEATURES, HEADS, parameters


def encoder(rule="learned", seed=0, **options):
    return Encoder(2, FEATURES, HEADS, rule=rule, mlp_features=12, rngs=nnx.Rngs(seed), **options)


@pytest.mark.parametrize("rule", ["gaussian(trainable=True)", "additive", "table", "mix(raw, t5)"])
def test_rules_share_the_values_of_everything_they_have_in_common(rule):
    learned, other = parameters(encoder()), parameters(encoder(rule))
    shared = {path for path in learned if path in other and "/score" not in path}
    for layer in (0, 1):
        for name in ("attention/value", "attention/output", "mlp/up", "mlp/down"):
            assert f"layers/{layer}/{name}/kernel" in shared
    assert any("/query/" in path for path in learned)
    for path in shared:
        np.testing.assert_array_equal(learned[path], other[path], err_msg=path)


def test_a_rule_without_content_has_no_projections_of_queries_and_keys():
    assert not any("query" in path or "key" in path for path in parameters(encoder("gaussian")))


def test_options_and_other_layers_move_nobodys_value():
    few = parameters(Encoder(1, FEATURES, HEADS, mlp_features=12, rngs=nnx.Rngs(0)))
    many = parameters(encoder(position_encoding="learned", max_length=9))
    decoder = parameters(Decoder(2, FEATURES, HEADS, mlp_features=12, rngs=nnx.Rngs(0)))
    for path, value in few.items():
        np.testing.assert_array_equal(many[path], value, err_msg=path)
        np.testing.assert_array_equal(decoder[path], value, err_msg=path)


def test_seeds_and_paths_differ():
    first, second = parameters(encoder(seed=0)), parameters(encoder(seed=1))
    kernels = [path for path in first if path.endswith("kernel")]
    for path in kernels:
        assert not np.array_equal(first[path], second[path]), path
    for shape in {first[path].shape for path in kernels}:
        same = [first[path].tobytes() for path in kernels if first[path].shape == shape]
        assert len(set(same)) == len(same)


def test_named_does_not_count_how_often_it_is_used():
    rngs = nnx.Rngs(0)
    first = named(rngs, "child").params()
    rngs.params()
    assert named(rngs, "child").params() == first
    assert named(rngs, "other").params() != first


@pytest.mark.parametrize("rule", EVERY_RULE)
def test_the_state_is_parameters_only(rule):
    module = nnx.eval_shape(
        lambda: MultiHeadAttention(HEADS, FEATURES, rule=rule, rngs=nnx.Rngs(0))
    )
    leaves = jax.tree.leaves(nnx.state(module), is_leaf=lambda x: isinstance(x, nnx.Variable))
    assert leaves
    assert all(isinstance(leaf, nnx.Param) for leaf in leaves)
    _, parameters_only, rest = nnx.split(module, nnx.Param, ...)
    assert len(jax.tree.leaves(parameters_only)) == len(leaves)
    assert not jax.tree.leaves(rest)


@pytest.mark.slow
def test_vmapped_values_are_those_of_each_seed():
    def init(seed):
        model = Encoder(
            1,
            FEATURES,
            HEADS,
            rule="learned:2, gaussian(trainable=True):2",
            position_encoding="learned",
            max_length=4,
            mlp_features=8,
            rngs=nnx.Rngs(jax.random.key(seed)),
        )
        return nnx.state(model)

    seeds = jnp.arange(3)
    together = jax.jit(jax.vmap(init))(seeds)
    alone = jax.jit(init)
    for seed in range(3):
        # the two programs may round the initialiser's scale differently
        for many, one in zip(*map(jax.tree.leaves, (together, alone(seed))), strict=True):
            np.testing.assert_allclose(many[seed], one, rtol=3e-7)


def test_weight_decay_is_for_matrices_only():
    model = encoder("mix(learned, table):2, gaussian(trainable=True):2")
    decayed = {
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        for path, value in jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(model)))
        if not no_weight_decay(path, value)
    }
    assert all(path.endswith("kernel") for path in decayed)
    assert len(decayed) == sum(path.endswith("kernel") for path in parameters(model))
