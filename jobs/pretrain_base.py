"""Make a base from public icon packs: data, autoencoder, CLIP, UNet."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import ray
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from jobs.cluster import connect
from jobs.command import absolute_model, exit_status
from jobs.pretrain.clip import export_clip, make_tokenizer
from jobs.pretrain.config import Config, Part, read_config
from jobs.pretrain.data import make_data
from jobs.pretrain.export import begin_snapshot, finish_snapshot
from jobs.pretrain.folders import Folders
from jobs.pretrain.loop import Run, checkpoints, train
from jobs.pretrain.stages import StageSettings
from jobs.pretrain.unet import export_unet, make_latents
from jobs.pretrain.vae import export_vae
from objdrive.errors import ObjdriveError

STAGES = ("data", "vae", "clip", "unet")


def main(arguments: list[str] | None = None) -> int:
    """Run the job; the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return exit_status(lambda: _pretrain(options))
    finally:
        ray.shutdown()


def _pretrain(options: argparse.Namespace) -> None:
    config = read_config(options.config)
    if config.start:
        config = config.model_copy(update={"start": absolute_model(config.start)})
    folders = Folders(Path(options.out).resolve())
    stages = STAGES if options.stage == "all" else (options.stage,)
    if not options.resume:
        _refuse_to_overwrite(folders, stages)
    connect()
    disable_progress_bar()
    for stage in stages:
        _run_stage(stage, config, folders, options)


def _refuse_to_overwrite(folders: Folders, stages: Sequence[str]) -> None:
    trained = [stage for stage in stages if checkpoints(folders.stage(stage)).exists()]
    if trained:
        raise ObjdriveError(
            f"{folders.out} holds checkpoints of {', '.join(trained)}: go on from them with --resume, "
            "or choose another --out"
        )


def _run_stage(stage: str, config: Config, folders: Folders, options: argparse.Namespace) -> None:
    print(f"stage {stage}", flush=True)
    if stage == "data":
        make_data(config, folders)
        begin_snapshot(config, folders)
        make_tokenizer(config, folders)
        return
    if stage == "unet":
        make_latents(folders)
    part: Part = getattr(config, stage)
    whole = options.stage == "all"
    workers = options.workers or max(1, int(ray.cluster_resources().get("GPU", 0)))
    gpus = 1.0 if ray.cluster_resources().get("GPU", 0) >= workers else 0.0
    run = Run(
        name=stage,
        folder=folders.stage(stage),
        make=StageSettings(stage, config, folders),
        training=part.training,
        workers=workers,
        gpus=gpus,
        threads=options.threads or max(1, int(ray.cluster_resources()["CPU"]) // workers),
        minutes=options.minutes * (part.training.share if whole else 1.0),
        save_every=60 * options.save_every,
    )
    checkpoint = train(run)
    _EXPORTS[stage](config, folders, load_file(checkpoint / "ema.safetensors"))
    finish_snapshot(config, folders)
    print(f"{stage}: {checkpoint}", flush=True)


_EXPORTS: dict[str, Callable[[Config, Folders, dict[str, Tensor]], None]] = {
    "vae": export_vae,
    "clip": export_clip,
    "unet": export_unet,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pretrain_base.py", description=__doc__)
    parser.add_argument("--out", required=True, help="folder for data, checkpoints, curves and the base itself")
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all", help="what to do (all)")
    parser.add_argument("--config", default="tiny64", help="sizes: a shipped configuration or a YAML file (tiny64)")
    parser.add_argument("--workers", type=int, help="data-parallel workers (one per GPU, or one)")
    parser.add_argument("--threads", type=int, help="CPU threads of each worker (the cluster's cores, shared out)")
    parser.add_argument("--minutes", type=float, default=240, help="of training; shared out among stages by all (240)")
    parser.add_argument("--save-every", type=float, default=5, metavar="MINUTES", help="between checkpoints (5)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out")
    return parser


if __name__ == "__main__":
    sys.exit(main())
