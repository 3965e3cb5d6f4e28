"""recall: the database analogy. Eight slots of a key and a value, then eight queries by key.

    python -m experiments.train --config=configs/recall.py --config.rule=learned

Sizes: `:quick` for a smoke run, none for the main job, `:full` for the README's figures.
"""

from experiments.config import arm_config, sized

SIZES = {
    "quick": {"training__steps": 60},
    "full": {"training__steps": 1000},
}


def get_config(size: str = ""):
    """The config of one arm; `size` is "", "quick" or "full"."""
    return arm_config(
        "recall",
        **{
            "model__num_layers": 1,
            "model__features": 32,
            "model__num_heads": 2,
            "training__steps": 500,
            **sized(SIZES, size),
        },
    )


def sweep():
    """Content, distance and both, in one layer and in two."""
    return [
        {"rule": rule, "model.num_layers": layers}
        for rule in ("learned", "gaussian(trainable=True)", "learned * gaussian(trainable=True)")
        for layers in (1, 2)
    ]
