"""Attention without content by the nature of its kernel: no T x S array, nearly linear time.

On regularly spaced positions weights depend on the distance r alone, so that attention is a sum
with one set of weights for all queries, over one of ones. By kernel:

- short reach: shifted slices (`taps`);
- Gaussian of any width: down to a coarse grid and up again by short sums (`gaussian`), with
  segments laid apart;
- exponential: states of chunks (`exponential`);
- window, or no kernel: blocked sums (`boxes`);
- anything else: Fourier transforms (`fourier`).

`methods` chooses, as the program runs if a width is data. Rows whose keys are all far from the
kernel's peak, where sums of weights underflow or drown in noise, are computed densely in log space
(`exact`), and only they.

NaN and inf: keys that the mask hides from every query reach nothing. Those that it hides from some
queries only, or that only the kernel's reach excludes, may reach other queries.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from attn_jax.ops import dense, masks
from attn_jax.ops.call import Call
from attn_jax.ops.toeplitz import exact, line, methods
from attn_jax.ops.toeplitz.line import mask_parts, offset_of
from attn_jax.ops.toeplitz.rows import Rows, for_heads

# Dense weights are as soon computed.
_FEW = 256


def available() -> bool:
    """Whether this machine can run it."""
    return True


def unsupported(call: Call) -> str | None:
    """Why it can't run the call, or None."""
    if call.query is not None:
        return "it takes no query and key"
    if call.bias is not None or call.score is not None:
        return "it takes no bias and no score function"
    if call.dropout_rate:
        return "it has no dropout"
    if call.normalizer in ("sparsemax", "entmax15"):
        return f"it has no {call.normalizer}"
    if offset_of(call) is None:
        return "positions must be known while tracing, and one step apart"
    if mask_parts(call.mask) is None:
        return (
            "its masks are Lengths, Segments, Causal and Local with one number a side, joined by &"
        )
    if _distance(call) > 4 * (sum(call.shape[2:]) + _FEW):
        return "queries and keys lie too far apart"
    return None


def unwise(call: Call) -> str | None:
    """Why another implementation is probably faster, or None."""
    if min(call.shape[2:]) <= _FEW:
        return "so few queries or keys are as soon computed densely"
    labeled = any(isinstance(m, masks.Segments) for m in mask_parts(call.mask) or ())
    if labeled and {m.name for m in _choices(call)} <= {methods.SLICES, methods.FOURIER}:
        return "segments are computed densely where a sum takes in others"
    return None


def _distance(call: Call) -> int:
    offset = offset_of(call)
    return 0 if offset is None else abs(offset)


def _choices(call: Call) -> list[methods.Method]:
    return methods.choices(call, line.of(call))


def plan(call: Call) -> str:
    """How it would run the call, for people."""
    if 0 in (*call.shape, call.value.shape[3]):
        return "nothing to compute"
    names = list(dict.fromkeys(method.name for method in _choices(call)))
    return names[0] if len(names) == 1 else " or ".join(names) + ", by the parameters"


def run(call: Call) -> tuple[Float[Array, "B T N D"], Float[Array, "B T N"] | None]:
    """Output and log-normaliser (None unless asked for)."""
    if 0 in (*call.shape, call.value.shape[3]):
        return dense.run(call)
    placed = line.of(call)
    rows = methods.rows(call, placed)
    result = _attention(call, placed, rows)
    if methods.is_sure(call, placed):
        return result
    needed = placed.at_queries(rows.weak & ~placed.empty(placed.radius))
    return exact.filled(call, placed, result, needed)


def _attention(
    call: Call, placed: line.Line, rows: Rows
) -> tuple[Float[Array, "B T N D"], Float[Array, "B T N"] | None]:
    """Rows at the queries, of all heads, in the values' dtype."""
    mixed = for_heads(placed.at_queries(rows.mixed), call.heads).astype(call.value.dtype)
    if not call.return_log_normalizer:
        return mixed, None
    log = rows.shift.reshape(1, 1, -1, 1) + jnp.log(rows.total)
    empty = 0 if call.normalizer == "softmax_one" else -jnp.inf
    log = placed.at_queries(jnp.where(placed.empty(placed.radius), empty, log))[..., 0]
    batch, heads, queries, _ = call.shape
    return mixed, jnp.broadcast_to(log, (batch, queries, heads))
