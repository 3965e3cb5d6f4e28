"""Images with classes: scikit-learn's digits, or an image classification set of TFDS by name.

Splits go by the hash of an image's pixels, so that no duplicate crosses a split.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Float32, Int, UInt8

from experiments.options import UserError
from experiments.tasks import builders

VALIDATES, TESTS = 15, 25
"""Of a hundred images."""
_INK = 16
_REMEDY = (
    "name an image classification set of TFDS by --config.task.data=NAME, or leave it empty for "
    "scikit-learn's digits; where TFDS needs TensorFlow to prepare a set, as for mnist, do so once "
    "in an environment that has it, by `tfds build mnist --file_format=array_record`"
)
Pixels = UInt8[np.ndarray, "images rows columns channels"]


@dataclasses.dataclass(frozen=True)
class Images:
    """Images of one size and their classes.

    Attributes:
      pixels: as they came, 0 to `white`.
      label: the index of each image's class.
      classes: their names.
      white: the largest value of a pixel.

    """

    pixels: Pixels
    label: Int[np.ndarray, " images"]
    classes: Sequence[str]
    white: int

    def __len__(self) -> int:
        return len(self.label)

    def chosen(self, which: Any) -> "Images":
        """Some of the images, by index or by truth."""
        return dataclasses.replace(self, pixels=self.pixels[which], label=self.label[which])

    @functools.cached_property
    def hashes(self) -> Sequence[bytes]:
        """A digest of each image's pixels: equal for duplicates."""
        return [hashlib.sha256(image.tobytes()).digest() for image in self.pixels]

    def intensity(self, shrink: int) -> Float32[np.ndarray, "images rows columns channels"]:
        """Pixels in 0..1, means of blocks of `shrink` x `shrink`.

        Raises:
          UserError: the blocks do not fill the image.

        """
        count, rows, columns, channels = self.pixels.shape
        if rows % shrink or columns % shrink:
            raise UserError(
                f"task.shrink must divide the {rows} rows and {columns} columns of an image, got "
                f"{shrink}"
            )
        blocks = (count, rows // shrink, shrink, columns // shrink, shrink, channels)
        mean = self.pixels.reshape(blocks).mean((2, 4), dtype=np.float32)
        return np.asarray(mean / self.white, np.float32)


def load(data: str) -> tuple[Mapping[str, Images], int]:
    """The images of "train", "validation" and "test", and how many copies of test were left out.

    A set's own test split is kept, and images of its other splits that also stand there are left
    out; what else there is, is split by hash.

    Args:
      data: a set of TFDS by name; "": scikit-learn's digits, 8 x 8 pixels of 17 values.

    Raises:
      UserError: there is no such set, it holds no images of one size with classes, or a split is
        empty.

    """
    if not data:
        splits, left_out = _by_hash(_bundled(), VALIDATES, TESTS), 0
    else:
        splits, left_out = _splits_of(_from_tfds(data))
    for name, images in splits.items():
        if len(np.unique(images.label)) < 2:
            raise UserError(
                f"the images of {name} must be of two classes or more, got {len(images)} images of "
                f"{data or 'digits'}: {_REMEDY}"
            )
    return splits, left_out


def _bundled() -> Images:
    from sklearn.datasets import load_digits  # a second, which a set of TFDS need not take

    pixels, label = load_digits(return_X_y=True)
    pixels = pixels.astype(np.uint8).reshape(-1, 8, 8, 1)
    return Images(pixels, label.astype(np.int64), [str(digit) for digit in range(10)], _INK)


def _by_hash(images: Images, validates: int, tests: int) -> dict[str, Images]:
    share = np.array([int.from_bytes(digest[:8], "big") % 100 for digest in images.hashes])
    return {
        "train": images.chosen(share >= validates + tests),
        "validation": images.chosen(share < validates),
        "test": images.chosen((share >= validates) & (share < validates + tests)),
    }


def _splits_of(official: Mapping[str, Images]) -> tuple[dict[str, Images], int]:
    """Splits by hash around the official test split, if there is one."""
    others = [images for name, images in official.items() if name != "test"]
    if "test" not in official or not others:
        return _by_hash(_joined(list(official.values())), VALIDATES, TESTS), 0
    known, test = _joined(others), official["test"]
    tested = frozenset(test.hashes)
    fresh = np.array([digest not in tested for digest in known.hashes], bool)
    splits = _by_hash(known.chosen(fresh), VALIDATES, 0)
    return splits | {"test": test}, int((~fresh).sum())


def _joined(parts: Sequence[Images]) -> Images:
    pixels, label = (
        np.concatenate([getattr(part, field) for part in parts]) for field in ("pixels", "label")
    )
    return dataclasses.replace(parts[0], pixels=pixels, label=label)


def _from_tfds(name: str) -> Mapping[str, Images]:
    """The splits of a set of TFDS as it comes."""
    if not builders.is_set_name(name):
        raise UserError(f"there is no data set {name!r}: {_REMEDY}")
    builder = builders.downloaded(name, _REMEDY)
    image, label = _features(name, builder.info.features)
    classes = list(builder.info.features[label].names)
    return {
        split: _read(name, builder.as_data_source(split), image, label, classes)
        for split in sorted(builder.info.splits)
    }


def _features(name: str, features: Any) -> tuple[str, str]:
    """The names of the image and of its class.

    Raises:
      UserError: there is not one of each.

    """
    found = []
    for kind in (tfds.features.Image, tfds.features.ClassLabel):
        names = [key for key, feature in features.items() if isinstance(feature, kind)]
        if len(names) != 1:
            raise UserError(
                f"a set must have one image and one class an example, got {len(names)} of "
                f"{kind.__name__} in {name}: {_REMEDY}"
            )
        found += names
    return found[0], found[1]


def _read(name: str, source: Any, image: str, label: str, classes: Sequence[str]) -> Images:
    """A split, in an order that does not depend on that of its files."""
    examples = [source[index] for index in range(len(source))]
    pixels = [np.asarray(one[image]) for one in examples]
    shapes = sorted({one.shape for one in pixels})
    if len(shapes) != 1 or pixels[0].dtype != np.uint8:
        raise UserError(
            f"images of {name} must be of one size and 8 bits, got shapes {shapes[:3]}: {_REMEDY}"
        )
    labels = np.array([int(one[label]) for one in examples], np.int64)
    images = Images(np.stack(pixels), labels, classes, 255)
    return images.chosen(np.array(sorted(range(len(labels)), key=lambda i: images.hashes[i])))
