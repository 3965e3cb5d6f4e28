"""smoothing: a curve from 64 noisy points at irregular times, by distance or by content.

    python -m experiments.train --config=configs/smoothing.py --config.rule='table(step=0.5)'

Sizes: `:quick` for a smoke run, none for the main job, `:full` for the README's figures.
Variants: `:co2_daily` and `:nab`, real series from the data folder.
"""

from experiments.config import arm_config, sized

SIZES = {
    "quick": {"training__steps": 60},
    "full": {"training__steps": 1000, "training__evaluate_every": 250},
    "co2_daily": {"task__series": "co2_daily", "variant": "co2_daily"},
    "nab": {"task__series": "nab", "variant": "nab"},
}


def get_config(argument: str = ""):
    """The config of one arm; `argument` is "", a size or a variant, or both with a comma."""
    return arm_config(
        "smoothing",
        **{
            "training__steps": 500,
            "training__learning_rate": (3e-3, 1e-2, 3e-2),
            **sized(SIZES, argument),
        },
    )


def sweep():
    """Distance of one width and of several, content, and both."""
    return [
        {"rule": rule}
        for rule in (
            "gaussian(trainable=True)",
            "gaussian(width=(1, 2, 4, 8), trainable=True)",
            "table(size=129, step=0.5)",
            "learned",
            "learned * gaussian(width=(1, 2, 4, 8), trainable=True)",
        )
    ]
