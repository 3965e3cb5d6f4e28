"""tagging: parts of speech of English web text (UD English EWT), which $ATTN_JAX_DATA holds.

    python -m experiments.train --config=configs/tagging.py --config.rule=learned

Sizes: `:quick` for a smoke run, none for half a minute of training, `:full` for the README's
figures. `:deprel` predicts relations; several are joined by commas, as in `:full,deprel`.
"""

from experiments.config import arm_config, sized

SIZES = {
    "quick": {"training__steps": 100},
    "full": {"training__steps": 1000},
    "deprel": {"task__target": "deprel", "variant": "deprel"},
}


def get_config(size: str = ""):
    """The config of one arm; `size` is "", "quick", "full" or with ",deprel"."""
    return arm_config(
        "tagging",
        **{
            "model__features": 128,
            "model__mlp_features": 256,
            "model__dropout_rate": 0.2,
            "training__steps": 500,
            "training__learning_rate": (1e-3, 2e-3, 4e-3),
            **sized(SIZES, size),
        },
    )
