"""What a model sees of a word: itself, its affixes and shape, its subwords."""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.tasks.conllu import Sentence
from experiments.tasks.subwords import Subwords

SUBWORDS = 8
"""Subwords of a word that are seen at most."""


@dataclasses.dataclass(frozen=True)
class Features:
    """What is seen of a word; see the options of `Tagging`."""

    word_count: int
    affix_count: int
    tokenizer: str = ""
    vocabulary: int = 0


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Ids of words and affixes; 0 is an unknown word and, in a bag, nothing.

    Attributes:
      words: lowercased.
      affixes: what `affixes` names.
      subwords: of words as written; None: they are not seen.

    """

    words: Mapping[str, int]
    affixes: Mapping[str, int]
    subwords: Subwords | None = None

    @classmethod
    def of(cls, sentences: Sequence[Sentence], features: Features) -> "Vocabulary":
        """What occurs often enough: words by tokens, affixes by distinct written words."""
        counts = Counter(word for sentence in sentences for word in sentence.words)
        words: Counter[str] = Counter()
        for word, count in counts.items():
            words[word.lower()] += count
        parts = Counter(part for word in counts for part in affixes(word))
        written = (word for sentence in sentences for word in sentence.words)
        subwords = Subwords.asked_for(features.tokenizer, features.vocabulary, written)
        return cls(_ids(words, features.word_count), _ids(parts, features.affix_count), subwords)

    @property
    def sizes(self) -> Mapping[str, int]:
        """The size of each field of ids of a batch, 0 included."""
        subwords = {} if self.subwords is None else {"subwords": self.subwords.size}
        return {"word": len(self.words) + 1, "affixes": len(self.affixes) + 1, **subwords}

    def encode(self, words: Sequence[str]) -> Mapping[str, np.ndarray]:
        """Ids of words [N] and bags of ids [N, k] of their affixes and subwords."""
        affix_ids = functools.cache(
            lambda word: [self.affixes.get(part, 0) for part in affixes(word)]
        )
        fields = {
            "word": np.array([self.words.get(word.lower(), 0) for word in words], np.int32),
            "affixes": np.array([affix_ids(word) for word in words], np.int32),
        }
        if self.subwords is None:
            return fields
        bags = np.zeros((len(words), SUBWORDS), np.int32)
        for bag, ids in zip(bags, self.subwords.encode(words), strict=True):
            bag[: len(ids)] = ids[:SUBWORDS]
        return {**fields, "subwords": bags}

    def cut(self, words: Sequence[str]) -> int:
        """How many words have more subwords than a bag."""
        if self.subwords is None:
            return 0
        return sum(len(ids) > SUBWORDS for ids in self.subwords.encode(words))


def _ids(counts: Counter[str], least: int) -> Mapping[str, int]:
    kept = sorted(name for name, count in counts.items() if count >= least)
    return {name: index for index, name in enumerate(kept, 1)}


def affixes(word: str) -> list[str]:
    """Three prefixes, five suffixes and two shapes of a word, each by a name of its kind."""
    lower = word.lower()
    prefixes = [f"{lower[:n]}-" for n in (1, 2, 3)]
    suffixes = [f"-{lower[-n:]}" for n in (1, 2, 3, 4, 5)]
    outline = re.sub(r"[^\W\d_]", "x", re.sub(r"[A-Z]", "X", re.sub(r"\d", "9", word)))
    return [*prefixes, *suffixes, f"={outline}", "~" + re.sub(r"(.)\1+", r"\1+", outline)]
