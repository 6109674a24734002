#!/usr/bin/env python3
"""Write arrays as HDF5 shards: from NumPy files, or from any map-style dataset of PyTorch.

Source: each of --train, --validation and --test is a SPEC, one of

    FILE.npz        with the keys --x and --y, where {split} stands for train, validation or test; read into memory
    X.npy,Y.npy     two files, of which only what is written is held in memory
    package.module.NAME     a torch.utils.data.Dataset, or a callable that returns one, with items (x, y)

Where --validation or --test is not given, --validation-fraction and --test-fraction of the training examples, chosen
by --seed, are held out for it. x is written as [n, channels, ...]: floating-point numbers as float32 (float64 where float32
would round differences away), others as they are. All are normalised, but for --ids: whole numbers that stay as they are,
such as the tokens of a text, for an embedding. y is written as classes int64 [n] with --classes, otherwise as numbers
[n, targets] or [n, channels, ...]. State the --licence of the data.

    python data_prep/arrays.py --train cifar10_jpeg.npz --test cifar10_jpeg.npz --x "{split}_jpeg" --y "{split}_labels" \\
        --encoded "{split}_offsets" --classes 10 --validation-fraction 0.1 --output data/cifar10_jpeg
"""

from __future__ import annotations

import argparse
import functools
import io
import logging
import os
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np

from hpc_bnn.comm import GridComm
from hpc_bnn.data import Examples
from hpc_bnn.errors import DataError, import_object

logger = logging.getLogger(__name__)  # on the first rank alone

SPLITS = ("train", "validation", "test")
LOOK_BYTES = 2**26
"""Bytes of the examples by which a dtype is chosen, of which there are 2 to 100."""


@dataclass(frozen=True)
class Source:
    """Examples that are read by their numbers."""

    flag: str
    """The flag and SPEC, for messages."""
    num_examples: int
    read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    """Returns x and y of some examples, as they are in the source."""
    files: tuple[Path, ...] = ()
    """What they come from, if from files."""


# --- kinds of SPEC -------------------------------------------------------------------------------------


def open_source(split: str, spec: str, options: argparse.Namespace) -> Source:
    """Return the examples that a SPEC stands for."""
    flag = f"--{split} {spec}"
    if spec.endswith(".npz"):
        return open_npz(flag, Path(spec), split, options)
    encoded = options.encoded
    common.check("--encoded", encoded, encoded is None, f"{flag} is no .npz file", "Leave it out")
    if "," in spec or spec.endswith(".npy"):
        paths = tuple(Path(path) for path in spec.split(","))
        common.check(f"--{split}", spec, len(paths) == 2, "two files are needed", "Give X.npy,Y.npy")
        x, y = (load(flag, path) for path in paths)
        check_lengths(flag, x.shape, y.shape)
        return Source(flag, len(x), lambda rows: (x[rows], y[rows]), paths)
    return open_dataset(flag, import_object(f"--{split}", spec))


def load(flag: str, path: Path) -> Any:
    """Return the array of an .npy file, as a memory map, or the arrays of an .npz file."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{flag}: {path} cannot be read as NumPy's arrays of numbers ({error})") from error
    if isinstance(found, np.ndarray) == (path.suffix == ".npz"):
        raise DataError(f"{flag}: {path} is one array where its name says .npz, or the reverse. Name it rightly")
    return found


def open_npz(flag: str, path: Path, split: str, options: argparse.Namespace) -> Source:
    """Return the examples of an .npz file, whose arrays are read into memory."""
    archive = load(flag, path)

    def get(option: str, key: str) -> np.ndarray:
        key = key.replace("{split}", split)
        common.check(option, key, key in archive, f"{flag} has no such key", f"It has {', '.join(archive)}")
        try:
            return archive[key]
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{flag}: '{key}' cannot be read as an array of numbers ({error})") from error

    x, y = get("--x", options.x), get("--y", options.y)
    if options.encoded is None:
        check_lengths(flag, x.shape, y.shape)
        return Source(flag, len(x), lambda rows: (x[rows], y[rows]), (path,))
    offsets = get("--encoded", options.encoded).astype(np.int64)
    check_lengths(flag, offsets[1:].shape, y.shape)
    if (np.diff(offsets) < 0).any() or offsets[0] < 0 or offsets[-1] > len(x):
        raise DataError(f"{flag}: the offsets do not increase within the {len(x)} bytes of '{options.x}'")

    def read(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images = [decode(flag, row, x[offsets[row] : offsets[row + 1]]) for row in rows]
        return stack(flag, images), y[rows]

    return Source(flag, len(y), read, (path,))


def decode(flag: str, row: int, content: np.ndarray) -> np.ndarray:
    """Return an encoded image as [3, height, width], as a viewer shows it: uint8, or the dtype of deeper grey levels."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise DataError("data_prep/arrays.py needs Pillow: pip install 'hpc_bnn[data]'") from error
    try:
        image = Image.open(io.BytesIO(content.tobytes()))
        what = "frames" if getattr(image, "n_frames", 1) > 1 else ""
        is_deep = image.mode[0] in "IF"
        if not is_deep and ";16" in str(image.tile):
            what = "16 bits per colour, which Pillow reads as 8,"
        is_clear = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
        if is_clear and (is_deep or image.convert("RGBA").getchannel("A").getextrema()[0] < 255):
            what = "transparency,"
        turned = ImageOps.exif_transpose(image)
        pixels = np.asarray(turned if is_deep else turned.convert("RGB"))
    except (OSError, ValueError, SyntaxError, TypeError, Image.DecompressionBombError) as error:
        raise DataError(f"{flag}, example {row}: the image cannot be decoded ({error})") from error
    if what:
        raise DataError(
            f"{flag}, example {row}: the image has {what} of which a part would be lost. Give arrays (.npy), or convert it"
        )
    return np.stack([pixels] * 3) if is_deep else pixels.transpose(2, 0, 1)


