"""AdamW with warm-up and a schedule whose peak rate and length are data, not constants.

Lanes of one program differ in their learning rate, and a pilot differs from the main run in its
length: both are traced, so that one compilation serves them all.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from attn_jax.nn import no_weight_decay
from experiments.options import UserError

SCHEDULES = ("cosine", "rsqrt", "constant")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The rate of a step and the direction of an update, kept apart.

    Attributes:
      transform: gradients to the direction of descent at rate one.
      schedule: "cosine", "rsqrt" or "constant".
      warmup_fraction: linear warm-up as a share of the run.

    """

    transform: optax.GradientTransformation
    schedule: str
    warmup_fraction: float

    def rate(self, step: Int[Array, ""], total: Float[Array, ""]) -> Float[Array, ""]:
        """The share of the peak rate at a step: warm-up w, then the schedule.

        With w = max(1, warmup_fraction * total) and t = step + 1: min(t / w, 1) times
        (1 + cos(pi (t - w) / (total - w))) / 2 for cosine, sqrt(w / t) for rsqrt and 1 for
        constant, once t > w.
        """
        t = step.astype(jnp.float32) + 1.0
        warmup = jnp.maximum(1.0, self.warmup_fraction * total)
        rest = jnp.maximum(t - warmup, 0.0)
        if self.schedule == "cosine":
            part = rest / jnp.maximum(total - warmup, 1.0)
            decay = 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.minimum(part, 1.0)))
        elif self.schedule == "rsqrt":
            decay = jax.lax.rsqrt(1.0 + rest / warmup)
        else:
            decay = jnp.ones(())
        return jnp.minimum(t / warmup, 1.0) * decay


def make_optimizer(options: Any) -> Optimizer:
    """The optimiser of `config.training`.

    Raises:
      UserError: the schedule has no such name.

    """
    if options.schedule not in SCHEDULES:
        raise UserError(
            f"training.schedule must be one of {', '.join(SCHEDULES)}, got {options.schedule!r}"
        )
    clip = options.clip_norm
    transform = optax.chain(
        optax.clip_by_global_norm(clip) if clip > 0 else optax.identity(),
        optax.scale_by_adam(b1=options.beta1, b2=options.beta2, eps=options.epsilon),
        optax.add_decayed_weights(options.weight_decay, mask=_decayed),
    )
    return Optimizer(transform, options.schedule, options.warmup_fraction)


def _decayed(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, value: not no_weight_decay(path, value), params
    )
