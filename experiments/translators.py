"""Models that translate: embeddings, an encoder-decoder of either kind, logits of subwords.

Both kinds answer the same calls: training on packed rows, and decoding of sentences step by step
with a cache. The Transformer's cross-attention and the recurrent decoder's attention see distance
by the position aligned with a source token: its own times the length ratio of the training data.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attn_jax.nn import EncoderDecoder, RecurrentEncoderDecoder, dropout, named
from attn_jax.ops import Lengths, Segments
from experiments.models import stack_options
from experiments.options import TRANSFORMER_OPTIONS, Option, UserError

KINDS = ("transformer", "recurrent")
OPTIONS: Mapping[str, Option] = {
    **TRANSFORMER_OPTIONS,
    "kind": Option("transformer", "transformer or recurrent (Bahdanau, Luong)"),
    "decoder_rule": Option("", "transformer: of the decoder's self-attention; '': as `rule`"),
    "cross_rule": Option(
        "learned", "transformer: from decoder to encoder; one for all layers, or one each, with ;"
    ),
    "attention_dropout_rate": Option(0.0, "transformer: dropout of attention weights", 0, 1),
    "normalizer": Option("softmax", "transformer: of self-attention, see attn_jax.attention"),
    "cross_normalizer": Option("softmax", "transformer: of attention from decoder to encoder"),
    "shared_embeddings": Option(True, "one table for source, target and output"),
    "hidden": Option(
        256, "recurrent: width of the decoder's state; the encoder's is half of it", 2
    ),
    "cell": Option("gru", "recurrent: gru or lstm"),
    "attend": Option("before", "recurrent: before (Bahdanau) or after (Luong) a step of the cell"),
    "input_feeding": Option(False, "recurrent: the attentional vector is an input of the next"),
}


class Embeddings(nnx.Module):
    """Vectors of source and target subwords, and logits by the same or by another table."""

    def __init__(self, size: int, features: int, *, shared: bool, rngs: nnx.Rngs):
        self.features, self.size = features, size
        names = ("source",) if shared else ("source", "target", "output")
        for name in names:
            draw = named(rngs, name).params.normal((size, features))
            setattr(self, name, nnx.Param(draw * features**-0.5))
        self.bias = nnx.Param(jnp.zeros(size))
        self.shared = shared

    def _table(self, name: str) -> Float[Array, "V E"]:
        return getattr(self, "source" if self.shared else name)[...]

    def __call__(self, ids: Int[Array, "*B"], side: str) -> Float[Array, "*B E"]:
        """Vectors of variance one, as position encodings expect."""
        return self._table(side)[ids] * self.features**0.5

    def logits(self, x: Float[Array, "*B E"]) -> Float[Array, "*B V"]:
        """Logits of every subword."""
        return jnp.einsum("...e,ve->...v", x, self._table("output")) + self.bias[...].reshape(
            (1,) * (x.ndim - 1) + (-1,)
        )


class Translator(nnx.Module):
    """What both kinds share: embeddings, the length ratio, an encoder-decoder `model`.

    A kind has two more calls. `start(source, length, steps)` is the state before the first target
    token of sentences [B, S] of `length` tokens [B], for at most `steps` steps;
    `step(tokens, state)` gives the logits of the next token, told the last one, and the state.

    Args:
      vocabulary: V.
      model: an encoder-decoder with `flops(source_length, target_length)`.
      options: see `OPTIONS`.
      ratio: target tokens to a source token, by which positions are aligned.
      rngs: the source of initial values.

    """

    def __init__(self, vocabulary: int, model: Any, options: Any, ratio: float, *, rngs: nnx.Rngs):
        self.model, self.ratio = model, ratio
        self.embeddings = Embeddings(
            vocabulary,
            options.features,
            shared=options.shared_embeddings,
            rngs=named(rngs, "embeddings"),
        )

    def aligned(self, length: int) -> Float[Array, "1 S"]:
        """The target positions that the tokens of a source stand beside."""
        return self.ratio * jnp.arange(length)[None]

    def flops(self, batch: Mapping[str, Any]) -> int:
        """Forward FLOPs of one packed row: the model and the logits; lookups count nothing."""
        source, target = batch["source"].shape[1], batch["target_in"].shape[1]
        logits = 2 * target * self.embeddings.size * self.embeddings.features
        return self.model.flops(source, target) + logits


class TransformerTranslator(Translator):
    """The Transformer of Vaswani et al. 2017 with a rule in every slot.

    Args:
      vocabulary: V.
      rule: of the encoder's self-attention.
      options: see `OPTIONS`.
      ratio: see `Translator`.
      max_length: number of learned positions.
      rngs: the source of initial values.

    Raises:
      ValueError: an option or a rule does not fit.

    """

    def __init__(
        self,
        vocabulary: int,
        rule: str,
        options: Any,
        *,
        ratio: float,
        max_length: int,
        rngs: nnx.Rngs,
    ):
        model = EncoderDecoder(
            options.num_layers,
            options.features,
            options.num_heads,
            rule=per_layer(rule),
            decoder_rule=per_layer(options.decoder_rule or rule),
            cross_rule=per_layer(options.cross_rule),
            attention_dropout_rate=options.attention_dropout_rate,
            normalizer=options.normalizer,
            cross_normalizer=options.cross_normalizer,
            max_length=max_length,
            rngs=named(rngs, "model"),
            **stack_options(options),
        )
        super().__init__(vocabulary, model, options, ratio, rngs=rngs)
        self.dropout_rate = options.dropout_rate

    def __call__(
        self, batch: Mapping[str, Any], *, dropout_key: Any = None
    ) -> Float[Array, "B T V"]:
        """Logits of every target token of packed rows.

        Args:
          batch: "source", "source_segment", "source_position", "target_in", "target_segment" and
            "target_position", each [B, S] or [B, T]; segment 0 is padding.
          dropout_key: a key turns dropout on.

        """
        keys = (None,) * 3 if dropout_key is None else jax.random.split(dropout_key, 3)
        source, target = batch["source_segment"], batch["target_segment"]
        context = self.model.encoder(
            self.embeddings(batch["source"], "source"),
            mask=Segments(source),
            encoding_positions=batch["source_position"],
            dropout_key=keys[0],
        )
        x = self.model.decoder(
            self.embeddings(batch["target_in"], "target"),
            context,
            mask=Segments(target),
            context_mask=Segments(target, source),
            positions=batch["target_position"],
            context_positions=self.ratio * batch["source_position"],
            dropout_key=keys[1],
        )
        return self.embeddings.logits(dropout(x, self.dropout_rate, keys[2]))

    def start(self, source: Int[Array, "B S"], length: Int[Array, "B"], steps: int) -> Any:
        """See `Translator`."""
        context = self.model.encoder(self.embeddings(source, "source"), mask=Lengths(key=length))
        decoder = self.model.decoder
        return {
            "context": decoder.project(context, self.aligned(source.shape[1])),
            "length": length,
            "cache": decoder.init_cache(len(source), steps),
        }

    def step(self, tokens: Int[Array, "B"], state: Any) -> tuple[Float[Array, "B V"], Any]:
        """See `Translator`."""
        context = state["context"]
        x, cache = self.model.decoder(
            self.embeddings(tokens[:, None], "target"),
            context,
            context_mask=Lengths(key=state["length"]),
            context_positions=self.aligned(context[0].value.shape[1])[0],
            cache=state["cache"],
        )
        return self.embeddings.logits(x[:, 0]), {**state, "cache": cache}


class RecurrentTranslator(Translator):
    """The recurrent encoder-decoder of Bahdanau et al. 2015 and Luong et al. 2015 under any rule.

    Takes the arguments of `TransformerTranslator` but max_length; the rule is that of the attention
    to the source, and "none" leaves it out.
    """

    def __init__(self, vocabulary: int, rule: str, options: Any, *, ratio: float, rngs: nnx.Rngs):
        model = RecurrentEncoderDecoder(
            options.features,
            options.hidden,
            num_layers=options.num_layers,
            cell=options.cell,
            dropout_rate=options.dropout_rate,
            rule=None if rule == "none" else rule,
            num_heads=options.num_heads,
            attend=options.attend,
            input_feeding=options.input_feeding,
            rngs=named(rngs, "model"),
        )
        super().__init__(vocabulary, model, options, ratio, rngs=rngs)

    def __call__(
        self, batch: Mapping[str, Any], *, dropout_key: Any = None
    ) -> Float[Array, "B T V"]:
        """Logits of every target token of packed rows; see `TransformerTranslator`."""
        x = self.model(
            self.embeddings(batch["source"], "source"),
            self.embeddings(batch["target_in"], "target"),
            source_segment=jnp.asarray(batch["source_segment"]),
            target_segment=jnp.asarray(batch["target_segment"]),
            context_positions=self.ratio * jnp.asarray(batch["source_position"]),
            dropout_key=dropout_key,
        )
        return self.embeddings.logits(x)

    def start(self, source: Int[Array, "B S"], length: Int[Array, "B"], steps: int) -> Any:
        """See `Translator`; any number of steps may follow."""
        del steps
        encoded = self.model.encoder(self.embeddings(source, "source"), length=length)
        return self.model.decoder.init_cache(encoded, self.aligned(source.shape[1]))

    def step(self, tokens: Int[Array, "B"], state: Any) -> tuple[Float[Array, "B V"], Any]:
        """See `Translator`."""
        x, state = self.model.decoder.step(self.embeddings(tokens, "target"), state)
        return self.embeddings.logits(x), state


def sides(path: str) -> tuple[str, str]:
    """The sides of the queries and of the keys of a translator's attention, by its path."""
    if "encoder" in path:
        return "source", "source"
    if path.endswith("cross") or "layers" not in path:
        return "target", "source"
    return "target", "target"


def per_layer(rule: str) -> str | Sequence[str]:
    """One rule for all layers, or those of each, which ";" separates."""
    parts = [part.strip() for part in rule.split(";")]
    return parts[0] if len(parts) == 1 else parts


def build(
    vocabulary: int, rule: str, options: Any, *, ratio: float, max_length: int, rngs: nnx.Rngs
) -> Translator:
    """The translator of `config.model`.

    Raises:
      UserError: there is no such kind.

    """
    if options.kind not in KINDS:
        raise UserError(f"model.kind must be one of {', '.join(KINDS)}, got {options.kind!r}")
    if options.kind == "recurrent":
        return RecurrentTranslator(vocabulary, rule, options, ratio=ratio, rngs=rngs)
    return TransformerTranslator(
        vocabulary, rule, options, ratio=ratio, max_length=max_length, rngs=rngs
    )
