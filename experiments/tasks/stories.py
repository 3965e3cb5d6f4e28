"""The English of `pronouns`: a vocabulary by slots, and stories as slots that are drawn.

    meet the dog Tommy , the doctor Anna and the robot Bolt . Mary says the doctor [MASK] is good .
    the wind fell . now Paul thinks the dog [MASK] was calm .

A story ends with a question, and has others on the way there among its filler clauses.

Every word belongs to one slot, a range of ids, so that a story is a row of slots and one
vectorised draw fills many. Names carry a class (he, she, it), nouns carry none: any noun goes with
any name. Everything that is not a name, the two mentions of nouns apart, says nothing of the
answer.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

CLASSES = ("he", "she", "it")
SPLITS = ("test", "validation", "train")

_WORDS = {
    "padding": "[PAD]",
    "mask": "[MASK]",
    "he": "Tommy Peter Paul George Henry Frank Oscar Walter Hugo Felix "
    "Simon Martin Victor Arthur Edgar Leo Conrad Ralph Stefan Bruno",
    "she": "Anna Mary Clara Emma Julia Laura Helen Alice Nora Sophie "
    "Rosa Martha Irene Lucy Greta Paula Agnes Diana Eva Vera",
    "it": "Bolt Gizmo Sprocket Widget Turbo Pixel Cosmo Rusty Zippy Gadget "
    "Beeper Clank Dynamo Buzzer Socket Rotor Vector Piston Magnet Quark",
    "noun": "dog doctor robot singer cat driver judge cook",
    "opening": "meet greet remember picture imagine recall",
    "the": "the",
    ",": ",",
    "and": "and",
    ".": ".",
    "says": "says thinks knows hopes believes claims insists repeats writes agrees",
    "is": "is was seems became remains",
    "good": "good fine great clever lazy nice bad poor brave calm proud loyal "
    "gentle famous tired happy modest skilled strange quiet",
    "adverb": "now today again soon later still once finally",
    "at": "at by before after until since",
    "noon": "noon dawn dusk midnight sunrise nightfall lunch winter",
    "rain": "rain snow smoke fog thunder sunlight dust steam music water sand frost",
    "wind": "wind river train clock bell lamp door boat kite leaf cloud bridge "
    "engine tower candle curtain wheel stone branch wave signal flag rope ladder",
    "fell": "fell moved turned shook glowed creaked stopped drifted rattled swayed "
    "faded stood broke leaned waited rolled",
    "over": "over under near behind beside above past along",
    "hill": "hill roof garden market station harbour field valley church forest square street "
    "fence meadow cellar orchard corner bench canal tunnel island barn kitchen library",
    "old": "old red small heavy distant narrow dark silver wooden broken empty cold "
    "green bright dusty tall",
}
VOCABULARY = tuple(word for words in _WORDS.values() for word in words.split())
_FIRST: dict[str, int] = {}
_SIZE: dict[str, int] = {}
for _slot, _words in _WORDS.items():
    _FIRST[_slot] = sum(_SIZE.values())
    _SIZE[_slot] = len(_words.split())
_SLOTS = tuple(_WORDS)
PADDING, MASK = _FIRST["padding"], _FIRST["mask"]
NAMES, NOUNS = _SIZE["he"], _SIZE["noun"]

_QUESTION = "he says the noun mask is good ."
_CLAUSES = (
    *[_QUESTION] * 4,
    "rain fell .",
    "the wind fell .",
    "the old wind fell .",
    "the wind fell over rain .",
    "the wind fell over the hill .",
    "the old wind fell over the hill .",
)
_ADVERBIALS = ("", "adverb", "at noon")
_PATTERNS = 64
_ENTITY, _FIRST_NAME = 4, 3
"""Words of an entity, and where the first one's name stands."""
_TAIL, _BEFORE_MASK = 8, 4
"""Words of a question, and how many of them stand before its [MASK]."""
NEAREST = 1 + _ENTITY - _FIRST_NAME + _BEFORE_MASK
"""Words from the last entity's name to the [MASK] of a question right behind it."""

