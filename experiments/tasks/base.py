"""What a task is: data, a model, a loss, per-item scores and baselines."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import grain
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float64, Int

from experiments.options import TRANSFORMER_OPTIONS, Option
from experiments.tasks.metric import Metric

Batch = Mapping[str, np.ndarray]
"""Arrays whose first axis is the batch axis, all of one length."""


@dataclasses.dataclass(frozen=True)
class Items:
    """What is known of the scored items of a split, one entry each, in the order of scores.

    Attributes:
      cluster: items of one cluster are not independent (a sentence, a curve, a document).
      distance: the task's distance, NaN where an item has none.
      group: index into `groups`, for tables by group.
      groups: names of the groups; one name where the task has no groups.
      distance_edges: ascending edges of the report's distance buckets, low <= d < high.
      distance_name: axis label, for instance "bytes since the last occurrence".
      beyond: items unlike any that training and validation have; they stand in the columns by
        distance and by group, not in the headline. None: there are none.

    """

    cluster: Int[np.ndarray, " items"]
    distance: Float64[np.ndarray, " items"]
    group: Int[np.ndarray, " items"]
    groups: Sequence[str]
    distance_edges: Sequence[float]
    distance_name: str
    beyond: Bool[np.ndarray, " items"] | None = None


@dataclasses.dataclass(frozen=True)
class Reading:
    """One example in words, for those who look at what a model does.

    Attributes:
      batch: of one row, without padding.
      queries: a word for each position that looks.
      keys: a word for each position that is seen.

    """

    batch: Batch
    queries: Sequence[str]
    keys: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A reference without training by gradient: per-item scores on the test split.

    Attributes:
      name: as it stands in tables.
      scores: one score an item, NaN where the reference does not exist; weights are those of
        the task's items.

    """

    name: str
    scores: Float64[np.ndarray, " items"]


class Task(abc.ABC):
    """A task reads its options once, owns its data and says how a model is built and scored.

    A seed fixes the order of batches and a synthetic task's training draw; the items of
    "validation" and "test" are the same for every seed. Nothing here touches parameters or
    files of a run. To add a task: one file with a subclass, one line in `tasks/__init__.py`
    and one config.

    Attributes:
      name: as in `config.task.name`, in workdirs and in tables.
      options: the keys of `config.task`.
      model_options: the keys of `config.model`.
      causal: attention sees the past only.
      cross: attention is from one set of positions to another.
      classifies: the loss is a cross-entropy, which label smoothing changes.
      metric: the headline score.
      selects: what validation is scored by and learning rates are chosen by; None: `metric`.

    """

    name: ClassVar[str]
    options: ClassVar[Mapping[str, Option]]
    model_options: ClassVar[Mapping[str, Option]] = TRANSFORMER_OPTIONS
    causal: ClassVar[bool] = False
    cross: ClassVar[bool] = False
    classifies: ClassVar[bool] = True
    metric: Metric
    selects: Metric | None = None

    @abc.abstractmethod
    def __init__(self, options: Any):
        """Reads the options, as attributes, that this variant of the task uses.

        Raises:
          UserError: data is missing or broken, or an option is out of its range.

        """

    @classmethod
    def needs_data(cls, options: Any) -> bool:
        """Whether these options ask for data that no package brings: by path or by a download."""
        del options
        return False

    @abc.abstractmethod
    def train(self, seed: int) -> grain.IterDataset:
        """Endless training batches of NumPy arrays, all of the same shapes."""

    @abc.abstractmethod
    def evaluation(self, split: str) -> Sequence[Batch]:
        """The batches of "validation" or "test", all of the same shapes (weight 0 pads)."""

    @abc.abstractmethod
    def items(self, split: str) -> Items:
        """Clusters, distances and groups of the items with weight > 0, in batch order."""

    @abc.abstractmethod
    def build(self, rule: str, model: Any, *, rngs: nnx.Rngs) -> nnx.Module:
        """A model for this task under a rule.

        Args:
          rule: a rule by name, see `attn_jax.rules`.
          model: the config's model options (attributes such as `num_layers`); read only what
            is used, since a key that nothing reads stops the run.
          rngs: the source of initial values.

        Returns:
          A module with `module(batch, *, dropout_key=None) -> outputs` and
          `module.flops(batch) -> int`, the forward FLOPs of one example by formula.

        """

    @abc.abstractmethod
    def loss(
        self, outputs: Array, batch: Mapping[str, Array], *, label_smoothing: float
    ) -> Float[Array, ""]:
        """The mean training loss of a batch, padding left out."""

    @abc.abstractmethod
    def scores(
        self, outputs: Array, batch: Mapping[str, Array]
    ) -> tuple[Float[Array, " items"], Float[Array, " items"]]:
        """Per-item scores and weights of one batch, flattened; weight 0 marks padding."""

    @property
    def selecting(self) -> Metric:
        """What models are selected by on validation."""
        return self.selects or self.metric

    def decoded_scores(self, model: Any, split: str) -> Float64[np.ndarray, "items ..."] | None:
        """Scores of a split's items by what a model writes; None where none has to be written.

        They stand in for `scores` on the test split.
        """
        del model, split
        return None

    def reading(self, text: str | None) -> Reading | None:
        """One example in words, for those who look at what a model does.

        Args:
          text: what to read; None: the task's own first test example.

        Returns:
          The example; None where the task has none.

        Raises:
          UserError: the task can't read this text.

        """
        del text
        return None

    def present(self, batch: Batch, path: str) -> Bool[np.ndarray, "B T"] | None:
        """Which queries of an attention are no padding; None: all of them.

        Args:
          batch: of this task.
          path: of the attention, see `attn_jax.analysis.attentions`.

        """
        del path
        if "segment" in batch:
            return np.asarray(batch["segment"]) > 0
        return None

    def key_tokens(self, batch: Batch, path: str) -> Int[np.ndarray, "B S"] | None:
        """The token of each key of an attention, to count how rare it is; None: it has none."""
        del path
        ids = batch.get("word", batch.get("token"))
        if ids is None:
            return None
        # the token itself, where a position is seen together with others
        return np.asarray(ids if ids.ndim == 2 else ids[..., 0])

    @property
    def artefacts(self) -> Mapping[str, str]:
        """Texts by file name that a run keeps beside its weights, such as a tokeniser."""
        return {}

    @abc.abstractmethod
    def baselines(self) -> Sequence[Baseline]:
        """Trivial and classical baselines on the test split."""

    @abc.abstractmethod
    def describe(self) -> Mapping[str, Any]:
        """Facts for the report, as JSON.

        At least `data_sha256`, `padding` (share of training positions that are padding) and
        `dropped` (what was left out or truncated, by reason, with counts).
        """
