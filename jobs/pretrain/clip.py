"""CLIP's training: text and image towers in one space, on scenes and their captions."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from jobs.pretrain.config import Config
from jobs.pretrain.data import Rows, read_rows
from jobs.pretrain.folders import Folders
from jobs.pretrain.loop import load_matching
from jobs.pretrain.pictures import grid
from objdrive.base.files import find_base

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_START, _END = "<|startoftext|>", "<|endoftext|>"
_LARGEST_SCALE = 100.0
_JUDGED = 128
_SHOWN = 8


def make_tokenizer(config: Config, folders: Folders) -> None:
    """Put a tokenizer trained on the captions into the snapshot, unless it has one."""
    folder = folders.snapshot / "tokenizer"
    if not folder.exists():
        train_tokenizer(read_rows(folders.scenes, config.resolution).captions, config).save_pretrained(folder)


def train_tokenizer(captions: list[str], config: Config) -> CLIPTokenizer:
    """Byte-pair encoding as CLIP's, so that any text can be spelled, with a vocabulary learned from captions."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=config.vocabulary - 2,
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    state = learner.model.__getstate__()
    merges = _merges(state)
    words = alphabet + [letter + "</w>" for letter in alphabet] + [left + right for left, right in merges]
    vocabulary: dict[str, int] = {}
    for word in (*words, _START, _END):
        vocabulary.setdefault(word, len(vocabulary))
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=config.length)


def _merges(state: bytes) -> list[tuple[str, str]]:
    return [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in json.loads(state)["merges"]]


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """(N, length) token ids, padded with the end token."""
    length = tokenizer.model_max_length
    options: dict[str, Any] = {"padding": "max_length", "max_length": length, "truncation": True}
    ids: Tensor = tokenizer(captions, return_tensors="pt", **options).input_ids
    return ids


def build_clip(config: Config, tokenizer: CLIPTokenizer) -> CLIPModel:
    """The untrained towers."""
    model = dict(config.clip.model)
    text, vision = model.pop("text"), model.pop("vision")
    width = model["projection_dim"]
    text |= {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": config.length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "projection_dim": width,
        "hidden_act": "quick_gelu",
    }
    vision |= {"image_size": config.resolution, "projection_dim": width, "hidden_act": "quick_gelu"}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))


def load_towers(clip: CLIPModel, snapshot: Path) -> None:
    """Take over a base's towers wherever shapes match."""
    text = CLIPTextModel.from_pretrained(snapshot / "text_encoder")
    image = CLIPVisionModelWithProjection.from_pretrained(snapshot / "image_encoder")
    load_matching(clip.text_model, text.state_dict())
    load_matching(clip.vision_model, image.vision_model.state_dict())
    load_matching(clip.visual_projection, image.visual_projection.state_dict())
    load_matching(clip.text_projection, load_file(snapshot / "text_projection" / "model.safetensors"))


