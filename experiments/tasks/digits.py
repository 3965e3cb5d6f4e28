"""digits: the class of an image that is read pixel by pixel, row by row.

Along the rows the pixel above is as far away as a whole row; in the plane it is a neighbour. With
`distance=plane` every rule of distance sees the Euclidean distance of two pixels in place of the
number of steps between them (negative for a pixel read before), and nothing else changes: images,
model, position encodings and content rules are the same. Euclidean and not Chebyshev, since a
Gaussian of it is the product of one along the rows and one along the columns, and no direction is
preferred.
"""

import dataclasses
import functools
import types
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Float64, Int

from attn_jax.nn import Encoder, Plane, dropout, named
from experiments.models import cross_entropy, stack_options
from experiments.options import Option, UserError
from experiments.tasks import images
from experiments.tasks.base import Baseline, Batch, Items, Metric, Reading, Task
from experiments.tasks.images import Images
from experiments.tasks.synthetic import endless, fingerprint, in_batches

DISTANCES = ("sequence", "plane")
EVALUATION_IMAGES = 64
MOST_GROUPS = 20
"""Sets of more classes have no table by class."""
FITTED = 10_000
"""Images at most that the classical baselines are fitted on."""
REGULARISATION = (0.1, 1.0, 10.0)


class Digits(Task):
    """The class of an image; its distance is how far its ink lies from the ink's centre."""

    name = "digits"
    options = types.MappingProxyType(
        {
            "data": Option(
                "", "set of TFDS by name, such as mnist; empty: scikit-learn's digits, 8 x 8"
            ),
            "distance": Option(
                "sequence",
                "of two pixels, for rules of distance: sequence (steps along the rows) or plane "
                "(Euclidean)",
            ),
            "shrink": Option(1, "blocks of so many rows and columns become one pixel", 1),
            "batch_size": Option(32, "images in a training batch", 1),
        }
    )
    metric = Metric("accuracy", "%", higher_is_better=True, margin=0.01)

    def __init__(self, options: Any):
        self.distance, self.batch_size = options.distance, options.batch_size
        if self.distance not in DISTANCES:
            raise UserError(
                f"task.distance must be one of {', '.join(DISTANCES)}, got {self.distance!r}"
            )
        self._data = _read(options.data, options.shrink)
        self.metric = dataclasses.replace(self.metric, chance=1 / len(self._data.classes))

    @classmethod
    def needs_data(cls, options: Any) -> bool:
        """A set of TFDS."""
        return bool(options.data)

    def train(self, seed: int) -> grain.IterDataset:
        """Training images drawn anew for every batch."""
        return endless(self._batch, "digits", "train", seed)

    def _batch(self, generator: np.random.Generator) -> Batch:
        train = self._data.splits["train"]
        chosen = generator.choice(len(train["target"]), self.batch_size)
        return {name: array[chosen] for name, array in train.items()}

    def evaluation(self, split: str) -> Sequence[Batch]:
        """The images of a split."""
        return in_batches(self._data.splits[split], EVALUATION_IMAGES)

    def items(self, split: str) -> Items:
        """One item an image; duplicates are one cluster."""
        arrays, classes = self._data.splits[split], self._data.classes
        grouped = len(classes) <= MOST_GROUPS
        return Items(
            cluster=self._data.cluster[split],
            distance=self._data.spread[split],
            group=arrays["target"].astype(int) if grouped else np.zeros(len(arrays["target"]), int),
            groups=classes if grouped else ("all",),
            distance_edges=self._data.edges,
            distance_name="pixels from the ink to its centre, root mean square",
        )

    def reading(self, text: str | None) -> Reading:
        """The first test image, a pixel by row and column."""
        if text is not None:
            raise UserError("digits has no words to read: leave out --text")
        row = {name: array[:1] for name, array in self.evaluation("test")[0].items()}
        rows, columns, _ = self._data.shape
        pixels = [f"{r},{c}" for r in range(rows) for c in range(columns)]
        return Reading(row, pixels, pixels)

    def build(self, rule: str, model: Any, *, rngs: nnx.Rngs) -> nnx.Module:
        """An encoder of all pixels whose mean is classified."""
        rows, columns, channels = self._data.shape
        return ImageClassifier(
            pixels=rows * columns,
            channels=channels,
            num_classes=len(self._data.classes),
            rule=rule,
            options=model,
            distance=Plane(columns) if self.distance == "plane" else None,
            rngs=rngs,
        )

    def loss(
        self, outputs: Array, batch: Mapping[str, Array], *, label_smoothing: float
    ) -> Float[Array, ""]:
        """Cross-entropy over images."""
        return cross_entropy(outputs, batch["target"], batch["weight"], label_smoothing)

    def scores(
        self, outputs: Array, batch: Mapping[str, Array]
    ) -> tuple[Float[Array, " items"], Float[Array, " items"]]:
        """1 where the most likely class is the right one."""
        right = jnp.argmax(outputs, -1) == batch["target"]
        return right.astype(jnp.float32), jnp.asarray(batch["weight"])

    def baselines(self) -> Sequence[Baseline]:
        """Without reading pixel by pixel: the commonest class, and two classical references."""
        return self._data.baselines

    def describe(self) -> Mapping[str, Any]:
        """Facts for the report."""
        return self._data.facts


