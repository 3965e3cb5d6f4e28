"""Pairs side by side in rows: each once, whole, in the same row on both sides."""

import numpy as np
import pytest

from experiments.tasks.packing import Encoded, Epochs, Plan, pack

POSITIONS = (12, 16)


@pytest.fixture
def sides():
    rng = np.random.default_rng(0)
    found = {}
    for name, most in (("source", 7), ("target", 9)):
        length = rng.integers(1, most, 200)
        # an id says to which item it belongs, and where in it
        ids = np.concatenate([100 * i + np.arange(n) for i, n in enumerate(length)])
        found[name] = Encoded({name: ids.astype(np.int32)}, length)
    return found


def lengths(sides):
    return np.stack([one.length for one in sides.values()], 1)


@pytest.mark.parametrize("open_rows", [None, 4])
def test_a_row_holds_whole_pairs_apart(sides, open_rows):
    plan = Plan.of(lengths(sides), POSITIONS, open_rows)
    batch = plan.fill(sides, np.arange(plan.rows))
    found = {}
    for name, one in sides.items():
        segment = batch[f"{name}_segment"]
        inside = segment > 0
        item, offset = np.divmod(batch[name][inside], 100)
        np.testing.assert_array_equal(offset, batch[f"{name}_position"][inside])
        assert np.bincount(item, minlength=200).tolist() == one.length.tolist()
        row = np.nonzero(inside)[0]
        found[name] = {*zip(item.tolist(), row.tolist(), segment[inside].tolist(), strict=True)}
    # The same pair, the same row, the same segment.
    assert found["source"] == found["target"]
    assert len(found["source"]) == 200
    np.testing.assert_array_equal(batch["weight"], batch["target_segment"] > 0)
    assert plan.padding(sides) == pytest.approx(
        1 - lengths(sides).sum() / (plan.rows * sum(POSITIONS))
    )


def test_an_epoch_holds_every_pair_once_in_an_order_of_its_own(sides):
    plan = Plan.of(lengths(sides), POSITIONS, 8)
    epochs = Epochs(sides, plan, plan.rows, ("a task", "train", 0))
    seen = [epochs[i]["target"][epochs[i]["weight"] > 0] for i in range(2)]
    for ids in seen:
        np.testing.assert_array_equal(np.sort(ids), np.sort(sides["target"].fields["target"]))
    assert not (seen[0] == seen[1]).all()


def test_what_is_too_long_is_refused():
    with pytest.raises(ValueError, match=r"a row of \(4, 4\) .* an item of \(3, 5\)"):
        pack(np.array([[3, 5]]), (4, 4))
