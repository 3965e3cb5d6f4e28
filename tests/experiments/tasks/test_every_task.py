"""What holds for every task: fixed shapes, seeds, splits and items that fit the scores."""

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.comparison import task_config
from tests.experiments.tasks.variants import make

VARIANTS = (
    ("smoothing", ""),
    ("recall", ""),
    ("recall", "adjacent"),
    ("pronouns", ""),
    ("text", ""),
    ("digits", "plane"),
)


@pytest.fixture(scope="module", params=VARIANTS, ids=":".join)
def variant(request):
    return request.param


@pytest.fixture(scope="module")
def task(variant):
    return make(*variant)


def same(a, b):
    return all(np.array_equal(a[name], b[name]) for name in a)


def test_a_seed_fixes_the_batches(task):
    first, again, other = (iter(task.train(seed)) for seed in (5, 5, 6))
    for _ in range(3):
        batch = next(first)
        assert same(batch, next(again))
        assert not same(batch, next(other))


def test_training_resumes_where_it_stopped(task):
    iterator = iter(task.train(0))
    next(iterator)
    state = iterator.get_state()
    expected = next(iterator)
    resumed = iter(task.train(0))
    resumed.set_state(state)
    assert same(expected, next(resumed))


def test_all_batches_have_one_shape(task):
    iterator = iter(task.train(0))
    shapes = [{k: (v.shape, v.dtype) for k, v in next(iterator).items()} for _ in range(4)]
    assert all(shape == shapes[0] for shape in shapes)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_items_are_those_of_weight_above_zero(task, split):
    weights = np.concatenate([np.ravel(b["weight"]) for b in task.evaluation(split)])
    items = task.items(split)
    assert (weights > 0).sum() == len(items.cluster) == len(items.distance) == len(items.group)


@pytest.mark.slow
def test_baselines_score_every_item(task):
    items = task.items("test")
    assert all(len(baseline.scores) == len(items.cluster) for baseline in task.baselines())


def test_distances_lie_in_the_buckets(task):
    items = task.items("test")
    known = items.distance[~np.isnan(items.distance)]
    assert known.min() >= items.distance_edges[0]
    assert known.max() < items.distance_edges[-1]


def test_padding_is_below_15_percent(task):
    assert task.describe()["padding"] < 0.15


@pytest.mark.slow
def test_a_model_scores_every_item_and_has_finite_gradients(task, variant):
    config = task_config(*variant)
    rule = "learned * gaussian(trainable=True)"
    model = task.build(rule, config.model, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    batch = dict(next(iter(task.train(0))))

    @jax.jit
    def run(params):
        outputs = nnx.merge(graph, params)(batch)
        scores, weights = task.scores(outputs, batch)
        return task.loss(outputs, batch, label_smoothing=0.0), (scores, weights)

    (loss, (scores, weights)), gradient = jax.value_and_grad(run, has_aux=True)(params)
    assert np.isfinite(loss)
    assert scores.shape == weights.shape == (np.size(batch["weight"]),)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert model.flops(batch) > 0
