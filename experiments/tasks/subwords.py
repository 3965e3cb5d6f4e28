"""Subwords: byte-pair encoding over bytes, by the library `tokenizers`; reversible to the byte."""

import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from experiments.options import UserError

PAD, START, END = 0, 1, 2
_SPECIAL = ("<pad>", "<s>", "</s>")
LEAST = 256 + len(_SPECIAL)
"""The smallest vocabulary: every byte, padding, start and end."""


class Subwords:
    """Text to ids and back.

    Ids 0, 1 and 2 are padding, start and end, which no text has: "</s>" in a text is four
    characters like any others.
    """

    def __init__(self, tokenizer: Tokenizer):
        for index, name in enumerate(_SPECIAL):
            if tokenizer.token_to_id(name) != index:
                raise UserError(
                    f"a tokeniser must have {', '.join(_SPECIAL)} as its ids 0, 1 and 2, got "
                    f"{name} at {tokenizer.token_to_id(name)}: leave task.tokenizer empty to train "
                    "one"
                )
        tokenizer.encode_special_tokens = True
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer

    @classmethod
    def trained(cls, texts: Iterable[str], size: int, source: str) -> "Subwords":
        """Pairs of bytes or subwords joined, the most frequent first, until there are `size` ids.

        Args:
          texts: the training texts.
          size: of the vocabulary.
          source: what the texts are, for messages.

        Raises:
          UserError: the texts do not hold so many subwords, or the size is below `LEAST`.

        References: Sennrich et al. 2016; over bytes, Radford et al. 2019.

        """
        if size < LEAST:
            raise UserError(f"task.vocabulary must be at least {LEAST}, got {size}")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
        tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            min_frequency=2,
            special_tokens=list(_SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        found = tokenizer.get_vocab_size()
        if found < size:
            raise UserError(
                f"{source} holds {found} subwords that occur twice or more: task.vocabulary must "
                f"be at most that, got {size}"
            )
        return cls(tokenizer)

    @classmethod
    def named(cls, name: str) -> "Subwords":
        """A tokeniser from a file tokenizer.json, its folder, or a hub by name.

        Raises:
          UserError: there is none, or it can't be read.

        """
        path = pathlib.Path(name)
        path = path / "tokenizer.json" if path.is_dir() else path
        try:
            if path.exists():
                return cls(Tokenizer.from_file(str(path)))
            return cls(Tokenizer.from_pretrained(name))
        except UserError:
            raise
        except Exception as error:  # the library raises plain Exceptions
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"task.tokenizer must be a tokenizer.json, a folder with one, or the name of one "
                f"that can be downloaded, got {name!r} ({said})"
            ) from error

    @classmethod
    def asked_for(cls, tokenizer: str, vocabulary: int, texts: Iterable[str]) -> "Subwords | None":
        """What the options task.tokenizer and task.vocabulary say; None where both are unset.

        Raises:
          UserError: both are set; or see `trained` and `named`.

        """
        if tokenizer and vocabulary:
            raise UserError(
                f"task.tokenizer={tokenizer} brings its own vocabulary, got task.vocabulary="
                f"{vocabulary} as well: leave one of them out"
            )
        if tokenizer:
            return cls.named(tokenizer)
        return cls.trained(texts, vocabulary, "the training text") if vocabulary else None

    @classmethod
    def from_json(cls, text: str) -> "Subwords":
        """The inverse of `to_json`."""
        return cls(Tokenizer.from_str(text))

    def to_json(self) -> str:
        """All of it as text."""
        return self._tokenizer.to_str()

    @property
    def size(self) -> int:
        """How many ids there are."""
        return self._tokenizer.get_vocab_size()

    def byte_sizes(self) -> Int[np.ndarray, " vocabulary"]:
        """Bytes of every id: one a letter, in the alphabet of tokenisers over bytes."""
        tokens = map(self._tokenizer.id_to_token, range(self.size))
        return np.array([len(token or "") for token in tokens], np.int32)

    def encode(self, texts: Sequence[str]) -> list[Int[np.ndarray, " tokens"]]:
        """Ids of each text, without start and end."""
        return [
            np.array(one.ids, np.int32)
            for one in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; start, end and padding are nothing."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each id, for axes of pictures."""
        return [self._tokenizer.decode([int(i)]) or _SPECIAL[min(int(i), 2)] for i in ids]
