"""text: the next byte of the documentation that every Python ships.

    python -m experiments.train --config=configs/text.py --config.rule='learned * gaussian(width=4)'
    python -m experiments.train --config=configs/text.py --config.task.path=FOLDER_OF_TXT

Sizes: `:quick` for a smoke run, none for the main job, `:full` for the README's figures.
"""

from experiments.config import arm_config, sized

SIZES = {
    "quick": {"training__steps": 40},
    "full": {
        "task__batch_size": 16,
        "training__steps": 600,
        "training__pilot_fraction": 0.15,
    },
}


def get_config(size: str = ""):
    """The config of one arm; `size` is "", "quick" or "full"."""
    return arm_config(
        "text",
        **{
            "model__features": 64,
            "model__num_heads": 4,
            "training__steps": 150,
            "task__batch_size": 8,
            "training__learning_rate": (3e-3, 1e-2, 3e-2),
            **sized(SIZES, size),
        },
    )


def sweep():
    """Content, distance and both, at two widths."""
    return [
        {"rule": rule, "model.features": features}
        for rule in ("learned", "table", "learned * table")
        for features in (64, 128)
    ]
