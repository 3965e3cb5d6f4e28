"""tagging: parts of speech of English web text (UD English EWT), which $ATTN_JAX_DATA holds.

    python -m experiments.train --config=configs/tagging.py --config.rule=learned

Sizes: `:quick` for a smoke run, none for three epochs, `:full`, six epochs, for the README's
figures. `:deprel` predicts relations; `:half`, `:quarter`, `:eighth` and `:sixteenth` train on that
share of the sentences; several are joined by commas, as in `:full,deprel`.
"""

from experiments.config import arm_config, sized

SIZES = {
    "quick": {"training__steps": 100},
    "full": {"training__steps": 1000},
    "deprel": {"task__target": "deprel", "variant": "deprel"},
    "half": {"task__share": 1 / 2, "variant": "half"},
    "quarter": {"task__share": 1 / 4, "variant": "quarter"},
    "eighth": {"task__share": 1 / 8, "variant": "eighth"},
    "sixteenth": {"task__share": 1 / 16, "variant": "sixteenth"},
}


def get_config(size: str = ""):
    """The config of one arm; `size` is one or several of the sizes and variants above."""
    return arm_config(
        "tagging",
        **{
            "model__features": 128,
            "model__mlp_features": 256,
            "model__dropout_rate": 0.3,
            "training__steps": 500,
            "training__learning_rate": (4e-3, 8e-3, 16e-3),
            **sized(SIZES, size),
        },
    )


def sweep():
    """No mixing, distance, content and both, for tags and for relations."""
    gaussian = "gaussian(width=(1, 2, 4, 8), offset=(-1, 1, -1, 1), trainable=True)"
    return [
        {"rule": rule, "task.target": target}
        for target in ("upos", "deprel")
        for rule in ("self", gaussian, "table", "learned", f"learned * {gaussian}")
    ]
