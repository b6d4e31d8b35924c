"""What the jobs' commands share."""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

from objdrive.base.files import EMBEDDED
from objdrive.errors import ObjdriveError


def exit_status(work: Callable[[], None]) -> int:
    """Do a command's work: 0, or 1 and a line on the standard error if it fails in a way that the user can mend."""
    try:
        work()
    except ObjdriveError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def absolute(address: str) -> str:
    """An address that means the same to workers, which run in folders of their own."""
    return address if "://" in address else str(Path(address).absolute())


def absolute_model(name: str) -> str:
    """A base or part of one that means the same to workers: a folder's or file's address; a name or hub id as it is."""
    # As `find_base` looks for it: an embedded base, else a folder or file, else a hub id, which may look like one.
    return absolute(name) if Path(name).exists() and not (EMBEDDED / name).is_dir() else name


def positive(text: str) -> int:
    """An option that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def number(text: str, least: float = 0.0) -> float:
    """An option that measures something."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least {least:g}, got {text!r}")
    return value


def add_base_options(parser: argparse.ArgumentParser) -> None:
    """``--base``, ``--clip`` and ``--vae``, as workers find them."""
    parser.add_argument(
        "--base",
        type=absolute_model,
        default="tiny64",
        help="embedded base, folder, .safetensors file or hub id (%(default)s)",
    )
    parser.add_argument(
        "--vae", type=absolute_model, help="folder or hub id of an autoencoder in place of the base's own"
    )
    parser.add_argument(
        "--clip", type=absolute_model, help="folder or hub id of the CLIP with the image tower, for bases without one"
    )
