"""Digits: both distances, splits without duplicates, sets of TFDS by name, baselines."""

import dataclasses

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds
from flax import nnx
from sklearn.datasets import load_digits

from attn_jax.nn import Plane
from experiments.config import override
from experiments.options import UserError
from experiments.tasks import images
from experiments.tasks.digits import _read, ink_spread
from experiments.tasks.images import Images
from tests.experiments.tasks.variants import baseline, make, task_config


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    _read.cache_clear()


@pytest.fixture(scope="module")
def digits():
    return make("digits")


def test_pixels_are_those_of_scikit_learn_row_by_row(digits):
    raw, label = load_digits(return_X_y=True)
    splits = [digits.evaluation(name) for name in ("validation", "test")]
    found = np.concatenate([b["pixels"][b["weight"] > 0] for split in splits for b in split])
    known = {tuple(row) for row in raw}
    assert {tuple(16 * row[:, 0]) for row in found} <= known
    facts = digits.describe()
    assert sum(facts["images"].values()) == len(label) == 1797
    assert facts["pixels"] == [8, 8, 1]
    assert facts["dropped"] == {}
    assert facts["images"]["train"] / 1797 == pytest.approx(0.6, abs=0.03)
    assert facts["images"]["test"] / 1797 == pytest.approx(0.25, abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "sees"), [("learned", False), ("learned * gaussian", True)])
def test_only_rules_of_distance_see_the_plane(rule, sees):
    """The same data and parameters; content and encodings see the index under both distances."""
    tasks = [make("digits", variant, batch_size=2) for variant in ("", "plane")]
    batches = [dict(next(iter(task.train(0)))) for task in tasks]
    np.testing.assert_array_equal(batches[0]["pixels"], batches[1]["pixels"])
    config = task_config("digits", "")
    override(config, "model.num_layers", 1)
    models = [task.build(rule, config.model, rngs=nnx.Rngs(0)) for task in tasks]
    outputs = [np.asarray(nnx.jit(model)(batches[0])) for model in models]
    assert (np.abs(outputs[0] - outputs[1]).max() > 1e-4) == sees
    assert models[1].encoder.layers[0].attention.distance == Plane(8)


def some(count, seed=0, classes=3):
    """Random images, each twice."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, 4, 6, 1), dtype=np.uint8)
    label = rng.integers(0, classes, count)
    names = [f"class {i}" for i in range(classes)]
    return Images(np.concatenate([pixels, pixels]), np.concatenate([label, label]), names, 255)


def keys(one):
    return set(one.hashes)


def test_duplicates_never_cross():
    splits, _ = images._splits_of({"train": some(200)})
    assert sum(map(len, splits.values())) == 400
    assert all(len(one) == 2 * len(keys(one)) for one in splits.values())
    train, validation, test = (keys(splits[name]) for name in ("train", "validation", "test"))
    assert not train & validation
    assert not (train | validation) & test
    test_set = dataclasses.replace(some(200).chosen(slice(0, 60)))
    official, left_out = images._splits_of({"train": some(200), "test": test_set})
    assert official["test"] is test_set
    assert left_out == 120
    assert not (keys(official["train"]) | keys(official["validation"])) & keys(test_set)


def test_blocks_are_means():
    one = some(5)
    shrunk = one.intensity(2)
    assert shrunk.shape == (10, 2, 3, 1)
    assert shrunk.dtype == np.float32
    np.testing.assert_allclose(shrunk[3, 1, 2], one.pixels[3, 2:, 4:].mean((0, 1)) / 255, rtol=1e-6)
    with pytest.raises(UserError, match=r"task\.shrink must divide the 4 rows and 6 columns"):
        one.intensity(3)


def test_spread_is_the_distance_of_ink_from_its_centre():
    image = np.zeros((3, 5, 5, 1), np.float32)
    image[0, 2, 2] = 1
    image[1, 1, 1] = image[1, 1, 4] = 0.5
    spread = ink_spread(image)
    np.testing.assert_allclose(spread[:2], [0, 1.5], atol=1e-6)
    assert np.isnan(spread[2])


def test_baselines_are_what_they_are_called(digits):
    assert baseline(digits, "commonest class") < 0.2
    assert baseline(digits, "logistic regression") > 0.94
    assert baseline(digits, "nearest image") > 0.97
    assert digits.metric.chance == 0.1


class MyImages(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Stands for a set that TFDS knows: prepared, so that it is found by its name alone."""

    VERSION = tfds.core.Version("1.0.0")
    name = "my_images"
    url_infos = {}  # noqa: RUF012
    shapes = ((6, 4, 3),)

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "id": np.int64,
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=["cat", "dog"]),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(name) for name in ("train", "test")}

    def _generate_examples(self, name):
        rng = np.random.default_rng(0)  # the first images of train are those of test
        for i in range({"train": 60, "test": 12}[name]):
            shape = self.shapes[i % len(self.shapes)]
            image = PIL.Image.fromarray(rng.integers(0, 256, shape, np.uint8))
            yield i, {"id": i, "image": image, "label": i % 2}  # an array would need TensorFlow


class OfSeveralSizes(MyImages, skip_registration=True):
    name = "of_several_sizes"
    shapes = ((6, 4, 3), (4, 4, 3))


class WithoutClasses(MyImages, skip_registration=True):
    name = "without_classes"

    def _info(self):
        features = {"id": np.int64, "image": tfds.features.Image(), "label": np.int64}
        features = tfds.features.FeaturesDict(features)
        return tfds.core.DatasetInfo(builder=self, features=features)


def prepare(builder, folder):
    builder(data_dir=str(folder / "tfds"), file_format="array_record").download_and_prepare()


def test_a_set_of_tfds_by_name(tmp_path):
    prepare(MyImages, tmp_path)
    task = make("digits", data="my_images", shrink=2, batch_size=4)
    batch = next(iter(task.train(0)))
    assert batch["pixels"].shape == (4, 6, 3)
    facts = task.describe()
    assert facts["dropped"] == {"copies of test images": 12}
    assert facts["images"]["train"] + facts["images"]["validation"] == 48
    assert facts["images"]["test"] == 12
    assert task.items("test").groups == ["cat", "dog"]
    test = np.concatenate([b["pixels"][b["weight"] > 0] for b in task.evaluation("test")])
    first = np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8)
    shrunk = first.reshape(3, 2, 2, 2, 3).mean((1, 3)).reshape(6, 3) / 255
    assert min(np.abs(one - shrunk).max() for one in test) < 1e-6


def test_sets_that_are_no_classified_images_are_refused(tmp_path):
    prepare(OfSeveralSizes, tmp_path)
    prepare(WithoutClasses, tmp_path)
    with pytest.raises(
        UserError, match=r"one size and 8 bits, got shapes \[\(4, 4, 3\), \(6, 4, 3"
    ):
        make("digits", data="of_several_sizes")
    with pytest.raises(UserError, match="one image and one class an example, got 0 of ClassLabel"):
        make("digits", data="without_classes")
    with pytest.raises(UserError, match="there is no data set 'No such set'"):
        make("digits", data="No such set")
    with pytest.raises(UserError, match=r"sequence, plane, got 'chebyshev'"):
        make("digits", distance="chebyshev")
