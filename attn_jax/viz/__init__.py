"""Figures of attention, and a page that shows all of its weights."""

from attn_jax.viz.figures import alignment, all_heads, compare, computation, heatmap, profile
from attn_jax.viz.viewer import Shown, Viewer, viewer

__all__ = [
    "Shown",
    "Viewer",
    "alignment",
    "all_heads",
    "compare",
    "computation",
    "heatmap",
    "profile",
    "viewer",
]
