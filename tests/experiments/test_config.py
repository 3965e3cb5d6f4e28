import json

import pytest
from ml_collections import ConfigDict

from experiments import config as configs
from experiments.options import UserError


@pytest.fixture
def config() -> ConfigDict:
    tree = {
        "rule": "learned",
        "label": "",
        "task": {"name": "recall"},
        "model": {"num_layers": 2},
        "training": {"seeds": 3, "rate": (0.1, 0.2), "exact": False, "decay": 0.5},
    }
    return ConfigDict(tree).lock()


def test_override_reads_text_as_the_type_of_the_key(config):
    for key, text, value in [
        ("model.num_layers", "4", 4),
        ("training.rate", "[1, 2]", (1, 2)),
        ("training.rate", "0.5", (0.5,)),
        ("training.exact", "True", True),
        ("training.decay", "2", 2.0),
        ("rule", "self", "self"),
    ]:
        configs.override(config, key, text)
        assert dict(configs.leaves(config))[key] == value


@pytest.mark.parametrize(
    ("key", "text"), [("model.num_layers", "two"), ("training.exact", "1"), ("training.decay", "x")]
)
def test_override_refuses_text_of_another_type(config, key, text):
    with pytest.raises(UserError, match=f"config key {key} takes a .* got '{text}'"):
        configs.override(config, key, text)


def test_an_unknown_key_names_the_nearest(config):
    with pytest.raises(UserError, match=r"no key 'modle.num_layers'.*'model.num_layers'"):
        configs.override(config, "modle.num_layers", 3)


def test_a_changed_key_that_nothing_reads_is_found(config):
    defaults = dict(configs.leaves(config))
    reader = configs.Reader(config)
    assert reader.model.num_layers == 2
    configs.require_all_read(reader, defaults)
    with config.unlocked():
        config.training.decay = 0.25
    with pytest.raises(UserError, match=r"nothing reads the config key training\.decay"):
        configs.require_all_read(reader, defaults)
    assert reader.training.decay == 0.25
    configs.require_all_read(reader, defaults)


def test_reading_a_key_that_is_not_there_is_an_error(config):
    with pytest.raises(AttributeError, match=r"no key 'model\.width'"):
        _ = configs.Reader(config).model.width


def test_json_brings_back_the_same_config(config):
    assert configs.from_json(configs.to_json(config)).to_dict() == config.to_dict()


def test_digest_ignores_the_number_of_seeds_and_nothing_else(config):
    before = configs.digest(config)
    configs.override(config, "training.seeds", 5)
    assert configs.digest(config) == before
    configs.override(config, "model.num_layers", 3)
    assert configs.digest(config) != before


def test_a_workdir_of_another_config_is_refused_with_the_difference(config, tmp_path):
    configs.claim_workdir(tmp_path / "run", config)
    configs.override(config, "training.seeds", 5)
    configs.claim_workdir(tmp_path / "run", config)
    written = (tmp_path / "run" / "config.json").read_text()
    configs.override(config, "model.num_layers", 3)
    with pytest.raises(UserError, match=r"model\.num_layers: 2 -> 3"):
        configs.claim_workdir(tmp_path / "run", config)
    assert (tmp_path / "run" / "config.json").read_text() == written


def test_a_folder_that_is_no_workdir_is_left_alone(config, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and holds no run"):
        configs.claim_workdir(tmp_path, config)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_config_of_an_earlier_version_has_what_came_since_at_its_defaults():
    whole = configs.arm_config("recall", rule="uniform", training__steps=7)
    stored = whole.to_dict()
    del stored["training"]["patience"], stored["imports"]
    read = configs.completed(configs.from_json(json.dumps(stored)))
    assert configs.to_json(read) == configs.to_json(whole)
    stored["task"]["gone"] = 1
    read = configs.completed(configs.from_json(json.dumps(stored)))
    assert configs.differences(read, whole) == ["task.gone: 1 -> '(absent)'"]
