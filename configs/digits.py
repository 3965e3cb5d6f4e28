"""digits: the class of an image read pixel by pixel, with distance along the rows or in the plane.

    python -m experiments.train --config=configs/digits.py --config.rule='gaussian(width=2)'
    python -m experiments.train --config=configs/digits.py:plane --config.rule='gaussian(width=2)'
    python -m experiments.train --config=configs/digits.py:plane,mnist

Sizes: `:quick` for a smoke run, none for scikit-learn's 8 x 8 digits, `:full` for longer training.
Variants: `:plane`, where rules of distance see the distance in two dimensions; `:mnist`, by TFDS,
shrunk to 14 x 14. Several are joined by commas, as in `:full,plane`.
"""

from experiments.config import arm_config, sized

SIZES = {
    "quick": {"training__steps": 40},
    "full": {"training__steps": 3000},
    "plane": {"task__distance": "plane"},
    "mnist": {"task__data": "mnist", "task__shrink": 2, "training__steps": 2000},
}


def get_config(argument: str = ""):
    """The config of one arm; `argument` is "", a size or variants, joined by commas."""
    variants = [name for name in ("mnist", "plane") if name in argument.split(",")]
    return arm_config(
        "digits",
        **{
            "model__features": 32,
            "training__steps": 1000,
            "training__learning_rate": (1e-3, 3e-3, 1e-2),
            "variant": ", ".join(variants),
            **sized(SIZES, argument),
        },
    )


def sweep():
    """Rules of distance under both distances, and content, which sees neither."""
    rules = ("gaussian(width=(1, 2, 4, 8), trainable=True)", "table", "learned * gaussian(width=2)")
    cells = [
        {"rule": rule, "task.distance": distance}
        for rule in rules
        for distance in ("sequence", "plane")
    ]
    return [{"rule": "self"}, {"rule": "learned"}, *cells]
