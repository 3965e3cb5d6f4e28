"""pronouns: he, she or it at [MASK], by the noun that a predicate names 6 to 64 words back.

    python -m experiments.train --config=configs/pronouns.py --config.rule=learned

Sizes: `:quick` for a smoke run, none for the main job, `:full` for the README's figures.
"""

from experiments.config import arm_config, sized

# Content that sees so many words to each side, in so many layers: how far do answers reach?
ARMS = {
    f"within {reach}, {layers} layer{'s' if layers > 1 else ''}": {
        "rule": f"learned * window(radius={reach})",
        "model.num_layers": layers,
    }
    for layers in (1, 2, 3)
    for reach in (6, 12, 24)
}
SIZES = {
    "quick": {"training__steps": 40},
    "full": {"training__steps": 1000},
}


def get_config(size: str = ""):
    """The config of one arm; `size` is "", "quick" or "full"."""
    return arm_config(
        "pronouns",
        **{
            "model__features": 48,
            "model__mlp_features": 96,
            "training__steps": 500,
            "training__learning_rate": (2e-3, 4e-3, 1e-2),
            "training__pilot_fraction": 0.4,
            **sized(SIZES, size),
        },
    )


def sweep():
    """Content, distance and both, in two layers and in three."""
    return [
        {"rule": rule, "model.num_layers": layers}
        for rule in ("learned", "gaussian(trainable=True)", "learned * gaussian(trainable=True)")
        for layers in (2, 3)
    ]