class ImageClassifier(nnx.Module):
    """Logits of an image: pixels embedded one by one, an encoder under a rule, its mean, a head.

    Args:
      pixels: T, pixels of an image.
      channels: numbers of a pixel.
      num_classes: C.
      rule: of every layer's attention, by name.
      options: see `experiments.models.TokenClassifier`.
      distance: of two pixels, for kernels; None: steps along the sequence.
      rngs: the source of initial values.

    Raises:
      ValueError: an option or the rule does not fit.

    """

    def __init__(
        self,
        *,
        pixels: int,
        channels: int,
        num_classes: int,
        rule: str,
        options: Any,
        distance: Plane | None,
        rngs: nnx.Rngs,
    ):
        features = options.features
        self.pixels, self.dropout_rate = pixels, options.dropout_rate
        self.embedding = nnx.Linear(channels, features, rngs=named(rngs, "embedding"))
        self.encoder = Encoder(
            options.num_layers,
            features,
            options.num_heads,
            rule=rule,
            max_length=pixels,
            distance=distance,
            rngs=named(rngs, "encoder"),
            **stack_options(options),
        )
        self.head = nnx.Linear(features, num_classes, rngs=named(rngs, "head"))

    def __call__(self, batch: Mapping[str, Any], *, dropout_key: Any = None) -> Float[Array, "B C"]:
        """Logits for a batch with "pixels" [B, T, channels] in 0..1."""
        x = self.embedding(jnp.asarray(batch["pixels"]))
        x = self.encoder(x, dropout_key=dropout_key)
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, 1)
        return self.head(dropout(x.mean(1), self.dropout_rate, key))

    def flops(self, batch: Mapping[str, Any]) -> int:
        """Forward FLOPs of one image: embedding, encoder and head."""
        del batch
        ends = self.pixels * self.embedding.in_features + self.head.out_features
        return self.encoder.flops(self.pixels) + 2 * ends * self.embedding.out_features


