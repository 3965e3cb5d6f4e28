"""smoothing: what was the curve at these times, given 64 noisy points at other times?

Attention goes across, from the times asked for to the observed points. Every arm's queries and
keys get the same Fourier features of time, keys get the observed value as well; only the rule
differs. Two layers let a rule of content compare a first estimate with the observed values (the
bilateral filter), which no rule of distance can.
"""

import types
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float64

from attn_jax.nn import MultiHeadAttention, named
from attn_jax.nn.transformer import FeedForward
from experiments.options import Option, UserError
from experiments.tasks import series as real
from experiments.tasks.base import Baseline, Batch, Items, Metric, Reading, Task
from experiments.tasks.curves import (
    ASKED,
    FAMILIES,
    Curves,
    nadaraya_watson,
    nearest_distance,
    squared_errors,
    synthetic,
)
from experiments.tasks.synthetic import endless, fingerprint, in_batches, stream

ENCODINGS = ("none", "sinusoidal", "rotary")
LONGEST_PERIOD = 128.0
WIDTHS = np.geomspace(0.2, 12.0, 42)
"""Bandwidths that the Nadaraya-Watson baseline chooses from."""


class Smoothing(Task):
    """Nadaraya-Watson regression against learned attention; distance is to the nearest point."""

    name = "smoothing"
    cross = True
    classifies = False
    options = types.MappingProxyType(
        {
            "series": Option("", "'' for curves of three synthetic families, co2_daily or nab"),
            "path": Option("", "folder of the series; '' is $ATTN_JAX_DATA/SERIES"),
            "batch_size": Option(32, "curves in a training batch", 1),
            "test_items": Option(900, "synthetic curves of the test split", 1),
            "validation_items": Option(300, "synthetic curves of the validation split", 1),
        }
    )
    model_options = types.MappingProxyType(
        {
            "num_layers": Option(2, "blocks of cross-attention and feed-forward", 1),
            "features": Option(32, "width of the residual stream", 1),
            "num_heads": Option(4, "attention heads; divides `features`", 1),
            "mlp_features": Option(64, "width of the feed-forward layer", 1),
            "activation": Option("gelu", "of the feed-forward layer: gelu or relu"),
            "position_encoding": Option(
                "sinusoidal", "of time: none, sinusoidal (Fourier features) or rotary"
            ),
        }
    )
    metric = Metric(
        "RMSE / SD",
        "",
        higher_is_better=False,
        margin=0.02,
        margin_is_relative=True,
        statistic="root",
    )

    def __init__(self, options: Any):
        self.batch_size = options.batch_size
        self.synthetic = not options.series
        if self.synthetic:
            self.groups: Sequence[str] = FAMILIES
            self._count = {"test": options.test_items, "validation": options.validation_items}
            self._curves = {split: self._draw_split(split) for split in self._count}
        else:
            if options.series not in real.FOLDERS:
                raise UserError(
                    f"task.series must be '' or one of {', '.join(real.FOLDERS)}, got "
                    f"{options.series!r}"
                )
            self.groups = (options.series,)
            self._read(real.find(options.series, options.path))

    @classmethod
    def needs_data(cls, options: Any) -> bool:
        """A real series in place of synthetic curves."""
        return bool(options.series)

    def _draw_split(self, split: str) -> Curves:
        return synthetic(stream("smoothing", split), self._count[split], with_floor=True)

    def _read(self, files: Sequence[Any]) -> None:
        every = [real.read(path) for path in files]
        self._sha256 = real.fingerprint(files)
        self._train = [real.part(one, "train") for one in every]
        self._curves = {
            split: real.windows(
                stream("smoothing", "gaps", split), [real.part(s, split) for s in every], None
            )
            for split in ("validation", "test")
        }

    def train(self, seed: int) -> grain.IterDataset:
        """New curves in every batch."""
        return endless(self._batch, "smoothing", "train", seed)

    def _batch(self, generator: np.random.Generator) -> Batch:
        if self.synthetic:
            curves = synthetic(generator, self.batch_size)
        else:
            curves = real.windows(generator, self._train, self.batch_size)
        return _with_weight(curves.arrays())

    def evaluation(self, split: str) -> Sequence[Batch]:
        """All curves of a split, 100 at a time."""
        return in_batches(_with_weight(self._curves[split].arrays()), 100)

    def items(self, split: str) -> Items:
        """One item a time asked for; the curve is the cluster, its family the group."""
        curves = self._curves[split]
        return Items(
            cluster=np.repeat(np.arange(len(curves.family)), ASKED),
            distance=nearest_distance(curves).ravel(),
            group=np.repeat(curves.family, ASKED),
            groups=self.groups,
            distance_edges=(0.0, 0.25, 0.5, 1.0, 2.0, 4.0, np.inf),
            distance_name="distance to the nearest observation, in mean spacings",
        )

    def reading(self, text: str | None) -> Reading:
        """The first test curve: times asked for look at times observed."""
        if text is not None:
            raise UserError("smoothing has no words to read: leave out --text")
        row = {name: array[:1] for name, array in self.evaluation("test")[0].items()}
        asked, observed = ([f"{t:.1f}" for t in row[name][0]] for name in ("asked", "times"))
        return Reading(row, asked, observed)

    def build(self, rule: str, model: Any, *, rngs: nnx.Rngs) -> nnx.Module:
        """Blocks of cross-attention from times to points."""
        return Smoother(rule, model, rngs=rngs)

    def loss(
        self, outputs: Array, batch: Mapping[str, Array], *, label_smoothing: float
    ) -> Float[Array, ""]:
        """The mean squared error in variances of the curves."""
        error = ((outputs - batch["truth"]) * batch["unit"]) ** 2 * batch["weight"]
        return error.sum() / jnp.maximum(jnp.asarray(batch["weight"]).sum(), 1)

    def scores(
        self, outputs: Array, batch: Mapping[str, Array]
    ) -> tuple[Float[Array, " items"], Float[Array, " items"]]:
        """Squared errors; the metric is the root of their mean."""
        error = ((outputs - batch["truth"]) * batch["unit"]) ** 2
        return error.ravel(), jnp.asarray(batch["weight"]).ravel()

    def baselines(self) -> Sequence[Baseline]:
        """The mean, Nadaraya-Watson with the best width on validation, and the floor."""
        curves = self._curves["test"]
        mean = np.broadcast_to(curves.values.mean(1, keepdims=True), curves.truth.shape)
        estimates = {
            "mean of the observations": mean,
            "Nadaraya-Watson, best fixed width": self._best_width(),
        }
        if self.synthetic:
            estimates["Gaussian-process posterior (floor)"] = curves.floor
        return [
            Baseline(name, squared_errors(curves, estimate).ravel())
            for name, estimate in estimates.items()
        ]

    def _best_width(self) -> Float64[np.ndarray, "curves asked"]:
        """Each family's estimates with the width that is best on its validation curves."""
        validation, test = self._curves["validation"], self._curves["test"]
        errors = [
            squared_errors(validation, nadaraya_watson(validation, width)).mean(1)
            for width in WIDTHS
        ]
        estimate = np.empty_like(test.truth)
        for family in range(len(self.groups)):
            best = np.argmin([error[validation.family == family].mean() for error in errors])
            rows = test.family == family
            estimate[rows] = nadaraya_watson(test, WIDTHS[best])[rows]
        return estimate

    def describe(self) -> Mapping[str, Any]:
        """Facts for the report."""
        drawn = fingerprint(*(curves.arrays() for curves in self._curves.values()))
        digest = drawn if self.synthetic else self._sha256
        return {"data_sha256": digest, "padding": 0.0, "dropped": {}}


