import types

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.options import UserError
from experiments.training.optimizer import make_optimizer

OPTIONS = {
    "schedule": "cosine",
    "warmup_fraction": 0.1,
    "clip_norm": 1.0,
    "beta1": 0.9,
    "beta2": 0.98,
    "epsilon": 1e-9,
    "weight_decay": 0.1,
}


def rates(schedule: str, total: int) -> np.ndarray:
    optimizer = make_optimizer(types.SimpleNamespace(**OPTIONS | {"schedule": schedule}))
    steps = range(total)
    return np.array([optimizer.rate(jnp.int32(s), jnp.float32(total)) for s in steps])


@pytest.mark.parametrize("schedule", ["cosine", "rsqrt", "constant"])
def test_rate_warms_up_linearly_then_follows_the_schedule(schedule):
    rate = rates(schedule, 100)
    np.testing.assert_allclose(rate[:10], np.arange(1, 11) / 10, rtol=1e-6)
    step = np.arange(11, 101)
    expected = {
        "cosine": 0.5 * (1 + np.cos(np.pi * (step - 10) / 90)),
        "rsqrt": np.sqrt(10 / step),
        "constant": np.ones(90),
    }[schedule]
    # cos near pi in float32 is exact to about 1e-7 of its argument
    np.testing.assert_allclose(rate[10:], expected, atol=1e-6)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(UserError, match=r"one of cosine, rsqrt, constant, got 'cosin'"):
        rates("cosin", 10)


@pytest.mark.slow
def test_weight_decay_reaches_matrices_only():
    optimizer = make_optimizer(types.SimpleNamespace(**OPTIONS))
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    zero = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
    direction, _ = optimizer.transform.update(zero, optimizer.transform.init(params), params)
    np.testing.assert_allclose(direction["kernel"], 0.1, rtol=1e-6)
    np.testing.assert_array_equal(direction["bias"], 0.0)
