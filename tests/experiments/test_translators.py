"""Translators: the sizes of the paper, a rule in every slot, options that do not fit."""

import math

import jax
import numpy as np
import pytest
from flax import nnx

from configs.translation import get_config
from experiments import translators
from experiments.config import Reader
from experiments.options import UserError
from experiments.swaps import are_replaceable


def built(config, vocabulary):
    """The model, of shapes alone."""
    return nnx.eval_shape(
        lambda: translators.build(
            vocabulary,
            config.rule,
            Reader(config).model,
            ratio=1.0,
            max_length=64,
            rngs=nnx.Rngs(0),
        )
    )


def parameters(config, vocabulary):
    """By the first name on their path that is not `model`."""
    model = built(config, vocabulary)
    counts: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(model)):
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        name = names[names[0] == "model"]
        counts[name] = counts.get(name, 0) + math.prod(leaf.shape)
    return counts


@pytest.mark.slow
@pytest.mark.parametrize(("size", "millions"), [("base", 65), ("big", 213)])
def test_sizes_of_the_paper_have_its_parameters(size, millions):
    """Vaswani et al. 2017, table 3, with 37,000 shared subwords.

    They round, and do not say whether attention has biases: 3 % is 900 subwords of base.
    """
    counts = parameters(get_config(size), 37_000)
    assert sum(counts.values()) / 1e6 == pytest.approx(millions, rel=0.03)
    features = get_config(size).model.features
    assert counts["embeddings"] == 37_000 * (features + 1)


@pytest.mark.slow
def test_a_key_width_and_no_content_are_the_end_of_row_b():
    """Row (B) narrows the keys; a rule of distance leaves queries and keys out."""
    sizes = {}
    for rule in ("learned", "learned(key_width=16)", "table"):
        config = get_config("base").unlock()
        config.rule, config.model.cross_rule = rule, rule
        sizes[rule] = sum(parameters(config, 37_000).values())
    assert sizes["learned"] > sizes["learned(key_width=16)"] > sizes["table"]
    # 18 layers of attention lose two projections of 512 x 512
    lost = 18 * 2 * (512 * 512 + 512)
    tables = 18 * 8 * 65
    assert sizes["learned"] - sizes["table"] == lost - tables


def test_one_rule_a_layer():
    assert translators.per_layer("learned") == "learned"
    assert translators.per_layer("gaussian; learned:1, table:3") == [
        "gaussian",
        "learned:1, table:3",
    ]
    config = get_config().unlock()
    config.model.cross_rule = "learned; learned; learned"
    with pytest.raises(ValueError, match="one rule or 2, one a layer, got 3"):
        parameters(config, 300)


def test_heads_of_a_recurrent_decoder_are_not_replaced():
    """Its queries come of what it has mixed before."""
    assert are_replaceable(built(get_config("quick"), 300))
    assert not are_replaceable(built(get_config("quick,recurrent"), 300))


def test_an_unknown_kind_is_refused():
    config = get_config().unlock()
    config.model.kind = "convolutional"
    with pytest.raises(UserError, match=r"model\.kind must be one of transformer, recurrent"):
        parameters(config, 300)


def test_the_recurrent_baseline_differs_in_its_attention_alone():
    with_attention = parameters(get_config("recurrent"), 4096)
    config = get_config("recurrent").unlock()
    config.rule = "none"
    without = parameters(config, 4096)
    assert with_attention["encoder"] == without["encoder"]
    assert with_attention["embeddings"] == without["embeddings"]
    hidden = config.model.hidden
    # queries, keys, values and outputs with their biases, and the vector of the score
    assert np.subtract(with_attention["decoder"], without["decoder"]) == (
        4 * (hidden * hidden + hidden) + hidden
    )