def _with_weight(arrays: Mapping[str, np.ndarray]) -> Batch:
    return {**arrays, "weight": np.ones(arrays["truth"].shape, np.float32)}


class Smoother(nnx.Module):
    """Blocks x + attend(norm(x), points), x + mlp(norm(x)) over the times asked for.

    The last layer is linear in the stream, with no norm before it: an estimate must keep its
    scale. Under the rule `self` a time asked for, which is not among the points, sees none.
    """

    def __init__(self, rule: str, options: Any, *, rngs: nnx.Rngs):
        features, encoding = options.features, options.position_encoding
        if encoding not in ENCODINGS:
            raise UserError(
                f"model.position_encoding of smoothing must be one of {', '.join(ENCODINGS)}, got "
                f"{encoding!r}: times are real numbers"
            )
        self.features, self.encoding, self.blind = features, encoding, rule.strip() == "self"
        width = features if encoding == "sinusoidal" else 1
        self.query = nnx.Linear(width, features, rngs=named(rngs, "query"))
        self.point = nnx.Linear(width + 1, features, rngs=named(rngs, "point"))
        self.point_mlp = FeedForward(
            features, options.mlp_features, options.activation, rngs=named(rngs, "point_mlp")
        )
        self.blocks = nnx.List(
            [
                Block("uniform" if self.blind else rule, options, rngs=named(rngs, f"block{index}"))
                for index in range(options.num_layers)
            ]
        )
        self.head = nnx.Linear(features, 1, rngs=named(rngs, "head"))

    def __call__(self, batch: Mapping[str, Any], *, dropout_key: Any = None) -> Float[Array, "B Q"]:
        """Estimates at the times asked for."""
        del dropout_key
        asked, times = jnp.asarray(batch["asked"]), jnp.asarray(batch["times"])
        x = self.query(self._features(asked))
        points = jnp.concatenate([self._features(times), batch["values"][..., None]], -1)
        points = self.point(points)
        points = points + self.point_mlp(points)
        for block in self.blocks:
            x = block(x, points, asked, times, blind=self.blind)
        return self.head(x)[..., 0]

    def _features(self, times: Float[Array, "B T"]) -> Float[Array, "B T F"]:
        if self.encoding == "sinusoidal":
            return fourier(times, self.features)
        return jnp.zeros((*times.shape, 1))

    def flops(self, batch: Mapping[str, Any]) -> int:
        """Forward FLOPs of one curve."""
        asked, observed = batch["asked"].shape[1], batch["times"].shape[1]
        width = self.query.in_features
        total = 2 * self.features * (asked * width + observed * (width + 1) + asked)
        total += self.point_mlp.flops(observed)
        seen = 0 if self.blind else observed
        return total + sum(block.flops(asked, seen) for block in self.blocks)