def open_dataset(flag: str, found: Any) -> Source:
    """Return the examples of a dataset, or of what a class or a function returns."""
    dataset = found() if isinstance(found, type) or not hasattr(found, "__getitem__") else found
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise DataError(f"{flag}: {type(dataset).__name__} is no map-style dataset, with a length and items")

    def read(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        items = [dataset[int(row)] for row in rows]
        for row, item in zip(rows, items):
            if not isinstance(item, (tuple, list)) or len(item) != 2:
                raise DataError(f"{flag}, example {row}: an item must be a pair (x, y)")
        return stack(flag, [x for x, _ in items]), stack(flag, [y for _, y in items])

    return Source(flag, len(dataset), read)


def stack(flag: str, arrays: list) -> np.ndarray:
    """Return arrays as one [n, ...]."""
    arrays = [np.asarray(array) for array in arrays]
    shapes = sorted({array.shape for array in arrays})
    if len(shapes) > 1:
        raise DataError(f"{flag}: examples have different shapes, such as {shapes[0]} and {shapes[-1]}")
    dtypes = sorted({str(array.dtype) for array in arrays if array.ndim})  # numbers of Python may be whole or not
    if len(dtypes) > 1:
        raise DataError(f"{flag}: examples have different dtypes, {' and '.join(dtypes)}. Convert them to one")
    return np.stack(arrays)


def check_lengths(flag: str, inputs: tuple[int, ...], targets: tuple[int, ...]) -> None:
    """Raise `DataError` unless arrays of these shapes hold equally many examples."""
    if not inputs or inputs[:1] != targets[:1]:
        raise DataError(f"{flag}: x is {inputs} and y {targets}: as many inputs as targets are needed")


# --- shards --------------------------------------------------------------------------------------------


def arrange_inputs(flag: str, x: np.ndarray, options: argparse.Namespace) -> np.ndarray:
    """Return inputs as [n, channels, ...], as they are."""
    if options.channels_last:
        shape = x.shape
        common.check("--channels-last", shape, x.ndim >= 3, "x must be [n, ..., channels]", "Leave it out")
        x = np.moveaxis(x, -1, 1)
    if options.add_channel:
        x = x[:, None]
    if x.dtype.kind not in "biuf":
        raise DataError(f"{flag}: x has dtype {x.dtype}: numbers are needed")
    if x.ndim == 4 and x.shape[-1] in (1, 3, 4) and x.shape[1] not in (1, 3, 4):
        say_channels(x.shape[1:])
    common.check("--ids", x.dtype, not options.ids or x.dtype.kind in "iu", "ids are whole numbers", "Leave it out")
    return x


@functools.cache
def say_channels(shape: tuple[int, ...]) -> None:
    """Say, once, that inputs look like images with their channels last."""
    logger.warning(
        "x is %s, taken as %d channels of %d x %d: if the channels are last, give --channels-last", shape, *shape
    )


def arrange_targets(flag: str, y: np.ndarray, rows: np.ndarray, num_classes: int | None) -> np.ndarray:
    """Return targets as classes [n] int64, checked, or as numbers [n, ...], as they are."""
    if y.dtype.kind not in "biuf":
        raise DataError(f"{flag}: y has dtype {y.dtype}: numbers are needed")
    if num_classes is None:
        return y[:, None] if y.ndim == 1 else y
    if y.shape[1:] not in ((), (1,)):
        raise DataError(f"{flag}: y of an example has shape {y.shape[1:]}. --classes needs one number")
    y = y.reshape(len(y))
    wrong = np.flatnonzero(~((y >= 0) & (y < num_classes) & (y == np.floor(y))))
    if len(wrong):
        raise DataError(
            f"{flag}, example {rows[wrong[0]]}: y is {y[wrong[0]]}, and --classes {num_classes} "
            f"allows 0 to {num_classes - 1}"
        )
    return y.astype(np.int64)


def read_rows(source: Source, rows: np.ndarray, options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y of some rows, arranged."""
    x, y = source.read(rows)
    return arrange_inputs(source.flag, x, options), arrange_targets(source.flag, y, rows, options.classes)


def choose_types(train: Source, rows: np.ndarray, options: argparse.Namespace) -> list[type | None]:
    """Return the dtypes in which x and y are written, by a sample of the training rows; None: as they are."""
    x, y = read_rows(train, rows[:1], options)
    is_wide = [x.dtype.kind == "f", options.classes is None]
    if any(
        is_float and array.dtype.itemsize > 2 and array.dtype != np.float32 for is_float, array in zip(is_wide, (x, y))
    ):
        number = np.clip(LOOK_BYTES // (x.nbytes + y.nbytes), 2, 100)
        x, y = read_rows(train, rows[np.unique(np.linspace(0, len(rows) - 1, number).astype(int))], options)
    if x.dtype.kind in "iu" and x.dtype.itemsize > 1 and not options.ids and options.encoded is None:
        logger.info("x is %s and is normalised as numbers are: give --ids if they name things, such as tokens", x.dtype)
    return [common.float_type(n, a) if wide else None for n, wide, a in zip("xy", is_wide, (x, y))]


def make_examples(
    source: Source, rows: np.ndarray, options: argparse.Namespace, types: Sequence[type | None] = (None, None)
) -> Examples:
    """Return the examples of some rows, read when they are written."""

    def read(start: int, stop: int) -> tuple[Any, ...]:
        arrays = read_rows(source, rows[start:stop], options)
        return tuple(a if dtype is None else a.astype(dtype) for a, dtype in zip(arrays, types))

    return Examples(len(rows), read)


def check_flags(options: argparse.Namespace) -> dict[str, float]:
    """Return the shares of the training examples that the splits take."""
    classes = options.classes
    common.check("--classes", classes, classes is None or classes >= 2, "must be at least 2", "Try 10")
    shares = common.check_fractions(options)
    for split in ("validation", "test"):
        share, spec = shares[split], getattr(options, split)
        rule = f"--{split} {spec} is given, too"
        common.check(f"--{split}-fraction", share, share == 0 or spec is None, rule, "Give one of them")
        same = spec is not None and spec == options.train and not (spec.endswith(".npz") and "{split}" in options.x)
        rule = "these are the examples of --train: a network would be judged by what it was trained on"
        common.check(f"--{split}", spec, not same, rule, f"Give others, --{split}-fraction, or keys with {{split}}")
    return shares


def prepare(options: argparse.Namespace, comm: GridComm) -> None:
    shares = check_flags(options)
    sys.path.append(os.getcwd())  # of the user's own modules
    with comm.agree("opening the source"):
        sources = {
            split: open_source(split, getattr(options, split), options)
            for split in SPLITS
            if getattr(options, split) is not None
        }
        for source in sources.values():
            if source.num_examples == 0:
                raise DataError(f"{source.flag}: it holds no example")
        key = common.checksums(*(path for source in sources.values() for path in source.files))
    if not all(source.files for source in sources.values()):
        key = None  # what a dataset holds is not known: nothing is continued
    train = sources["train"]
    rows = {split: np.arange(source.num_examples) for split, source in sources.items()}
    rows |= common.draw_split(train.num_examples, shares, options.seed)
    with comm.agree("looking at the first examples"):
        types = choose_types(train, rows["train"], options)
    first = train.files[0] if train.files else None
    common.write(
        comm,
        options,
        {s: make_examples(sources.get(s, train), rows[s], options, types) for s in SPLITS if s in rows},
        key=key,
        coordinates={s: {"row": rows[s]} for s in SPLITS if s in rows},
        ids=("x",) if options.ids else (),
        **common.state_facts(options, first.stem if first else options.train, first.name if first else options.train),
        num_classes=options.classes,
    )


def make_parser() -> argparse.ArgumentParser:
    parser = common.make_parser(__doc__)
    parser.add_argument("--train", required=True, metavar="SPEC", help="training examples")
    parser.add_argument("--validation", metavar="SPEC", help="validation examples")
    parser.add_argument("--test", metavar="SPEC", help="test examples")
    common.add_fractions(parser, validation=0.0, test=0.0)
    parser.add_argument("--x", metavar="KEY", default="x", help="inputs in a .npz file (default: %(default)s)")
    parser.add_argument("--y", metavar="KEY", default="y", help="targets in a .npz file (default: %(default)s)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--encoded",
        metavar="KEY",
        help="x holds JPEG or PNG files end to end, image i from byte KEY[i] to KEY[i + 1]; written as [n, 3, H, W]",
    )
    kind.add_argument("--channels-last", action="store_true", help="x is [n, ..., channels]")
    kind.add_argument("--add-channel", action="store_true", help="x has no channels: make them one")
    parser.add_argument("--ids", action="store_true", help="x holds whole numbers that name things, such as tokens")
    parser.add_argument("--classes", type=int, metavar="N", help="y is a class in 0..N-1")
    common.add_facts(parser)
    return parser


if __name__ == "__main__":
    common.run(make_parser(), prepare)
