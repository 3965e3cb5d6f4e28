"""A page of the weights of one or several models: one file, no network, no notebook needed."""

import base64
import dataclasses
import html
import importlib.resources
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Num

from attn_jax.analysis.recording import Attention

MOST_ROWS = 512
"""A matrix with more queries or keys is binned, so that a page stays light."""
MOST_NUMBERS = 4_000_000
"""Of all matrices of a page together, likewise."""
SMALL = 64
"""Up to so many queries or keys are never binned."""


@dataclasses.dataclass(frozen=True)
class Shown:
    """The weights of one attention for one input, with its tokens.

    Attributes:
      weights: w, of every key for every query and head.
      queries: a word for each query.
      keys: a word for each key.
      allowed: keys that the mask lets a query see; None: all.
      relative: r, for profiles; None: the key's index less the query's.

    """

    weights: Float[np.ndarray, "N T S"]
    queries: Sequence[str]
    keys: Sequence[str]
    allowed: Bool[np.ndarray, "N T S"] | None = None
    relative: Num[np.ndarray, "T S"] | None = None

    def __post_init__(self):
        shape = np.shape(self.weights)
        if len(shape) != 3 or shape[1:] != (len(self.queries), len(self.keys)):
            raise ValueError(
                "weights must be [N, T, S] with a word for each query and key, got "
                f"{list(shape)}, {len(self.queries)} queries and {len(self.keys)} keys"
            )

    @classmethod
    def of(
        cls, attention: Attention, queries: Sequence[str], keys: Sequence[str], example: int = 0
    ) -> "Shown":
        """One example of what `analysis.record` kept; padding behind the words is left out."""
        queries_kept, keys_kept = len(queries), len(keys)
        relative = np.asarray(attention.relative)
        return cls(
            np.asarray(attention.weights, np.float32)[example, :, :queries_kept, :keys_kept],
            queries,
            keys,
            np.asarray(attention.allowed)[example, :, :queries_kept, :keys_kept],
            relative[example % len(relative), :queries_kept, :keys_kept],
        )


@dataclasses.dataclass(frozen=True)
class Viewer:
    """A page; in a notebook it shows itself.

    Attributes:
      page: the HTML.

    """

    page: str

    def save(self, path: str | pathlib.Path) -> pathlib.Path:
        """Writes the page."""
        path = pathlib.Path(path)
        path.write_text(self.page, encoding="utf-8")
        return path

    def _repr_html_(self) -> str:
        return (
            f'<iframe srcdoc="{html.escape(self.page, quote=True)}" '
            'style="width:100%;height:760px;border:0" title="weights of attention"></iframe>'
        )


def viewer(models: Mapping[str, Mapping[str, Shown]], title: str = "Attention weights") -> Viewer:
    """A page that shows the weights of models or rules, one or two side by side.

    It shows every head as a matrix, as lines from token to token, or all layers and heads at once;
    two models beside each other with their difference; the profile by relative position; numbers
    under the pointer or the keyboard's cursor. What is seen is saved as SVG or PNG from the page.

    Weights are exactly those given, in float32. An input of more than 512 tokens, or one of more
    than 64 on a page of more than four million weights, is binned: a cell is the weight of the
    keys of a bin together, in the mean of the queries of a bin, so that rows still sum to what
    they did; the page says so. Profiles are of all weights.

    Args:
      models: by name, and within each by path, such as "encoder/layers/0/attention": the last
        number is the layer, the rest the attention's name in the page.
      title: of the page.

    Raises:
      ValueError: there is no model, or one without attention.

    """
    if not models or not all(models.values()):
        raise ValueError("a viewer needs a model with an attention or more, got none")
    total = sum(np.size(one.weights) for some in models.values() for one in some.values())
    thinner = max(1, int(np.ceil(np.sqrt(total / MOST_NUMBERS))))
    data = {
        "models": [
            {"name": name, "attentions": [_attention(p, one, thinner) for p, one in some.items()]}
            for name, some in models.items()
        ]
    }
    return Viewer(_page(title, data))


def _page(title: str, data: dict[str, Any]) -> str:
    parts = {
        "title": html.escape(title),
        "css": _resource("viewer.css"),
        "js": _resource("viewer.js"),
        # HTML looks for tags also inside of a script's strings
        "data": json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _resource("viewer.html"))


def _resource(name: str) -> str:
    return (importlib.resources.files("attn_jax.viz") / name).read_text(encoding="utf-8")


def _attention(path: str, one: Shown, thinner: int) -> dict[str, Any]:
    """What the page is told of one attention."""
    _, queries, keys = one.weights.shape
    bins = [max(-(-size // MOST_ROWS), thinner if size > SMALL else 1) for size in (queries, keys)]
    binned = _binned(np.asarray(one.weights, np.float32), *bins)
    part, layer = _place(path)
    return {
        "part": part,
        "layer": layer,
        "heads": len(binned),
        "queries": _words(one.queries, bins[0]),
        "keys": _words(one.keys, bins[1]),
        "bins": bins,
        "data": base64.b64encode(binned.astype("<f4").tobytes()).decode(),
        "profile": _profile(one),
    }


def _place(path: str) -> tuple[str, int]:
    """The name of an attention without its layer, and the layer."""
    steps = [step for step in path.split("/") if step]
    last = next((i for i in reversed(range(len(steps))) if steps[i].isdigit()), None)
    words = [step for i, step in enumerate(steps) if i != last and step != "layers"]
    return " ".join(words) or "attention", 0 if last is None else int(steps[last])


def _binned(weights: Float[np.ndarray, "N T S"], queries: int, keys: int) -> np.ndarray:
    """Sums over bins of keys, means over bins of queries."""
    if queries > 1:
        starts = np.arange(0, weights.shape[1], queries)
        counts = np.diff(np.append(starts, weights.shape[1]))
        weights = np.add.reduceat(weights, starts, 1) / counts[None, :, None].astype(np.float32)
    if keys > 1:
        weights = np.add.reduceat(weights, np.arange(0, weights.shape[2], keys), 2)
    return np.ascontiguousarray(weights)


def _words(tokens: Sequence[str], size: int) -> list[str]:
    if size == 1:
        return [str(token) for token in tokens]
    starts = range(0, len(tokens), size)
    return [f"{start}\u2013{min(start + size, len(tokens)) - 1}" for start in starts]


def _profile(one: Shown) -> dict[str, Any]:
    """Mean weight by relative position over the queries that may see a key there."""
    heads, queries, keys = one.weights.shape
    relative = one.relative
    if relative is None:
        relative = np.arange(keys)[None] - np.arange(queries)[:, None]
    r = np.rint(np.broadcast_to(relative, (queries, keys))).astype(int)
    low, size = r.min(), int(r.max() - r.min()) + 1
    bins = (r - low).ravel()
    everything = np.ones((heads, queries, keys), bool)
    allowed = everything if one.allowed is None else np.asarray(one.allowed)
    curves = []
    for weights, mask in zip(one.weights, allowed, strict=True):
        total = np.bincount(bins, np.asarray(weights, np.float64).ravel(), size)
        count = np.bincount(bins, mask.ravel(), size)
        means = total / np.maximum(count, 1)
        curves.append(
            [float(m) if c and np.isfinite(m) else None for m, c in zip(means, count, strict=True)]
        )
    return {"relative": (low + np.arange(size)).tolist(), "weight": curves}
