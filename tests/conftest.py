"""Fixtures that several rooms share: the embedded base, catalog objects, small snapshots laid out as SD 1.5's."""

import csv
import functools
import hashlib
import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when the hub's client is imported

import diffusers
import pytest
import torch
import transformers
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig

from objdrive.adapters.adapter import Adapter, adapter_files
from objdrive.adapters.artifact import ArtifactKey, ArtifactMetadata, BaseRef, SceneMember, SourceRecord, Sources
from objdrive.adapters.bank import AdapterBank
from objdrive.base.files import EMBEDDED
from objdrive.base.stable_diffusion import Base
from objdrive.catalog.photos import decode_photo
from objdrive.training.views import Scene, SceneObject

CATALOG = Path(__file__).parents[1] / "examples" / "catalog"
EPSILON_SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
"""What SD 1.5 ships."""
VELOCITY_SCHEDULER = EPSILON_SCHEDULER | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
"""What SD 2.1 ships."""

torch.set_num_threads(1)
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tiny64():
    """The embedded base on the CPU, in float32."""
    return Base.load("tiny64", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="session")
def catalog_scene():
    """Call it with the ids of objects in one picture of the example catalog: their scene."""
    with (CATALOG / "manifest.csv").open(newline="", encoding="utf-8") as file:
        rows = {row["object_id"]: row for row in csv.DictReader(file)}

    @functools.cache
    def scene(*object_ids):
        photos = [_photo(rows[object_id]) for object_id in object_ids]
        objects = [
            SceneObject(object_id, rows[object_id]["class_name"], photo.mask)
            for object_id, photo in zip(object_ids, photos, strict=True)
        ]
        return Scene("+".join(object_ids), photos[0].image, tuple(objects))

    return scene


def _photo(row):
    mask = (CATALOG / row["mask"]).read_bytes() if row["mask"] else None
    return decode_photo((CATALOG / row["image"]).read_bytes(), mask, name=row["object_id"])


@pytest.fixture(scope="session")
def sd15(tmp_path_factory):
    """(snapshot, CLIP) folders: SD 1.5's classes, configs and file layout with few and random weights."""
    folder = tmp_path_factory.mktemp("sd15")
    snapshot, clip = folder / "snapshot", folder / "clip"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _write_snapshot(snapshot, clip)
    return snapshot, clip


def _write_snapshot(snapshot, clip):
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED / "tiny64" / "tokenizer")
    # Like SD 1.5's, the config names token ids that the tokenizer does not use.
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=24,
        bos_token_id=0,
        eos_token_id=2,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=48,
        patch_size=16,
        projection_dim=24,
    )
    whole = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24))
    text_encoder = CLIPTextModel(text)
    text_encoder.load_state_dict(whole.text_model.state_dict())
    StableDiffusionPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(32, 32, 32, 32),
            layers_per_block=1,
            sample_size=128,
        ),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=16,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            block_out_channels=(32, 32, 64, 64),
            layers_per_block=1,
            attention_head_dim=8,
            cross_attention_dim=32,
        ),
        scheduler=PNDMScheduler.from_config(EPSILON_SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(snapshot)
    whole.save_pretrained(clip)
    (snapshot / "scheduler" / "scheduler_config.json").write_text(json.dumps(EPSILON_SCHEDULER))
    _write_old_tokenizer(snapshot / "tokenizer", tokenizer)


def _write_old_tokenizer(folder, tokenizer):
    for path in folder.iterdir():
        path.unlink()
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(tokenizer.get_vocab()))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = "<|endoftext|>"
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    config = special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(params=["epsilon", "v_prediction"])
def sd15_folders(request, sd15, tmp_path):
    """(snapshot, CLIP) folders as in `sd15`, once for each kind of prediction."""
    snapshot, clip = sd15
    if request.param == "epsilon":
        return snapshot, clip
    velocity = tmp_path / "velocity"
    velocity.mkdir()
    for path in snapshot.iterdir():
        if path.name != "scheduler":
            (velocity / path.name).symlink_to(path)
    (velocity / "scheduler").mkdir()
    (velocity / "scheduler" / "scheduler_config.json").write_text(json.dumps(VELOCITY_SCHEDULER))
    return velocity, clip


@pytest.fixture(scope="session")
def small_unet():
    """Call it with the width of the text states: a UNet of few and random weights."""
    return make_small_unet


def make_small_unet(cross_attention_dim):
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 16),
        norm_num_groups=4,
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=cross_attention_dim,
    )


@pytest.fixture(scope="session")
def small(sd15):
    """A base whose few and random weights draw meaningless pictures of 16 x 16 pixels fast."""
    snapshot, clip = sd15
    base = Base.load(str(snapshot), clip=str(clip), device="cpu", dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        base.unet = make_small_unet(32)
        base.vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            layers_per_block=1,
            sample_size=16,
        )
    for part in (base.unet, base.vae):
        part.eval().requires_grad_(False)
    return base


@pytest.fixture(scope="session")
def random_adapter():
    """Call it with a base, a seed and a rank: an adapter that changes every picture by a lot."""

    def random_adapter(base, seed, rank=4):
        generator = torch.Generator().manual_seed(seed)
        with AdapterBank(base.unet, base.family.lora_targets, slots=1, rank=rank) as bank:
            lora = {
                key: torch.randn(value.shape, generator=generator) * (0.2 / rank**0.5)
                for key, value in bank.export(0).items()
            }
        vectors = {
            encoder: 0.5 * torch.randn(table.shape[1], generator=generator)
            for encoder, table in base.vocabularies.items()
        }
        return Adapter(lora, vectors)

    return random_adapter


@pytest.fixture(scope="session")
def put_adapter(random_adapter):
    """Call it with a store, a base, an object id and a seed: a random adapter is the object's current artifact."""

    def put_adapter(store, drawn_by, object_id, seed, *, rank=4, adapter=None, **changes):
        adapter = adapter or random_adapter(drawn_by, seed, rank)
        token = f"<{object_id}>"
        metadata = ArtifactMetadata(
            **{
                "object_id": object_id,
                "class_name": "mug",
                "token": token,
                "phrase": f"{token} mug",
                "digest": hashlib.sha256(f"{object_id}:{seed}".encode()).hexdigest()[:32],
                "members": [SceneMember(object_id=object_id, class_name="mug", token=token)],
                "base": BaseRef(id=drawn_by.name, fingerprint=drawn_by.fingerprint),
                "recipe": {},
                "recipe_digest": "",
                "method_version": 1,
                "metrics": {},
                "sources": Sources(image=SourceRecord(uri="mug.png", size=1, mark="")),
                "versions": {},
                "created": "2026-11-22T18:45:00Z",
            }
            | changes
        )
        store.commit(adapter_files(adapter, token=token, family=drawn_by.family), metadata)
        return ArtifactKey(object_id, metadata.digest)

    return put_adapter
