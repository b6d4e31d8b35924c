"""Write the set that methods are measured on: photos, masks, manifests and galleries of two disjoint halves."""

import argparse
import sys
from pathlib import Path

# So that ``python jobs/evaluation_set.py`` finds the packages beside it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.evaluation.compose import PROMPTS, read_halves, write_half
from jobs.pretrain.sprites import Sprites, draw_sprites, make_sprites
from objdrive.errors import ObjdriveError
from objdrive.evaluate import read_prompts

_DRAWN_HALVES = {"development": ("apple", "book"), "test": ("kite",)}


def main(arguments: list[str] | None = None) -> int:
    """Write the set; the exit status."""
    options = _parser().parse_args(arguments)
    try:
        prompts = read_prompts(options.prompts)
        sprites = draw_sprites(0) if options.drawn else _sprites(options.data)
        halves = _DRAWN_HALVES if options.drawn else read_halves()
        for name, class_names in halves.items():
            count = write_half(
                sprites, class_names, prompts, options.out / name, resolution=options.resolution, scenes=options.scenes
            )
            print(f"{name}: {count} objects in {options.out / name}")
    except ObjdriveError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _sprites(data: Path) -> Sprites:
    stored = data / "sprites.parquet"
    if not stored.is_file():
        data.mkdir(parents=True, exist_ok=True)
        make_sprites(data / "packages").save(stored)
    return Sprites.load(stored)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="evaluation_set.py", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write development and test to")
    parser.add_argument(
        "--data", type=Path, default=Path("icons"), help="folder with the icons; fetched if none (icons)"
    )
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="YAML list of prompts (the shipped one)")
    parser.add_argument("--resolution", type=int, default=64, help="edge of the base's pictures (64)")
    parser.add_argument("--scenes", type=int, default=4, help="pictures of each drawing for each prompt (4)")
    parser.add_argument("--drawn", action="store_true", help="plain shapes in place of icons, to try it all out")
    return parser


if __name__ == "__main__":
    sys.exit(main())