def contrast(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """The symmetric contrastive loss of CLIP (Radford et al., arXiv 2103.00020, figure 3) of unit vectors (B, D)."""
    logits = scale * images @ texts.T
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


class ClipObjective(nn.Module):
    """Each picture belongs to its caption among those of the batch, and the other way round."""

    mean: Tensor
    std: Tensor

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip
        self.register_buffer("mean", torch.tensor(OPENAI_CLIP_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses of ``pixels`` (B, 3, n, n) in [0, 1] and ``ids`` (B, length)."""
        with torch.no_grad():
            # The bound that CLIP's authors set.
            self.clip.logit_scale.clamp_(max=float(torch.tensor(_LARGEST_SCALE).log()))
        output = self.clip(input_ids=batch["ids"], pixel_values=(batch["pixels"] - self.mean) / self.std)
        loss = contrast(output.image_embeds, output.text_embeds, self.clip.logit_scale.exp())
        hits = (output.logits_per_image.argmax(dim=1) == torch.arange(len(batch["ids"]), device=loss.device)).float()
        return {"loss": loss, "retrieved": hits.mean()}


class ClipStage:
    """The towers in training."""

    def __init__(self, config: Config, folders: Folders, device: torch.device, rank: int, world: int) -> None:
        torch.manual_seed(config.seed)
        self._device = device
        self._tokenizer = CLIPTokenizer.from_pretrained(folders.snapshot / "tokenizer")
        self._rows = read_rows(folders.scenes, config.resolution, rank=rank, world=world)
        self._ids = tokenize(self._tokenizer, self._rows.captions)
        self._judged = read_rows(folders.judged, config.resolution)
        self._generator = torch.Generator().manual_seed(config.seed + 1 + rank)
        self.part = build_clip(config, self._tokenizer)
        if config.start:
            load_towers(self.part, find_base(config.start).snapshot)
        self.part.to(device)
        if device.type == "cpu":
            # See `unet.UnetStage`: the same holds for so few tokens.
            self.part.set_attn_implementation("eager")
        self.objective = ClipObjective(self.part).to(device)

    def batch(self, size: int) -> dict[str, Tensor]:
        """Random scenes."""
        rows = torch.randint(len(self._ids), (size,), generator=self._generator)
        return {"pixels": self._rows.images(rows).to(self._device), "ids": self._ids[rows].to(self._device)}

    @torch.inference_mode()
    def judge(self, part: nn.Module) -> tuple[dict[str, float], Image.Image]:
        """Retrieval on held-out scenes; and for some captions, the pictures found for each, best first."""
        images, texts = self._embed(part, self._judged)
        return {"retrieval": retrieval(images, texts, _JUDGED)}, self._found(images, texts)

    def _embed(self, part: nn.Module, rows: Rows) -> tuple[Tensor, Tensor]:
        ids = tokenize(self._tokenizer, rows.captions).to(self._device)
        pixels = rows.images(torch.arange(len(ids))).to(self._device)
        pixels = (pixels - self.objective.mean) / self.objective.std
        outputs = [part(input_ids=i, pixel_values=p) for i, p in zip(ids.split(128), pixels.split(128), strict=True)]
        return torch.cat([o.image_embeds for o in outputs]), torch.cat([o.text_embeds for o in outputs])

    def _found(self, images: Tensor, texts: Tensor) -> Image.Image:
        best = (texts[:_SHOWN] @ images.T).topk(min(_SHOWN, len(images))).indices.cpu()
        own = torch.arange(len(best))[:, None]
        return grid(self._judged.images(torch.cat([own, best], dim=1).flatten()), best.shape[1] + 1, zoom=2)


def retrieval(images: Tensor, texts: Tensor, among: int) -> float:
    """Part of the pictures whose own caption is the nearest of `among`, by unit vectors (N, D)."""
    hits = []
    for i, t in zip(images.split(among), texts.split(among), strict=True):
        hits.append((i @ t.T).argmax(dim=1) == torch.arange(len(i), device=i.device))
    return float(torch.cat(hits).float().mean())


def export_clip(config: Config, folders: Folders, weights: dict[str, Tensor]) -> None:
    """Write both towers into the snapshot, in half precision."""
    tokenizer = CLIPTokenizer.from_pretrained(folders.snapshot / "tokenizer")
    clip = build_clip(config, tokenizer)
    clip.load_state_dict(weights)
    text = CLIPTextModel(clip.config.text_config)
    text.load_state_dict(clip.text_model.state_dict())
    image = CLIPVisionModelWithProjection(clip.config.vision_config)
    image.vision_model.load_state_dict(clip.vision_model.state_dict())
    image.visual_projection.load_state_dict(clip.visual_projection.state_dict())
    text.half().save_pretrained(folders.snapshot / "text_encoder")
    image.half().save_pretrained(folders.snapshot / "image_encoder")
    projection = folders.snapshot / "text_projection"
    projection.mkdir(parents=True, exist_ok=True)
    save_file({"weight": clip.text_projection.weight.detach().half()}, projection / "model.safetensors")
