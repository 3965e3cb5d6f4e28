"""Figures show the numbers that they are given, with a word at each row and column."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_jax import viz
from attn_jax.analysis import Fit, Profile, steps
from attn_jax.nn import MultiHeadAttention

WORDS = ["Tommy", "can", "be", "annoying", "but", "he", "is", "a", "good", "dog"]


def weights(seed=0, heads=None):
    rng = np.random.default_rng(seed)
    shape = (10, 10) if heads is None else (heads, 10, 10)
    return rng.dirichlet(np.ones(10), shape[:-1])


def drawn(axes):
    return np.asarray(axes.images[0].get_array())


def labels(axes):
    return [[t.get_text() for t in axis.get_ticklabels()] for axis in (axes.xaxis, axes.yaxis)]


def saved(figure, tmp_path, kind):
    path = tmp_path / f"figure.{kind}"
    figure.savefig(path)
    return path.read_bytes()


def test_a_heatmap_has_the_weights_and_the_words(tmp_path):
    figure = viz.heatmap(weights(), WORDS, WORDS, title="one head")
    axes = figure.axes[0]
    np.testing.assert_array_equal(drawn(axes), weights())
    assert labels(axes) == [WORDS, WORDS]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("keys", "queries")
    assert b">annoying</text>" in saved(figure, tmp_path, "svg")
    assert saved(figure, tmp_path, "pdf").startswith(b"%PDF")
    assert saved(figure, tmp_path, "png").startswith(b"\x89PNG")


def test_an_alignment_reads_from_source_to_translation():
    axes = viz.alignment(weights()[:, :4], WORDS[:4], WORDS).axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("source", "translation")
    assert labels(axes) == [WORDS[:4], WORDS]


def test_two_rules_and_their_difference():
    figure = viz.compare(weights(0), weights(1), WORDS, WORDS, names=("learned", "gaussian"))
    left, middle, right = figure.axes[:3]
    np.testing.assert_array_equal(drawn(left), weights(0))
    assert left.images[0].norm.vmax == middle.images[0].norm.vmax
    np.testing.assert_array_equal(drawn(right), weights(0) - weights(1))
    assert right.get_title() == "learned less gaussian"


def test_all_heads_of_all_layers():
    given = {"layers/0/attention": weights(0, 3), "layers/1/attention": weights(1, 2)}
    figure = viz.all_heads(given, share_scale=True)
    with_image = [axes for axes in figure.axes if axes.images]
    assert len(with_image) == 5
    assert len({axes.images[0].norm.vmax for axes in with_image}) == 1
    np.testing.assert_array_equal(drawn(with_image[4]), given["layers/1/attention"][1])


def test_a_profile_and_the_kernel_over_it():
    r = np.arange(-6, 7)
    curve = np.exp(-(((r + 1) / 2.0) ** 2) / 2)
    curve /= curve.sum()
    profile = Profile(*map(jnp.asarray, (r, curve[None], np.full((1, 13), 9))))
    fit = Fit("gaussian", 2.0, -1.0, 0.0, None, 1.0, 0.0)
    axes = viz.profile(profile, 0, fit=fit, reach=4).axes[0]
    head, kernel = (line.get_ydata() for line in axes.lines)
    np.testing.assert_allclose(head, kernel, rtol=1e-4)
    assert list(axes.lines[0].get_xdata()) == list(range(-4, 5))
    assert axes.get_legend().get_texts()[1].get_text() == "gaussian(width=2, offset=-1.00)"


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["learned * gaussian(width=2)", "additive"])
def test_a_computation_shows_its_numbers(rule):
    module = MultiHeadAttention(2, 8, rule=rule, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 10, 8))
    taken = steps(module, x)[""]
    axes = viz.computation(taken, WORDS, 5, head=1).axes[0]
    texts = [text.get_text() for text in axes.texts]
    assert texts[-10:] == [f"{w:.2f}" for w in taken.heads[1].weights[5]]
    names = labels(axes)[1]
    assert names[-2:] == ["logit", "weight"]
    assert ("log w(r)" in names) == ("gaussian" in rule)
    assert re.match("head 1: what 'he' makes", axes.get_title())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"got \[10, 10\], 10 queries and 9 keys"):
        viz.heatmap(weights(), WORDS, WORDS[:9])