class Block(nnx.Module):
    """Cross-attention and feed-forward, each with a norm before and a residual around it."""

    def __init__(self, rule: str, options: Any, *, rngs: nnx.Rngs):
        features = options.features
        self.attention_norm = nnx.LayerNorm(features, rngs=named(rngs, "attention_norm"))
        self.attention = MultiHeadAttention(
            options.num_heads,
            features,
            rule=rule,
            rotary=options.position_encoding == "rotary",
            rngs=named(rngs, "attention"),
        )
        self.mlp_norm = nnx.LayerNorm(features, rngs=named(rngs, "mlp_norm"))
        self.mlp = FeedForward(
            features, options.mlp_features, options.activation, rngs=named(rngs, "mlp")
        )

    def __call__(
        self,
        x: Float[Array, "B Q E"],
        points: Float[Array, "B S E"],
        asked: Float[Array, "B Q"],
        times: Float[Array, "B S"],
        *,
        blind: bool,
    ) -> Float[Array, "B Q E"]:
        """The stream after one block; `blind` hides all points."""
        mask = jnp.zeros((1, 1, 1, 1), bool) if blind else None
        attended = self.attention(
            self.attention_norm(x), points, mask=mask, query_positions=asked, key_positions=times
        )
        x = x + attended
        return x + self.mlp(self.mlp_norm(x))

    def flops(self, asked: int, observed: int) -> int:
        """Forward FLOPs of one curve."""
        return self.attention.flops(asked, observed) + self.mlp.flops(asked)


def fourier(times: Float[Array, "B T"], features: int) -> Float[Array, "B T {features}"]:
    """Sin and cos of 2 pi t / p for periods p from 2 to 128 spacings, evenly in log p."""
    periods = jnp.geomspace(2.0, LONGEST_PERIOD, (features + 1) // 2)
    angles = 2 * jnp.pi * times[..., None] / periods.reshape(1, 1, -1)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)[..., :features]
