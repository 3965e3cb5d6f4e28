"""BLEU as a statistic of counts is sacreBLEU's, and its intervals follow from its gradient."""

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU as SACRE_BLEU

from experiments.report.statistics import interval
from experiments.tasks.bleu import corpus_scores, counts
from experiments.tasks.metric import BLEU

WORDS = ["the", "a", "dog", "cat", "sees", "hears", "and", "but", "good", "annoying", "is"]


def corpus(seed, count=60):
    rng = np.random.default_rng(seed)
    references, outputs = [], []
    for _ in range(count):
        words = rng.choice(WORDS, rng.integers(5, 12)).tolist()
        references.append([" ".join(words), *([" ".join(words[1:])] if rng.random() < 0.4 else [])])
        kept = [w if rng.random() > 0.15 else str(rng.choice(WORDS)) for w in words]
        outputs.append(" ".join(kept[: len(kept) - int(rng.integers(0, 2))]))
    return outputs, references


@pytest.mark.parametrize("shorter", [0, 1])
def test_the_statistic_is_sacrebleu(shorter):
    outputs, references = corpus(0)
    outputs = [" ".join(one.split()[: len(one.split()) - shorter]) for one in outputs]
    columns = [[one[k] if k < len(one) else None for one in references] for k in range(2)]
    expected = SACRE_BLEU().corpus_score(outputs, columns).score
    found = BLEU.of(counts(outputs, references), np.ones(len(outputs)))
    assert found == pytest.approx(expected, abs=1e-9)
    assert f"{expected:.2f}" in "".join(map(str, corpus_scores(outputs, references)))


def test_signatures_come_with_the_scores():
    bleu, chrf = corpus_scores(*corpus(1))
    assert (bleu.name, chrf.name) == ("BLEU", "chrF2")
    assert "tok:13a" in bleu.signature
    assert "nc:6" in chrf.signature


@pytest.mark.parametrize("factor", [0.8, 1.2])
def test_the_gradient_is_that_of_finite_differences(factor):
    mean = counts(*corpus(2)).mean(0)
    mean[1] = factor * mean[0]
    step = 1e-6 * mean
    for k in range(10):
        up, down = mean.copy(), mean.copy()
        up[k] += step[k]
        down[k] -= step[k]
        slope = (BLEU.value(up) - BLEU.value(down)) / (2 * step[k])
        assert BLEU.derivative(mean)[k] == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_without_a_match_it_is_zero():
    found = counts(["x y z u v"], [["a b c d e"]])
    assert BLEU.of(found, np.ones(1)) == 0
    assert not BLEU.derivative(found[0]).any()


def test_an_interval_is_that_of_a_jackknife_over_clusters():
    values = np.stack([counts(*corpus(seed)) for seed in (3, 4, 5)])
    cluster = np.arange(60) // 2
    estimate = interval(values, np.ones(60), cluster, BLEU)
    whole = BLEU.of(values, np.ones(60))
    assert estimate.mean == pytest.approx(whole.mean())
    left_out = np.array([BLEU.of(values, (cluster != c).astype(float)).mean() for c in range(30)])
    jackknife = 29 / 30 * ((left_out - left_out.mean()) ** 2).sum()
    seeds = whole.var(ddof=1) / 3
    # the linear term of the jackknife's expansion, 30 clusters
    assert estimate.standard_error == pytest.approx(np.sqrt(jackknife + seeds), rel=0.1)
