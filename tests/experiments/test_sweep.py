import pytest

from experiments import sweep
from experiments.config import arm_config
from experiments.options import UserError


def test_values_are_split_at_semicolons_or_outer_commas():
    assert sweep.split_values("1,2") == ["1", "2"]
    assert sweep.split_values("learned;gaussian(width=4)") == ["learned", "gaussian(width=4)"]
    assert sweep.split_values("gaussian(width=(1,2)), self") == ["gaussian(width=(1,2))", "self"]


def test_grid_is_the_product_of_its_axes():
    config = arm_config("recall")
    cells = sweep.grid(config, ["rule=learned;self", "num_layers=1,2"])
    assert cells == [
        {"rule": "learned", "model.num_layers": "1"},
        {"rule": "learned", "model.num_layers": "2"},
        {"rule": "self", "model.num_layers": "1"},
        {"rule": "self", "model.num_layers": "2"},
    ]


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ("num_layers", "must read KEY=VALUES"),
        ("num_layer=1", r"did you mean 'model\.num_layers'"),
        ("name=a", None),
    ],
)
def test_axes_that_are_wrong(axis, message):
    config = arm_config("recall")
    if message is None:
        assert sweep.full_key(config, "name") == "task.name"
        return
    with pytest.raises(UserError, match=message):
        sweep.grid(config, [axis])


def test_a_cell_is_named_by_what_differs_and_two_equal_cells_are_refused(tmp_path):
    config = arm_config("recall")
    cells = sweep.sweep_cells(config, [{"rule": "self", "model.num_layers": "1"}], str(tmp_path))
    assert cells[0].name == "rule=self, num_layers=1"
    assert cells[0].config.model.num_layers == 1
    with pytest.raises(UserError, match="are the same"):
        sweep.sweep_cells(config, [{"rule": "self"}, {"rule": "self"}], str(tmp_path))
