"""recall: the database analogy. Eight slots of a key and a value, then eight queries by key.

    python -m experiments.train --config=configs/recall.py --config.rule=learned

Sizes: `:quick` for a smoke run, none for the main job, `:full` for the README's figures.
Variant: `:adjacent`, where key and value are separate positions and two layers are needed.
"""

from experiments.config import arm_config, sized

SIZES = {
    "quick": {"training__steps": 60},
    "full": {"training__steps": 800},
    "adjacent": {
        "task__binding": "adjacent",
        "model__num_layers": 2,
        "training__steps": 1200,
        "training__evaluate_every": 250,
        "variant": "adjacent",
    },
}


def get_config(argument: str = ""):
    """The config of one arm; `argument` is "", a size or a variant, or both with a comma."""
    return arm_config(
        "recall",
        **{
            "model__num_layers": 1,
            "model__features": 32,
            "model__num_heads": 2,
            "training__steps": 400,
            "training__pilot_fraction": 0.5,
            "training__learning_rate": (3e-3, 1e-2, 3e-2),
            **sized(SIZES, argument),
        },
    )


def sweep():
    """Content, distance and both, in one layer and in two."""
    return [
        {"rule": rule, "model.num_layers": layers}
        for rule in ("learned", "gaussian(trainable=True)", "learned * gaussian(trainable=True)")
        for layers in (1, 2)
    ]
