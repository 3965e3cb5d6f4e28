"""pronouns: no shortcut pays, the splits share no pair and no template, distances are balanced."""

import numpy as np
import pytest

from experiments.options import UserError
from experiments.tasks import stories as english
from experiments.tasks.pronouns import log_uniform
from experiments.tasks.stories import Writer
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


def questions(stories):
    rows, at = np.nonzero(stories.tokens == english.MASK)
    return zip(rows.tolist(), at.tolist(), strict=True)


def test_reading_answers_every_question():
    stories, asked = write("test", 300), np.zeros(300, int)
    for row, mask in questions(stories):
        tokens = stories.tokens[row]
        noun = np.flatnonzero(tokens[:mask] == tokens[mask - 1])[0]
        answer, distance = english.class_of(tokens[noun + 1]), mask - noun - 1
        assert stories.answers[row, mask] == (answer if distance <= 32 else -1)
        if mask == stories.mask_at[row]:
            assert (answer, distance) == (stories.label[row], stories.distance[row])
        asked[row] += 1
    assert asked.min() == 1
    assert asked.max() > 1


def test_training_counts_every_question_and_the_test_the_last_of_each_story(task):
    batch = next(iter(task.train(0)))
    assert set(batch["token"][batch["weight"] > 0][:, 0]) == {english.MASK}
    stories = [len(set(row)) - 1 for row in batch["segment"]]
    assert batch["weight"].sum() > sum(stories)
    weight = np.concatenate([one["weight"] for one in task.evaluation("test")])
    assert weight.sum() == 4000


def write(split, rows):
    distance = log_uniform(stream("test", "distances").random(rows), 32)
    return Writer(split, 32, (3, 4))(stream("test", split), distance)


def pairs(stories):
    is_name = english.class_of(stories.tokens) >= 0
    after_noun = np.roll(english.is_noun(stories.tokens), 1, axis=1)
    row, at = np.nonzero(is_name & after_noun)
    return set(zip(stories.tokens[row, at - 1], stories.tokens[row, at], strict=True))


def templates(stories):
    tokens = stories.tokens
    return {tuple(tokens[r, [m - 3, m + 1, m + 2]].tolist()) for r, m in questions(stories)}


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
    with pytest.raises(UserError, match=r"task\.row must hold the longest story"):
        make("pronouns", row=40)
    with pytest.raises(UserError, match="3 <= fewest <= most"):
        make("pronouns", entities=(2, 4))
