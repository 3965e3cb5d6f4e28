"""pronouns: no shortcut pays, the splits share no pair and no template, distances are balanced."""

import numpy as np
import pytest

from experiments.options import UserError
from experiments.tasks import sentences as english
from experiments.tasks.pronouns import log_uniform
from experiments.tasks.sentences import Writer
from experiments.tasks.synthetic import stream
from tests.experiments.tasks.variants import baseline, make


@pytest.fixture(scope="module")
def task():
    return make("pronouns")


@pytest.mark.parametrize("name", ["majority", "nearest name", "bag of words"])
def test_shortcuts_stay_within_3_points_of_chance(task, name):
    assert abs(baseline(task, name) - 1 / 3) < 0.03


def test_labels_are_balanced_at_every_distance_bucket_of_500_or_more(task):
    items, scores = task.items("test"), labels(task)
    for low, high in zip(items.distance_edges[:-1], items.distance_edges[1:], strict=True):
        inside = (items.distance >= low) & (items.distance < high)
        assert inside.sum() >= 500
        # the standard error of a share of one third of 500 is 2.1 points
        assert np.abs(np.bincount(scores[inside], minlength=3) / inside.sum() - 1 / 3).max() < 0.085


def labels(task):
    batches = task.evaluation("test")
    return np.concatenate([batch["target"][batch["weight"] > 0] for batch in batches])


def test_reading_solves_every_item():
    sentences = write("test", 300)
    for row in range(300):
        tokens, mask = sentences.tokens[row], sentences.mask_at[row]
        named = np.flatnonzero(tokens[:mask] == tokens[mask + 4])
        assert len(named) == 1
        assert english.class_of(tokens[named + 1])[0] == sentences.label[row]
        assert mask - named[0] - 1 == sentences.distance[row]


def write(split, rows):
    distance = log_uniform(stream("test", "distances").random(rows), 32)
    return Writer(split, 32, (3, 4))(stream("test", split), distance)


def pairs(sentences):
    is_name = english.class_of(sentences.tokens) >= 0
    after_noun = np.roll(english.is_noun(sentences.tokens), 1, axis=1)
    row, at = np.nonzero(is_name & after_noun)
    return set(zip(sentences.tokens[row, at - 1], sentences.tokens[row, at], strict=True))


def templates(sentences):
    rows, at = np.arange(len(sentences.label)), sentences.mask_at
    words = (sentences.tokens[rows, at + offset] for offset in (-1, 1, 3))
    return set(zip(*words, strict=True))


@pytest.mark.parametrize("found", [pairs, templates])
def test_splits_share_no_pair_and_no_template(found):
    train, validation, test = (found(write(s, 3000)) for s in ("train", "validation", "test"))
    assert not train & test
    assert not train & validation
    assert not validation & test


def test_training_sees_short_distances_only(task):
    assert task.items("validation").distance.max() == 32
    assert task.items("test").distance.max() == 64


def test_numbers_that_do_not_fit_raise():
    with pytest.raises(UserError, match="task.row must hold the longest sentence"):
        make("pronouns", row=40)
    with pytest.raises(UserError, match="3 <= fewest <= most"):
        make("pronouns", entities=(2, 4))
