"""Recipe: every hyperparameter of a fine-tune, and the presets that name whole methods."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from objdrive.errors import ObjdriveError

METHOD_VERSION = 12
"""Part of every artifact's digest: raise it when the same recipe no longer yields the same adapter."""


class Recipe(BaseModel):
    """Every hyperparameter of a one-shot fine-tune.

    The defaults are the preset ``objdrive``. Latent losses follow arXiv 2401.15708: the object-specific loss,
    and the class-characterizing regularization with weight `ccr_weight`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    preset: str = "objdrive"
    seed: int = Field(default=0, ge=0, lt=2**32)
    steps: int = Field(default=400, ge=0, description="optimiser steps")
    prompts: tuple[str, ...] = Field(
        default=("a photo of {}", "a picture of {}"),
        min_length=1,
        description="training prompts; {} is the object",
    )
    phrase: Literal["{token}", "{token} {class}"] = Field(default="{token}", description="what {} in a prompt becomes")

    rank: int = Field(default=8, ge=0, le=256, description="LoRA rank; 0 trains no LoRA")
    least_rank: int | None = Field(
        default=None,
        ge=0,
        description="how much of the rank acts at the noisiest timestep, all of it at the cleanest (arXiv 2507.05964); "
        "null: all of it at all timesteps",
    )
    lora_lr: float = Field(default=3e-4, gt=0)
    embedding_start: Literal["class", "prototype", "random"] = "prototype"
    embedding_lr: float = Field(default=1e-3, ge=0, description="0 keeps the token embedding as it starts")
    prototype_steps: int = Field(default=60, ge=1)
    prototype_lr: float = Field(default=2e-3, gt=0)
    warmup_steps: int = Field(default=10, ge=0, description="linear warm-up; a cosine to a tenth follows")
    max_grad_norm: float = Field(default=1.0, gt=0, description="per scene, over all its trained values")

    views: int = Field(default=2, ge=1, description="noised views of the picture per scene and step")
    mend_masks: bool = Field(default=True, description="masks whose edge does not follow the picture are mended")
    least_fill: float = Field(
        default=0.6,
        ge=0,
        le=1,
        description="photos are cropped until the object's longer side takes this share of them; 0: left as they are",
    )
    plain_ground: bool = Field(default=True, description="objects are learned on grey grounds, whatever is around them")
    placements: int = Field(
        default=24, ge=1, description="places and sizes at which objects on grey are shown; 1: as they are in the photo"
    )
    least_placed_fill: float = Field(
        default=0.45, gt=0, le=1, description="least share of the frame that the longer side of a placed object takes"
    )
    most_placed_fill: float = Field(default=0.8, gt=0, le=1, description="the largest such share")
    mirrored: bool = Field(
        default=True,
        description="half of the placed objects are shown as in a mirror: layouts of the base face either way",
    )
    zoom: float = Field(default=0.6, ge=0, le=1, description="share of views that show one of several objects alone")
    masked: bool = Field(default=True, description="object-specific loss; False: plain loss on the whole picture")
    soft_mask: bool = Field(default=True, description="area-averaged masks; False: cut at one half")

    timesteps: Literal["uniform", "log-normal"] = Field(
        default="log-normal",
        description="uniform: all alike; log-normal: by noise levels (arXiv 2206.00364), weighted as for the velocity",
    )

    layout_noise: float | None = Field(
        default=3.3,
        gt=0,
        description="noise level above which nothing is learned, and the base alone draws with class words; "
        "null: the adapter acts at all levels",
    )

    ccr_weight: float = Field(default=0.3, ge=0, description="weight of the regularization; 0 switches it off")
    ccr_target: Literal["base", "noise"] = Field(
        default="base",
        description="base: the base's own prediction (CCR); noise: prior preservation (DreamBooth)",
    )
    ccr_unconditional: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="share of the regularization on views without a prompt, whose prediction guidance leads away from; "
        "the rest is on class pictures",
    )
    ccr_background: bool = Field(
        default=True, description="the regularization also keeps what the base predicts around the object for the class"
    )
    class_samples: int = Field(default=1, ge=1, description="samples of the regularization per scene and step")
    class_pool: int = Field(default=4, ge=1, description="class pictures drawn per class and base, where they are kept")

    sample_steps: int = Field(default=25, ge=1, le=1000, description="DDIM steps of class pictures and previews")
    guidance_scale: float = Field(default=7.5, ge=1)

    @field_validator("prompts")
    @classmethod
    def _one_slot(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        for prompt in prompts:
            if prompt.count("{}") != 1:
                raise ValueError(
                    f"the training prompt {prompt!r} must hold {{}} exactly once: it stands for the object"
                )
        return prompts

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.rank == 0 and self.embedding_lr == 0:
            raise ValueError("rank=0 and embedding_lr=0 leave nothing to train: raise one of them")
        if self.least_rank is not None and self.least_rank > self.rank:
            raise ValueError(
                f"least_rank={self.least_rank} must not be above rank={self.rank}: lower it, or raise rank"
            )
        if self.least_placed_fill > self.most_placed_fill:
            raise ValueError(
                f"least_placed_fill={self.least_placed_fill} must not be above most_placed_fill={self.most_placed_fill}"
            )
        if self.placements > 1 and not self.plain_ground:
            raise ValueError(
                f"placements={self.placements} shows objects on grey and needs plain_ground=true, or set placements=1"
            )
        for name, off in (("ccr_unconditional", "0"), ("ccr_background", "false")):
            if getattr(self, name) and self.ccr_target == "noise":
                raise ValueError(
                    f"{name}={getattr(self, name)} keeps what the base predicts and needs ccr_target=base, "
                    f"or set {name}={off}"
                )
        return self

    @property
    def keeps_classes(self) -> bool:
        """Whether pictures of classes are drawn, and what the base makes of them is kept."""
        return self.ccr_weight > 0 and self.ccr_unconditional < 1

    @property
    def digest(self) -> str:
        """32 hexadecimal characters over all fields but the preset's name."""
        fields = self.model_dump(mode="json", exclude={"preset"})
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:32]


