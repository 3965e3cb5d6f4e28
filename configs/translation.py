"""translation: German to English (Tatoeba), which $ATTN_JAX_DATA holds, or any pairs by path.

    python -m experiments.train --config=configs/translation.py --config.rule=learned

Sizes: `:quick` for a smoke run, none for two cores (width 128, two and two layers), `:base` and
`:big` as in Vaswani et al. 2017, table 3. Variant: `:recurrent`, with the additive attention of
Bahdanau et al. 2015; several are joined by commas, as in `:quick,recurrent`.
"""

from experiments.config import arm_config, sized

_PAPER = {
    "model__num_layers": 6,
    "model__norm": "post",
    "model__activation": "relu",
    "task__vocabulary": 37_000,
    "task__row": 256,
    "training__schedule": "rsqrt",
    "training__label_smoothing": 0.1,
    "training__weight_decay": 0.0,
    "training__clip_norm": 0.0,
}
_PATTERNS = ("experiments.patterns",)
# As in You, Sun and Iyyer 2020, of width one: in the encoder, in the decoder, which sees the past
# only, and from one to the other, aligned by the ratio of lengths.
_HARD_CODED = {
    "rule": "gaussian(offset=(-1, 1))",
    "model.decoder_rule": "gaussian(offset=(-1, 0))",
}
_CROSS = "gaussian(width=1)"
_WIDTHS = "width=(1, 2, 4, 8)"
# Their own form, whose weights do not sum to one where a mask takes keys away.
_NOT_RENORMALISED = {
    "imports": _PATTERNS,
    "rule": "normal(offset=(-1, 1))",
    "model.decoder_rule": "normal(offset=(-1, 0))",
    "model.normalizer": "none",
}
_RECURRENT = {
    "model.kind": "recurrent",
    "model.num_layers": 1,
    "model.num_heads": 1,
    "model.mlp_features": 0,
    "model.dropout_rate": 0.2,
    "task.row": 32,
    "task.batch_size": 96,
    "training.steps": 2000,
}
ARMS = {
    "hard-coded self": _HARD_CODED,
    "hard-coded": {**_HARD_CODED, "model.cross_rule": _CROSS},
    "hard-coded, one cross head": {
        **_HARD_CODED,
        "model.cross_rule": f"{_CROSS}; {_CROSS}:3, learned:1",
    },
    "hard-coded self, not renormalised": _NOT_RENORMALISED,
    "hard-coded, not renormalised": {
        **_NOT_RENORMALISED,
        "model.cross_rule": "normal(width=1)",
        "model.cross_normalizer": "none",
    },
    # Raganato et al. 2020: seven of eight heads of the encoder.
    "fixed patterns, one learned head": {
        "imports": _PATTERNS,
        "model.num_heads": 8,
        "rule": "self:1, gaussian(width=0.1, offset=(-1, 1)):2, before:1, after:1, start:1, end:1, "
        "learned:1",
        "model.decoder_rule": "learned",
    },
    "learned, eight heads": {"rule": "learned", "model.num_heads": 8},
    "learned * gaussian": {
        "rule": f"learned * gaussian({_WIDTHS}, offset=(-1, 1, -1, 1), trainable=True)",
        "model.decoder_rule": f"learned * gaussian({_WIDTHS}, offset=(0, -1, 0, -1), "
        "trainable=True)",
    },
    "learned * table": {"rule": "learned * table"},
    "recurrent, additive attention": {**_RECURRENT, "rule": "additive"},
    # As many parameters, in a wider state, and as much time: 1.57 of its steps take as long as one
    # with attention, timed in turn on two cores.
    "recurrent, last state only": {
        **_RECURRENT,
        "rule": "none",
        "model.hidden": 304,
        "training.steps": 3150,
    },
}
SIZES = {
    "quick": {
        "task__vocabulary": 512,
        "task__row": 48,
        "task__batch_size": 8,
        "model__features": 32,
        "training__steps": 20,
    },
    "study": {
        "training__steps": 1250,
        "training__evaluate_every": 625,
    },
    "base": {
        **_PAPER,
        "model__features": 512,
        "model__num_heads": 8,
        "model__mlp_features": 2048,
        "model__dropout_rate": 0.1,
        "task__batch_size": 100,
        "training__steps": 100_000,
        "training__warmup_fraction": 0.04,
        "training__learning_rate": (7e-4,),
    },
    "big": {
        **_PAPER,
        "model__features": 1024,
        "model__num_heads": 16,
        "model__mlp_features": 4096,
        "model__dropout_rate": 0.3,
        "task__batch_size": 100,
        "training__steps": 300_000,
        "training__warmup_fraction": 4 / 300,
        "training__learning_rate": (5e-4,),
    },
    "recurrent": {
        **{key.replace(".", "__"): value for key, value in _RECURRENT.items()},
        "rule": "additive",
        "variant": "recurrent",
    },
}


def get_config(size: str = ""):
    """The config of one arm; `size` is one or several of the sizes and variants above."""
    return arm_config(
        "translation",
        **{
            "model__features": 128,
            "model__num_heads": 4,
            "model__mlp_features": 512,
            "model__dropout_rate": 0.1,
            "training__seeds": 1,
            "training__steps": 3000,
            "training__learning_rate": (3e-3,),
            "training__label_smoothing": 0.1,
            "training__log_every": 50,
            "training__evaluate_every": 500,
            "training__checkpoint_every": 250,
            **sized(SIZES, size),
        },
    )


def sweep():
    """Learned attention, and the arms above."""
    return [{"rule": "learned"}, *ARMS.values()]
