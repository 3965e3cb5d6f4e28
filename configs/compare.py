"""The main job: every arm on every task.

    make compare
    python -m experiments.compare --config=configs/compare.py:quick --workdir=runs/quick

Sizes: `:quick` takes some three minutes and shows that everything runs, none is the main job (8 to
19 minutes on two cores), `:full` makes the README's figures.

Studies, which need $ATTN_JAX_DATA: `:study` is the design of You, Sun and Iyyer (2020) on
translation and takes some two hours, `:recurrent` a recurrent translator with and without
attention, `:content` how many heads and how wide keys need be, `:deprel` relations between words,
`:share` what happens with less training data; `:reach`, which needs no data, how far content
that sees a window carries over several layers.
"""

from configs.pronouns import ARMS as REACHES
from experiments.arms import MAIN_ARMS
from experiments.config import comparison_config, sized

_TABLE = "table(size=129)"
_HEADS = 4
SIZES = {
    "quick": {
        "size": "quick",
        "tasks": ("smoothing", "recall"),
        "arms": ("self", "gaussian", "learned"),
        "seeds": 2,
    },
    "study": {
        "size": "study",
        "tasks": ("translation",),
        "arms": (
            "learned",
            "hard-coded self",
            "hard-coded",
            "hard-coded, one cross head",
        ),
        "workers": 1,
    },
    "recurrent": {
        "tasks": ("translation",),
        "arms": ("recurrent, additive attention", "recurrent, last state only"),
        "seeds": 2,
        "workers": 1,
    },
    "content": {
        "tasks": ("recall", "tagging"),
        "overrides": (f"recall.model.num_heads={_HEADS}",),
        "arms": (
            _TABLE,
            *(f"learned(key_width={width})" for width in (1, 2, 4, 8, 16)),
            *(f"learned:{heads}, {_TABLE}:{_HEADS - heads}" for heads in range(1, _HEADS)),
            "learned",
        ),
        "own_settings": True,
    },
    "deprel": {
        "tasks": ("tagging:deprel",),
        "arms": (*MAIN_ARMS, "learned * table"),
        "own_settings": True,
    },
    "reach": {
        "tasks": ("pronouns",),
        "arms": (*REACHES, "learned"),
    },
    "share": {
        "tasks": (
            *(f"tagging:{share}" for share in ("sixteenth", "eighth", "quarter", "half")),
            "tagging",
        ),
        "arms": ("self", "gaussian", "table", "learned", "learned * gaussian"),
        "own_settings": True,
    },
    "full": {
        "size": "full",
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
    """The config of a comparison; `size` is "" or one of the sizes above."""
    return comparison_config(**sized(SIZES, size))