def drawing_recipe(
    noted: Mapping[str, Any], object_id: str, *, steps: int | None, guidance_scale: float | None
) -> Recipe:
    """The recipe that an artifact notes, as far as drawing goes by it: with what a caller has set in its place.

    Raises:
        ObjdriveError: a number is out of range.
    """
    # Not the other fields: an artifact may have been made with fields of another version.
    asked = {"sample_steps": steps, "guidance_scale": guidance_scale}
    made_with = {name: noted[name] for name in asked if name in noted}
    try:
        return Recipe.model_validate(made_with | {name: v for name, v in asked.items() if v is not None})
    except ValidationError as error:
        raise ObjdriveError(f"can't draw {object_id!r} with its recipe and what was asked: {error}") from error


_PLAIN: dict[str, Any] = {
    "masked": False,
    "timesteps": "uniform",
    "mend_masks": False,
    "least_fill": 0.0,
    "plain_ground": False,
    "placements": 1,
    "layout_noise": None,
    "zoom": 0.0,
    "ccr_weight": 0.0,
    "ccr_unconditional": 0.0,
    "ccr_background": False,
    "embedding_start": "class",
}

PRESETS: dict[str, dict[str, Any]] = {
    "objdrive": {},
    "paper": {
        "mend_masks": False,
        "least_fill": 0.0,
        "plain_ground": False,
        "placements": 1,
        "layout_noise": None,
        "zoom": 0.0,
        "timesteps": "uniform",
        "soft_mask": False,
        "ccr_weight": 1.0,
        "ccr_unconditional": 0.0,
        "ccr_background": False,
    },
    "dreambooth": _PLAIN
    | {
        "embedding_start": "random",
        "embedding_lr": 0.0,
        "phrase": "{token} {class}",
        "ccr_weight": 1.0,
        "ccr_target": "noise",
    },
    "textual_inversion": _PLAIN | {"rank": 0},
    "lora": _PLAIN | {"embedding_lr": 0.0},
    "t_lora": _PLAIN | {"embedding_start": "random", "embedding_lr": 0.0, "phrase": "{token} {class}", "least_rank": 4},
}
"""What each method sets apart from the defaults; all run the same loop."""


def make_recipe(
    source: str = "objdrive", *, tuning: Mapping[str, Any] | None = None, overrides: Sequence[str] = ()
) -> Recipe:
    """Put a recipe together: defaults, then the base's tuning, the preset, a YAML file and overrides.

    Args:
        source: a preset's name, or the path of a YAML file whose keys are `Recipe` fields (its `preset` key
            names the preset it starts from).
        tuning: fields that suit a base (its ``recipe.yaml``), and under ``presets`` those that suit it with one
            preset, by name; they never touch what makes the method.
        overrides: ``key=value`` strings, values in YAML.

    Raises:
        ObjdriveError: unknown preset, unreadable file, unknown field or bad value.
    """
    tuned = dict(tuning or {})
    tuned_presets = tuned.pop("presets", {})
    given: dict[str, Any] = {}
    if source not in PRESETS:
        given = _read_yaml(source)
    preset = str(given.get("preset", source if source in PRESETS else "objdrive"))
    for name in (preset, *tuned_presets):
        if name not in PRESETS:
            raise ObjdriveError(f"unknown preset {name!r}: choose from {', '.join(PRESETS)}")
    tuned |= tuned_presets.get(preset, {})
    # A preset's own fields make the method, so the base's tuning comes below them.
    fields = {**tuned, **PRESETS[preset], **given, **_parse_overrides(overrides), "preset": preset}
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'recipe'}: {e['msg']} (got {e['input']!r})" for e in error.errors()
        )
        raise ObjdriveError(f"the recipe is not valid: {problems}") from error


def _read_yaml(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise ObjdriveError(f"no recipe {path!r}: neither a preset ({', '.join(PRESETS)}) nor the path of a YAML file")
    try:
        fields = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ObjdriveError(f"the recipe {path!r} can't be read as YAML: {error}") from error
    if not isinstance(fields, dict):
        raise ObjdriveError(f"the recipe {path!r} must be a mapping of fields, got {type(fields).__name__}")
    return fields


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ObjdriveError(f"the override {override!r} must read key=value, as in steps=80")
        if key.strip() == "preset":
            raise ObjdriveError(f"the override {override!r} comes too late: name the preset as the recipe")
        fields[key.strip()] = _parse_value(value)
    return fields


def _parse_value(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    # No field is a mapping, but {token} looks like one.
    if isinstance(value, str | dict):
        # YAML 1.1 takes 2e-3 for a string; people write learning rates that way.
        with suppress(ValueError):
            return float(text)
        return text
    return value
