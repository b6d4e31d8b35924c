"""Write the set that methods are measured on: photos, masks, manifests and galleries of two disjoint halves."""

import argparse
import sys
from pathlib import Path

from jobs.command import exit_status
from jobs.evaluation.compose import PROMPTS, read_halves, write_half
from jobs.pretrain.folders import Folders
from jobs.pretrain.sprites import draw_sprites, have_sprites
from objdrive.evaluation.prompts import read_prompts

_DRAWN_HALVES = {"development": ("apple", "book"), "test": ("kite",)}


def main(arguments: list[str] | None = None) -> int:
    """Write the set; the exit status."""
    options = _parser().parse_args(arguments)
    return exit_status(lambda: _write(options))


def _write(options: argparse.Namespace) -> None:
    prompts = read_prompts(options.prompts)
    sprites = draw_sprites(0) if options.drawn else have_sprites(Folders(options.data))
    halves = _DRAWN_HALVES if options.drawn else read_halves()
    for name, class_names in halves.items():
        count = write_half(
            sprites, class_names, prompts, options.out / name, resolution=options.resolution, scenes=options.scenes
        )
        print(f"{name}: {count} objects in {options.out / name}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="evaluation_set.py", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write development and test to")
    parser.add_argument(
        "--data", type=Path, default=Path("icons"), help="folder with the icons; fetched if none (icons)"
    )
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="YAML list of prompts (the shipped one)")
    parser.add_argument("--resolution", type=int, default=64, help="edge of the base's pictures (64)")
    parser.add_argument("--scenes", type=int, default=5, help="pictures of each drawing for each prompt (5)")
    parser.add_argument("--drawn", action="store_true", help="plain shapes in place of icons, to try it all out")
    return parser


if __name__ == "__main__":
    sys.exit(main())
