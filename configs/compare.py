"""The main job: every arm on every task.

    make compare
    python -m experiments.compare --config=configs/compare.py:quick --workdir=runs/quick

Sizes: `:quick` takes a minute and shows that everything runs, none is the main job (8 minutes on
two cores), `:full` makes the README's figures.
"""

from experiments.config import comparison_config, sized

SIZES = {
    "quick": {
        "tasks": ("smoothing", "recall"),
        "arms": ("self", "gaussian", "learned"),
        "seeds": 2,
    },
    "full": {
        "arms": (
            "self",
            "uniform",
            "gaussian",
            "exponential",
            "table",
            "raw",
            "learned",
            "learned * gaussian",
            "learned * table",
        ),
        "seeds": 5,
        "own_settings": True,
        "match_params": True,
    },
}


def get_config(size: str = ""):
    """The config of a comparison; `size` is "", "quick" or "full"."""
    return comparison_config(size=size, **sized(SIZES, size))
