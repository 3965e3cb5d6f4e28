"""The main job: every arm on every task.

    make compare
    python -m experiments.compare --config=configs/compare.py:quick --workdir=runs/quick

Sizes: `:quick` takes a minute and shows that everything runs, none is the main job (8 minutes on
two cores), `:full` makes the README's figures. `:study` is the design of You, Sun and Iyyer (2020)
on translation, which needs $ATTN_JAX_DATA and some two hours.
"""

from experiments.config import comparison_config, sized

SIZES = {
    "quick": {
        "tasks": ("smoothing", "recall"),
        "arms": ("self", "gaussian", "learned"),
        "seeds": 2,
    },
    "study": {
        "tasks": ("translation",),
        "arms": (
            "learned",
            "hard-coded self",
            "hard-coded",
            "hard-coded, one cross head",
        ),
        "workers": 1,
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
    """The config of a comparison; `size` is "", "quick", "full" or "study"."""
    return comparison_config(size=size, **sized(SIZES, size))