@dataclasses.dataclass(frozen=True)
class Data:
    """Everything of a set of images that neither a seed nor an arm changes.

    Attributes:
      splits: for each split "pixels" [images, T, channels], "target" and "weight" [images].
      shape: rows, columns and channels.
      classes: their names.
      cluster: for each split, equal numbers for duplicates.
      spread: for each split, the distance of every image.
      edges: of buckets of distance.
      facts: for the report.

    """

    splits: Mapping[str, Batch]
    shape: tuple[int, int, int]
    classes: Sequence[str]
    cluster: Mapping[str, Int[np.ndarray, " images"]]
    spread: Mapping[str, Float64[np.ndarray, " images"]]
    edges: Sequence[float]
    facts: Mapping[str, Any]

    @functools.cached_property
    def baselines(self) -> Sequence[Baseline]:
        """Fitted on the training split, or on the first images of a large one."""
        from sklearn.neighbors import KNeighborsClassifier  # training needs no scikit-learn

        train, validation, test = (
            (flat(self.splits[name]["pixels"]), self.splits[name]["target"])
            for name in ("train", "validation", "test")
        )
        fitted = train[0][:FITTED], train[1][:FITTED]
        models = {
            "logistic regression": _logistic_regression(fitted, validation),
            "nearest image": KNeighborsClassifier(1).fit(*fitted),
        }
        commonest = np.bincount(train[1]).argmax()
        guessed = {"commonest class": np.full(len(test[1]), commonest)}
        guessed |= {name: model.predict(test[0]) for name, model in models.items()}
        return [Baseline(name, (guess == test[1]).astype(float)) for name, guess in guessed.items()]


@functools.lru_cache(maxsize=2)
def _read(data: str, shrink: int) -> Data:
    """Reads and splits, once for all programs of a process.

    Raises:
      UserError: see `images.load` and `Images.intensity`.

    """
    splits, left_out = images.load(data)
    intensity = {name: one.intensity(shrink) for name, one in splits.items()}
    arrays = {name: _arrays(one, intensity[name]) for name, one in splits.items()}
    spread = {name: ink_spread(one) for name, one in intensity.items()}
    return Data(
        splits=arrays,
        shape=intensity["train"].shape[1:],
        classes=splits["train"].classes,
        cluster={
            name: np.unique(np.array(one.hashes), return_inverse=True)[1]
            for name, one in splits.items()
        },
        spread=spread,
        edges=_quarters(spread["train"]),
        facts={
            "data_sha256": fingerprint(*(arrays[name] for name in sorted(arrays))),
            "padding": 0.0,
            "dropped": {"copies of test images": left_out} if left_out else {},
            "images": {name: len(one) for name, one in splits.items()},
            "pixels": list(intensity["train"].shape[1:]),
        },
    )


def _arrays(
    one: Images, intensity: Float32[np.ndarray, "images rows columns channels"]
) -> dict[str, np.ndarray]:
    return {
        "pixels": intensity.reshape(len(one), -1, intensity.shape[-1]),
        "target": one.label.astype(np.int32),
        "weight": np.ones(len(one), np.float32),
    }


def ink_spread(
    intensity: Float32[np.ndarray, "images rows columns channels"],
) -> Float64[np.ndarray, " images"]:
    """Root mean square distance of an image's ink from its centre, in pixels; NaN without ink."""
    ink = intensity.mean(-1, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        share = ink / ink.sum((1, 2), keepdims=True)
    variance = np.zeros(len(ink))
    for axis in (1, 2):
        along = share.sum(3 - axis)
        place = np.arange(along.shape[1], dtype=float)
        variance += along @ place**2 - (along @ place) ** 2
    return np.sqrt(np.maximum(variance, 0))


def _quarters(spread: Float64[np.ndarray, " images"]) -> Sequence[float]:
    """Edges of four buckets of about as many training images each, to a tenth of a pixel."""
    inner = np.round(np.nanquantile(spread, (0.25, 0.5, 0.75)), 1) if len(spread) else []
    return (0.0, *(float(edge) for edge in np.unique(inner) if edge > 0), np.inf)


def flat(pixels: Float32[np.ndarray, "images T channels"]) -> Float32[np.ndarray, "images N"]:
    """Every image as one row of numbers."""
    return pixels.reshape(len(pixels), -1)


def _logistic_regression(
    train: tuple[np.ndarray, np.ndarray], validation: tuple[np.ndarray, np.ndarray]
) -> Any:
    """Of all pixels, with the regularisation that validation prefers."""
    from sklearn.linear_model import LogisticRegression

    models = [LogisticRegression(C=c, max_iter=1000).fit(*train) for c in REGULARISATION]
    return max(models, key=lambda model: model.score(*validation))
