"""What trained heads do: their weights, what they look at, and how much of it is distance."""

from attn_jax.analysis.fitting import Explained, Fit, explain_by_position
from attn_jax.analysis.kernels import FAMILIES, PerHead, Shifted
from attn_jax.analysis.recording import Attention, attentions, record
from attn_jax.analysis.rows import Rows, rows, sample
from attn_jax.analysis.statistics import (
    KINDS,
    Profile,
    Statistics,
    kinds,
    profile,
    rare,
    statistics,
)
from attn_jax.analysis.steps import HeadSteps, Reweighing, Steps, steps
from attn_jax.analysis.swapping import (
    Head,
    Replacement,
    all_heads,
    choose,
    greedy_order,
    shuffled,
    swapping,
)

__all__ = [
    "FAMILIES",
    "KINDS",
    "Attention",
    "Explained",
    "Fit",
    "Head",
    "HeadSteps",
    "PerHead",
    "Profile",
    "Replacement",
    "Reweighing",
    "Rows",
    "Shifted",
    "Statistics",
    "Steps",
    "all_heads",
    "attentions",
    "choose",
    "explain_by_position",
    "greedy_order",
    "kinds",
    "profile",
    "rare",
    "record",
    "rows",
    "sample",
    "shuffled",
    "statistics",
    "steps",
    "swapping",
]