_PAIR_RESIDUES = {"test": (0,), "validation": (1,), "train": tuple(range(2, 10))}
_TEMPLATE_RESIDUES = {"test": (0,), "validation": (1,), "train": (2, 3, 4)}
_PAIRS, _TEMPLATES = 10, 5


@dataclasses.dataclass(frozen=True)
class Stories:
    """Stories of different lengths, one a row, [PAD] behind them.

    Attributes:
      tokens: ids of `VOCABULARY`.
      length: words in each, [MASK] included.
      answers: index into `CLASSES` of the pronoun at each [MASK] no further than the longest
        distance from its antecedent's name, -1 elsewhere.
      mask_at: index of the last [MASK].
      label: the answer there.
      distance: from the name of its antecedent to it.

    """

    tokens: Int[np.ndarray, "rows words"]
    length: Int[np.ndarray, " rows"]
    answers: Int[np.ndarray, "rows words"]
    mask_at: Int[np.ndarray, " rows"]
    label: Int[np.ndarray, " rows"]
    distance: Int[np.ndarray, " rows"]


class Writer:
    """Writes stories of one split.

    A pair of a name and a noun, and a template (verb of saying, copula, adjective), belong to one
    split: pair (i, j) to that of residue (i + j) mod 10, template (v, c, j) to that of
    (v + c + j) mod 5. So each noun meets each class in every split.

    Args:
      split: "train", "validation" or "test".
      most: the longest distance that will be asked for.
      entities: the fewest and the most in a story.

    """

    def __init__(self, split: str, most: int, entities: tuple[int, int]):
        self.split, self.most, self.entities = split, most, entities
        self.width = longest(most, entities)
        self._fillers = _filler_slots(most)

    def __call__(
        self, generator: np.random.Generator, distance: Int[np.ndarray, " rows"]
    ) -> Stories:
        """One story for each distance from the antecedent's name to [MASK], `NEAREST` or more.

        The class of the antecedent is uniform, and so is its place among those entities that lie
        near enough. All three classes are there whatever the label: of three entities one each,
        a fourth is of any. The witness, whose name is the nearest to [MASK], is of any class.
        """
        rows = len(distance)
        fewest, most = self.entities
        count = generator.integers(fewest, most + 1, rows)
        spare = distance - NEAREST
        behind = _below(generator, np.minimum(count, 1 + spare // _ENTITY))
        antecedent = count - 1 - behind
        fillers = spare - _ENTITY * behind
        label = generator.integers(0, 3, rows)
        classes = _classes(generator, label, antecedent, count)
        nouns = np.argsort(generator.random((rows, NOUNS)), axis=1)[:, :most]
        names = self._names(generator, classes, nouns)

        tokens = np.full((rows, self.width), PADDING, np.int32)
        tokens[:, 0] = _draw(generator, "opening", rows)
        _write_entities(tokens, count, names, nouns)
        start = 1 + _ENTITY * count
        _write(tokens, start, self._filling(generator, fillers), fillers)
        mask_at = start + fillers + _BEFORE_MASK
        tokens[np.arange(rows), mask_at] = MASK
        row, at = np.nonzero(tokens == MASK)
        asked = np.where(at == mask_at[row], antecedent[row], _below(generator, count[row]))
        tail = self._tail(generator, names[row], nouns[row, asked])
        tokens[row[:, None], at[:, None] + np.arange(_TAIL) - _BEFORE_MASK] = tail
        answers = np.full(tokens.shape, -1)
        near = at - (_FIRST_NAME + _ENTITY * asked) <= self.most
        answers[row, at] = np.where(near, classes[row, asked], -1)
        return Stories(tokens, mask_at + _TAIL - _BEFORE_MASK, answers, mask_at, label, distance)

    def _names(
        self,
        generator: np.random.Generator,
        classes: Int[np.ndarray, "rows entities"],
        nouns: Int[np.ndarray, "rows entities"],
    ) -> Int[np.ndarray, "rows entities"]:
        """Names as ids, all different in a story, whose pairs with nouns are of this split."""
        residue = generator.choice(_PAIR_RESIDUES[self.split], nouns.shape)
        index = (residue - nouns) % _PAIRS + _PAIRS * generator.integers(0, 2, nouns.shape)
        names = _name_ids(classes, index)
        for later in range(1, names.shape[1]):
            taken = (names[:, :later] == names[:, later, None]).any(1)
            index[:, later] = np.where(taken, (index[:, later] + _PAIRS) % NAMES, index[:, later])
            names[:, later] = _name_ids(classes[:, later], index[:, later])
        return names

    def _filling(
        self, generator: np.random.Generator, fillers: Int[np.ndarray, " rows"]
    ) -> Int[np.ndarray, "rows fillers"]:
        """Neutral clauses of exactly so many words."""
        pattern = generator.integers(0, _PATTERNS, len(fillers))
        slots = self._fillers[fillers, pattern]
        return _FIRSTS[slots] + (generator.random(slots.shape) * _SIZES[slots]).astype(np.int32)

    def _tail(
        self,
        generator: np.random.Generator,
        names: Int[np.ndarray, "rows entities"],
        asked: Int[np.ndarray, " rows"],
    ) -> Int[np.ndarray, "rows 8"]:
        """Witness, verb of saying, the, noun, [MASK], copula, adjective, full stop."""
        rows = len(asked)
        says = generator.integers(0, _SIZE["says"], rows)
        copula = generator.integers(0, _SIZE["is"], rows)
        residue = generator.choice(_TEMPLATE_RESIDUES[self.split], rows)
        group = generator.integers(0, _SIZE["good"] // _TEMPLATES, rows)
        adjective = (residue - says - copula) % _TEMPLATES + _TEMPLATES * group
        return np.stack(
            [
                _witness(generator, names),
                _FIRST["says"] + says,
                np.full(rows, _FIRST["the"]),
                _FIRST["noun"] + asked,
                np.full(rows, MASK),
                _FIRST["is"] + copula,
                _FIRST["good"] + adjective,
                np.full(rows, _FIRST["."]),
            ],
            axis=1,
        )


def longest(distance: int, entities: tuple[int, int]) -> int:
    """Words of the longest story with this distance: the antecedent is the last entity."""
    return _FIRST_NAME + _ENTITY * (entities[1] - 1) + distance + _TAIL - _BEFORE_MASK


def class_of(tokens: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
    """Index into `CLASSES` of names, -1 of all other words."""
    index = (tokens - _FIRST["he"]) // NAMES
    return np.where((index >= 0) & (index < len(CLASSES)), index, -1)


def is_noun(tokens: Int[np.ndarray, "*shape"]) -> Bool[np.ndarray, "*shape"]:
    """Whether a word is a noun that a name can go with."""
    return (tokens >= _FIRST["noun"]) & (tokens < _FIRST["noun"] + NOUNS)


def words(tokens: Sequence[int]) -> str:
    """Text of a row, without what is behind the story."""
    return " ".join(VOCABULARY[token] for token in tokens if token != PADDING)


_FIRSTS = np.array([_FIRST[slot] for slot in _SLOTS], np.int32)
_SIZES = np.array([_SIZE[slot] for slot in _SLOTS], np.int32)


def _filler_slots(most: int) -> Int[np.ndarray, "length pattern word"]:
    """For every number of words, patterns of clauses that have exactly so many."""
    generator = np.random.default_rng(0)
    slots = np.zeros((most, _PATTERNS, most), np.int8)
    for length in range(most):
        for pattern in range(_PATTERNS):
            names = _compose(generator, length)
            slots[length, pattern, :length] = [_SLOTS.index(name) for name in names]
    return slots


def _compose(generator: np.random.Generator, length: int) -> list[str]:
    """Slots of clauses of random lengths and an adverbial of what is left, two words at most."""
    names: list[str] = []
    while length - len(names) >= len(_ADVERBIALS):
        fitting = [c.split() for c in _CLAUSES if len(c.split()) <= length - len(names)]
        names += fitting[generator.integers(len(fitting))]
    return names + _ADVERBIALS[length - len(names)].split()


def _classes(
    generator: np.random.Generator,
    label: Int[np.ndarray, " rows"],
    antecedent: Int[np.ndarray, " rows"],
    count: Int[np.ndarray, " rows"],
) -> Int[np.ndarray, "rows entities"]:
    """Classes of all entities: the label's at the antecedent, then both others, then any."""
    rows, most = len(label), int(count.max())
    turn = generator.integers(0, 2, rows)
    others = np.stack([(label + 1 + turn) % 3, (label + 2 - turn) % 3], axis=1)
    more = generator.integers(0, 3, (rows, most - 3))
    rank = generator.random((rows, most - 1))
    rank[np.arange(most - 1) >= count[:, None] - 1] = 2.0
    order = np.argsort(rank, axis=1)
    distractors = np.take_along_axis(np.concatenate([others, more], axis=1), order, axis=1)
    place = np.arange(most)
    source = np.clip(place - (place > antecedent[:, None]), 0, most - 2)
    classes = np.take_along_axis(distractors, source, axis=1)
    return np.where(place == antecedent[:, None], label[:, None], classes)


def _witness(
    generator: np.random.Generator, names: Int[np.ndarray, "rows entities"]
) -> Int[np.ndarray, " rows"]:
    """A name of any class that no entity of the story has."""
    which = generator.integers(0, 3, len(names))
    index = generator.integers(0, NAMES, len(names))
    for _ in range(names.shape[1]):
        taken = (names == _name_ids(which, index)[:, None]).any(1)
        index = np.where(taken, (index + 1) % NAMES, index)
    return _name_ids(which, index)


def _write_entities(
    tokens: Int[np.ndarray, "rows words"],
    count: Int[np.ndarray, " rows"],
    names: Int[np.ndarray, "rows entities"],
    nouns: Int[np.ndarray, "rows entities"],
) -> None:
    """The NOUN NAME, with a comma, an "and" before the last and a full stop behind it."""
    for place in range(names.shape[1]):
        rows = np.flatnonzero(place < count)
        left = count[rows] - place
        mark = np.where(left == 1, _FIRST["."], np.where(left == 2, _FIRST["and"], _FIRST[","]))
        first = 1 + _ENTITY * place
        tokens[rows, first] = _FIRST["the"]
        tokens[rows, first + 1] = _FIRST["noun"] + nouns[rows, place]
        tokens[rows, first + 2] = names[rows, place]
        tokens[rows, first + 3] = mark


def _write(
    tokens: Int[np.ndarray, "rows words"],
    start: Int[np.ndarray, " rows"],
    piece: Int[np.ndarray, "rows width"],
    count: Int[np.ndarray, " rows"],
) -> None:
    """Puts the first `count` words of each row's piece at its `start`."""
    row, column = np.nonzero(np.arange(piece.shape[1]) < count[:, None])
    tokens[row, start[row] + column] = piece[row, column]


def _name_ids(
    classes: Int[np.ndarray, "*shape"], index: Int[np.ndarray, "*shape"]
) -> Int[np.ndarray, "*shape"]:
    return (_FIRST["he"] + classes * NAMES + index).astype(np.int32)


def _draw(generator: np.random.Generator, slot: str, rows: int) -> Int[np.ndarray, " rows"]:
    return _FIRST[slot] + generator.integers(0, _SIZE[slot], rows)


def _below(
    generator: np.random.Generator, limit: Int[np.ndarray, " rows"]
) -> Int[np.ndarray, " rows"]:
    """Uniform in 0..limit - 1."""
    return (generator.random(len(limit)) * limit).astype(int)
