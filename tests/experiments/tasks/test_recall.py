"""recall: rows say what their docstring says."""

import numpy as np
import pytest

from experiments.options import UserError
from tests.experiments.tasks.variants import baseline, make


@pytest.mark.parametrize("binding", ["joint", "adjacent"])
def test_the_answer_is_the_value_stored_with_the_key(binding):
    task = make("recall", binding=binding)
    rows = task.make(np.random.default_rng(0), 20)
    for row in range(20):
        for at in np.flatnonzero(rows["weight"][row]):
            slot = at - int(rows["distance"][row, at])
            key_at = slot if binding == "joint" else slot - 1
            assert rows["mark"][row, at] == 1
            assert rows["mark"][row, slot] == 0
            assert rows["key"][row, key_at] == rows["key"][row, at]
            assert rows["value"][row, slot] == rows["target"][row, at] + 1


def test_keys_and_values_are_distinct_in_a_row():
    rows = make("recall").make(np.random.default_rng(1), 50)
    for row in range(50):
        values = rows["value"][row]
        stored = values[values > 0]
        assert len(set(stored)) == len(stored) == 8
        keys = rows["key"][row][values > 0]
        assert len(set(keys)) == 8


def test_the_order_of_queries_is_independent_of_that_of_slots():
    rows = make("recall").make(np.random.default_rng(2), 2000)
    first = rows["weight"].argmax(1)
    slots = np.argsort(rows["value"] == 0, axis=1, kind="stable")[:, :8]
    asked = first - rows["distance"][np.arange(2000), first].astype(int)
    rank = (slots == asked[:, None]).argmax(1)
    # 250 expected in each of 8 cells: a standard deviation of 14.8, so 60 is four of them
    assert np.abs(np.bincount(rank, minlength=8) - 250).max() < 60


def test_baselines_are_at_chance():
    task = make("recall")
    assert baseline(task, "any value (1 / values)") == 1 / 64
    # 32,000 items in 4,000 rows whose eight queries ask for every slot once: exactly one is last
    assert baseline(task, "the value stored last") == 1 / 8


def test_numbers_that_do_not_fit_raise():
    with pytest.raises(UserError, match="1 <= queries <= slots <= num_keys and num_values"):
        make("recall", queries=9)
    with pytest.raises(UserError, match="joint or adjacent, got 'both'"):
        make("recall", binding="both")
