"""Builders of TensorFlow Datasets without TensorFlow: ours of local files, and its own by name.

What a builder prepared lies in TFDS's data folder ($TFDS_DATA_DIR, else ~/tensorflow_datasets), for
local files under local/ and their SHA-256, so that changed files are never mistaken for prepared
ones.
"""

import contextlib
import hashlib
import io
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from experiments.options import UserError

_SET_NAME = re.compile(r"[a-z][a-z0-9_]*(/[A-Za-z0-9_.-]+)?(:[0-9.]+)?")


class LocalBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """TFDS's view of local files; a subclass says how they are read."""

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded; TFDS would look for checksums beside the code, by a package
    # (importlib_resources) that it does not install.
    url_infos: ClassVar[dict[str, Any]] = {}

    def __init__(self, **keywords: Any):
        super().__init__(file_format="array_record", **keywords)


def is_set_name(name: str) -> bool:
    """Whether a name reads as that of a set of TFDS: name, name/config or name:version."""
    return _SET_NAME.fullmatch(name) is not None


def data_folder() -> str | None:
    """$ATTN_JAX_DATA, or None."""
    return os.environ.get("ATTN_JAX_DATA") or None


def local_folder(files: Sequence[pathlib.Path], *settings: Any) -> pathlib.Path:
    """Where what is prepared of files, read with some settings, has its place."""
    digest = hashlib.sha256(b"".join(hashlib.sha256(f.read_bytes()).digest() for f in files))
    digest.update(repr(settings).encode() if settings else b"")
    folder = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return pathlib.Path(folder).expanduser() / "local" / digest.hexdigest()[:16]


def prepare_local(builder: Any) -> None:
    """Prepares a builder of local files.

    Raises:
      UserError: the folder can't be written.

    """
    try:
        _prepare(builder)
    except OSError as error:
        raise UserError(
            f"TFDS must be able to write {builder.data_dir}, got: {first_line(error)}; "
            "set $TFDS_DATA_DIR to another folder"
        ) from error


def downloaded(name: str, remedy: str) -> Any:
    """TFDS's own builder of a name, prepared.

    Raises:
      UserError: there is none, or the download failed.

    """
    try:
        builder: Any = tfds.builder(
            name, data_dir=os.environ.get("TFDS_DATA_DIR"), file_format="array_record"
        )
        _prepare(builder)
    except Exception as error:  # the network fails in as many ways as there are transports
        raise UserError(
            f"TFDS was to prepare {name}, which failed ({first_line(error)}): {remedy}"
        ) from error
    return builder


def _prepare(builder: Any) -> None:
    """Prepares a builder without its messages; another process may do the same meanwhile."""
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
    except OSError:
        if not builder.is_prepared():
            raise


def texts(values: Any) -> tuple[str, ...]:
    """Texts of a feature, which TFDS gives as bytes."""
    return tuple(v.decode() if isinstance(v, bytes) else str(v) for v in values)


def first_line(error: Exception) -> str:
    """Of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
