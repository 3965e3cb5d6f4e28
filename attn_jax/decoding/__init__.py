"""Text from a model: greedy decoding, sampling, beam search, and scores of given outputs.

A model is a step function, `step(tokens, state) -> (logits, state)`: it is told the last token of
every sequence and gives the logits of the next one.

    @jax.jit
    def translate(state, start):
        return beam_search(step, state, start, end=2, max_length=50, beam_size=4, alpha=0.6)

All functions are pure, and nothing in here is jitted: the caller owns jit. Their loops end as soon
as every sequence is done. What a sequence becomes depends on nothing else in its batch.
"""

from attn_jax.decoding.beams import Beams, beam_search, length_penalty
from attn_jax.decoding.sampling import sample
from attn_jax.decoding.sequences import Decoded, greedy, score
from attn_jax.decoding.steps import Step, recomputing

__all__ = [
    "Beams",
    "Decoded",
    "Step",
    "beam_search",
    "greedy",
    "length_penalty",
    "recomputing",
    "sample",
    "score",
]
