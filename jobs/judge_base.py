"""Judge bases on the same scenes and prompts: how sharp, how right, how varied."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from jobs.command import exit_status
from jobs.pretrain.augment import coarse
from jobs.pretrain.folders import Folders
from jobs.pretrain.judge import (
    BaseJudge,
    SampleSizes,
    SceneSet,
    diversity,
    draw,
    draw_alike,
    matched,
    reconstruction,
    sheet,
)
from jobs.pretrain.sprites import Sprites, have_sprites
from objdrive.base.stable_diffusion import Base
from objdrive.errors import ObjdriveError
from objdrive.evaluation.imagenet import ImageNetEncoder


def main(arguments: list[str] | None = None) -> int:
    """Judge the bases; the exit status."""
    options = _parser().parse_args(arguments)
    return exit_status(lambda: _judge(options))


def _judge(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    sprites = have_sprites(Folders(Path(options.data)))
    bases = [Base.load(name, device="cpu") for name in options.bases]
    print(table(judge(bases, sprites, SampleSizes(drawn=options.drawn), Path(options.out))))


def judge(bases: list[Base], sprites: Sprites, sizes: SampleSizes, out: Path) -> dict[str, dict[str, float]]:
    """Figures by base, and of real scenes; a grid of each base's pictures goes to `out`.

    Raises:
        ObjdriveError: the bases differ in resolution.
    """
    resolutions = {base.resolution for base in bases}
    if len(resolutions) != 1:
        raise ObjdriveError(
            f"bases of {sorted(resolutions)} pixels cannot be judged on the same scenes: judge each alone"
        )
    out.mkdir(parents=True, exist_ok=True)
    resolution = resolutions.pop()
    held = SceneSet.compose(sprites, "held", resolution, sizes.judged)
    seen = SceneSet.compose(sprites, "train", resolution, sizes.judged)
    judged = BaseJudge(sprites, resolution, sizes)
    figures = {
        "scenes": _of_scenes(judged, seen),
        "scenes of held-out drawings": _of_scenes(judged, held),
        "these at 36 of 64 pixels": _of_scenes(judged, replace(held, pixels=coarse(held.pixels))),
    }
    for number, base in enumerate(bases):
        drawn = draw(base, sprites.classes, sizes)
        right, placed = judged.accuracy(judged.features(drawn.pictures), drawn.labels, drawn.contexts)
        alike = draw_alike(base, sprites.classes, sizes)
        features = judged.features(alike.flatten(0, 1))[:, : ImageNetEncoder.width].view(*alike.shape[:2], -1)
        figures[base.name] = {
            "psnr": reconstruction(base, held.pixels),
            "class": right,
            "context": placed,
            "diversity": diversity(features),
            "retrieval": matched(base, held),
        }
        sheet(drawn).save(out / f"grid-{number}.png")
    (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def table(figures: dict[str, dict[str, float]]) -> str:
    """The figures as a Markdown table, a column for each base."""
    names = list(figures)
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for key, (title, form) in _SHOWN.items():
        cells = [form.format(figures[name][key]) if key in figures[name] else "" for name in names]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


_SHOWN = {
    "psnr": ("autoencoder, PSNR on scenes of held-out drawings", "{:.2f} dB"),
    "class": ("class recognised in drawn pictures", "{:.1%}"),
    "context": ("context recognised in drawn pictures", "{:.1%}"),
    "diversity": ("distance between pictures of one prompt", "{:.3f}"),
    "retrieval": ("CLIP: own caption nearest among 128", "{:.1%}"),
}


def _of_scenes(judged: BaseJudge, scenes: SceneSet) -> dict[str, float]:
    """What the classifier makes of real scenes: the most that it can be trusted."""
    rows = [row for row, plain in enumerate(scenes.plain) if plain]
    features = judged.features(scenes.pixels[rows])
    labels, contexts = [scenes.labels[row] for row in rows], [scenes.contexts[row] for row in rows]
    right, placed = judged.accuracy(features, labels, contexts)
    return {"class": right, "context": placed}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="judge_base.py", description=__doc__)
    parser.add_argument("bases", nargs="+", help="embedded bases, folders or hub ids, of one resolution")
    parser.add_argument("--data", required=True, help="folder with the icons; they are fetched if it has none")
    parser.add_argument("--out", default="judged", help="folder for figures.json and the grids (judged)")
    parser.add_argument("--drawn", type=int, default=SampleSizes.drawn, help="pictures of each class (12)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (2)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
