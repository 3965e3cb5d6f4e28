"""sacreBLEU's counts, sentence by sentence, and its scores of a corpus."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF


def counts(
    outputs: Sequence[str], references: Sequence[Sequence[str]]
) -> Float64[np.ndarray, "items 10"]:
    """Of each output: its length, that of the closest reference, matches and n-grams, n = 1..4."""
    bleu = BLEU(effective_order=True)
    rows = []
    for output, of_output in zip(outputs, references, strict=True):
        one: Any = bleu.sentence_score(output, list(of_output))
        rows.append([one.sys_len, one.ref_len, *one.counts, *one.totals])
    return np.array(rows, float)


@dataclasses.dataclass(frozen=True)
class Score:
    """A score of a corpus, 0 to 100, with the signature by which it is repeated."""

    name: str
    value: float
    signature: str

    def __str__(self) -> str:
        return f"{self.name} {self.value:.2f}"


def corpus_scores(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> list[Score]:
    """BLEU and chrF of a corpus."""
    most = max(len(one) for one in references)
    columns = [[one[k] if k < len(one) else None for one in references] for k in range(most)]
    found = []
    for metric in (BLEU(), CHRF()):
        score: Any = metric.corpus_score(list(outputs), columns)  # pyright: ignore[reportArgumentType]
        found.append(Score(score.name, score.score, str(metric.get_signature())))
    return found
