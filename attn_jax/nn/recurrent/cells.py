"""Steps of recurrent layers.

Letters: B batch, E features in, H hidden, G = 3 H (GRU) or 4 H (LSTM).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attn_jax.nn.initialization import named

CELLS = ("gru", "lstm")
State = tuple[Float[Array, "B H"], ...]
"""h of a GRU; h and c of an LSTM."""


class Cell(nnx.Module):
    r"""A step of a recurrent layer; the product with its input is taken for all steps at once.

    GRU, with x' = W x + b:

    .. math::
      r = \sigma(x'_r + U_r h), \quad z = \sigma(x'_z + U_z h), \quad
      n = \tanh(x'_n + r \odot (U_n h + b_n)), \quad h' = (1 - z) \odot n + z \odot h

    LSTM, with (i, f, g, o) = x' + U h and a bias of f that is one at first:

    .. math::
      c' = \sigma(f) \odot c + \sigma(i) \odot \tanh(g), \quad h' = \sigma(o) \odot \tanh(c')

    Args:
      in_features: E.
      hidden: H.
      kind: "gru" or "lstm".
      rngs: the source of initial values.

    Raises:
      ValueError: there is no such cell.

    References: Cho et al. 2014 (the reset behind the product, as in its first version and cuDNN);
      Hochreiter and Schmidhuber 1997; Gers et al. 2000 (the forget gate).

    """

    def __init__(self, in_features: int, hidden: int, kind: str, *, rngs: nnx.Rngs):
        if kind not in CELLS:
            raise ValueError(f"cell must be 'gru' or 'lstm', got {kind!r}")
        self.hidden, self.kind = hidden, kind
        width = (3 if kind == "gru" else 4) * hidden
        orthogonal = nnx.initializers.orthogonal()
        self.input = nnx.Linear(in_features, width, rngs=named(rngs, "input"))
        key = named(rngs, "recurrent")
        blocks = [
            orthogonal(named(key, gate).params(), (hidden, hidden))
            for gate in range(width // hidden)
        ]
        self.recurrent = nnx.Param(jnp.concatenate(blocks, 1))
        if kind == "gru":
            self.bias = nnx.Param(jnp.zeros(hidden))
        else:
            bias = self.input.bias
            assert bias is not None
            bias[...] = bias[...].at[hidden : 2 * hidden].set(1)

    def initial(self, batch: int, dtype: Any = jnp.float32) -> State:
        """The state of zeros."""
        zeros = jnp.zeros((batch, self.hidden), dtype)
        return (zeros,) if self.kind == "gru" else (zeros, zeros)

    def entry(self, x: Float[Array, "*B e"]) -> tuple[Float[Array, "*B G"], Float[Array, "rest G"]]:
        """W x + b of the input's first features, and the rows of W for the others.

        Taken before a loop: XLA copies a slice of W at every step.
        """
        kernel, bias = self.input.kernel[...], self.input.bias
        assert bias is not None
        known = x @ kernel[: x.shape[-1]] + bias[...].reshape((1,) * (x.ndim - 1) + (-1,))
        return known, kernel[x.shape[-1] :]

    def step(self, projected: Float[Array, "B G"], state: State) -> State:
        """The state after an input W x + b."""
        product = state[0] @ self.recurrent[...]
        if self.kind == "gru":
            parts, products = jnp.split(projected, 3, -1), jnp.split(product, 3, -1)
            reset, update = (jax.nn.sigmoid(parts[i] + products[i]) for i in (0, 1))
            new = jnp.tanh(parts[2] + reset * (products[2] + self.bias[...][None]))
            return ((1 - update) * new + update * state[0],)
        entry, forget, cell, out = jnp.split(projected + product, 4, -1)
        memory = jax.nn.sigmoid(forget) * state[1] + jax.nn.sigmoid(entry) * jnp.tanh(cell)
        return jax.nn.sigmoid(out) * jnp.tanh(memory), memory

    def flops(self, length: int) -> int:
        """Two products a step: 2 T G (E + H)."""
        width = self.recurrent.shape[1]
        return 2 * length * width * (self.input.in_features + self.hidden)


def check_layers(num_layers: int) -> None:
    """Raises ValueError for fewer layers than one."""
    if num_layers < 1:
        raise ValueError(f"num_layers must be 1 or more, got {num_layers}")
