"""What makes the parts a base: scheduler, index and class list."""

import json
import shutil

import diffusers
from diffusers import DDIMScheduler

from jobs.pretrain.config import Config
from jobs.pretrain.folders import Folders
from jobs.pretrain.sprites import Sprites
from jobs.pretrain.unet import SCHEDULE
from objdrive.base.files import PARTS, find_base

_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": diffusers.__version__,
    "feature_extractor": [None, None],
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def begin_snapshot(config: Config, folders: Folders) -> None:
    """Put the parts of the base to start from into the snapshot: any stage can then go on without the others."""
    if config.start:
        started = find_base(config.start).snapshot
        for part in PARTS:
            if (started / part).is_dir() and not (folders.snapshot / part).exists():
                shutil.copytree(started / part, folders.snapshot / part)


def finish_snapshot(config: Config, folders: Folders) -> None:
    """Write what goes with the parts; once all of those are there, the snapshot is a base."""
    snapshot = folders.snapshot
    DDIMScheduler(**SCHEDULE).save_pretrained(snapshot / "scheduler")
    (snapshot / "model_index.json").write_text(json.dumps(_INDEX, indent=2) + "\n")
    sprites = Sprites.load(folders.sprites)
    held = sorted({sprites.classes[label] for label in sprites.only("held").labels})
    (snapshot / "classes.json").write_text(json.dumps({"classes": sprites.classes, "held": held}))
    recipe = find_base(config.start).snapshot / "recipe.yaml" if config.start else None
    if recipe and recipe.is_file():
        shutil.copy(recipe, snapshot / "recipe.yaml")
