"""A linear regression as a task: small enough to compute by hand, real enough to train."""

import types

import grain
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.tasks.base import Baseline, Items, Metric, Task

WIDTH, BATCH, ITEMS = 3, 8, 20


class Batches:
    """Batches by index: y = x . (1, 2, 3) with a little noise, NaN from `bad_from` on."""

    def __init__(self, seed: int, bad_from: int | None = None):
        self.seed, self.bad_from = seed, bad_from

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        generator = np.random.default_rng([self.seed, index])
        x = generator.normal(size=(BATCH, WIDTH)).astype(np.float32)
        if self.bad_from is not None and index >= self.bad_from:
            x = np.full_like(x, np.nan)
        noise = 0.01 * generator.normal(size=BATCH).astype(np.float32)
        return {"x": x, "y": x @ np.array([1, 2, 3], np.float32) + noise}


class Linear(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.kernel = nnx.Param(0.1 * rngs.params.normal((WIDTH,)))

    def __call__(self, batch, *, dropout_key=None):
        return batch["x"] @ self.kernel[...]

    def flops(self, batch) -> int:
        return 2 * WIDTH


class Toy(Task):
    name = "toy"
    options = types.MappingProxyType({})
    metric = Metric("error", "", higher_is_better=False, margin=0.1)

    def __init__(self, options, bad_seed=None, bad_from=None):
        del options
        self.bad_seed, self.bad_from = bad_seed, bad_from

    def train(self, seed):
        bad_from = self.bad_from if seed == self.bad_seed else None
        return grain.MapDataset.source(Batches(seed, bad_from)).repeat().to_iter_dataset()

    def evaluation(self, split):
        batch = dict(Batches({"validation": -1, "test": -2}[split] % 100)[0])
        return [batch | {"weight": np.arange(BATCH) < 5}] * (ITEMS // 5)

    def items(self, split):
        return Items(
            np.arange(ITEMS), np.ones(ITEMS), np.zeros(ITEMS, int), ["all"], [0, 2], "distance"
        )

    def build(self, rule, model, *, rngs):
        return Linear(rngs)

    def loss(self, outputs, batch, *, label_smoothing):
        return jnp.mean((outputs - batch["y"]) ** 2)

    def scores(self, outputs, batch):
        return (outputs - batch["y"]) ** 2, batch["weight"].astype(jnp.float32)

    def baselines(self):
        return [Baseline("zero", np.ones(ITEMS))]

    def describe(self):
        return {"data_sha256": "toy", "padding": 0.0, "dropped": {}}
