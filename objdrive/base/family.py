"""What a family of bases sets for its adapters and drawings: text encoders, layers with LoRA, sizes, what suits it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from objdrive.errors import ObjdriveError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Family:
    """Bases of one architecture, whose adapters have the same layers and the same names in files.

    Attributes:
        name: for messages.
        parts: the folders of a snapshot that a base is loaded from.
        text_encoders: the names of the text encoders, by which learned embeddings are kept.
        sized: whether its network is told sizes, crops and pooled states (arXiv 2307.01952).
        size_step: widths and heights of pictures are multiples of this, in pixels.
        checkpointing: whether fine-tunes compute activations anew in the backward pass, which takes a third more time
            and keeps far less memory.
        lora_targets: ends of the names of the network's layers that get LoRA.
        lora_prefix: what stock diffusers expects before those names in a file.
        tuning: fields of a recipe that suit the family (see `objdrive.training.recipe.make_recipe`).
    """

    name: str
    parts: tuple[str, ...]
    text_encoders: tuple[str, ...]
    sized: bool
    size_step: int
    checkpointing: bool
    lora_targets: tuple[str, ...]
    lora_prefix: str
    tuning: Mapping[str, Any] = field(hash=False)

    def embedding_tensors(self, embeddings: "Mapping[str, Tensor]", token: str) -> "dict[str, Tensor]":
        """The tensors of an embedding file by name, as diffusers' ``load_textual_inversion`` reads them.

        With one text encoder the token is the name. With several their names are, as diffusers' SDXL scripts write
        them, and the vectors are (1, d).

        Args:
            embeddings: vectors (d,) by text encoder.
            token: what stands for the object in prompts.

        Raises:
            ObjdriveError: the vectors are not those of the family's text encoders.
        """
        self._check_names("embeddings are for", embeddings, self.text_encoders)
        if len(self.text_encoders) == 1:
            return {token: embeddings[self.text_encoders[0]]}
        return {encoder: embeddings[encoder][None] for encoder in self.text_encoders}

    def read_embeddings(self, tensors: "Mapping[str, Tensor]", token: str) -> "dict[str, Tensor]":
        """The vectors (d,) by text encoder that an embedding file holds, the inverse of `embedding_tensors`.

        Raises:
            ObjdriveError: the file holds other tokens, other text encoders, or several vectors for one.
        """
        if len(self.text_encoders) == 1:
            self._check_names("embedding file holds tokens", tensors, (token,))
            return {self.text_encoders[0]: tensors[token]}
        self._check_names("embedding file holds", tensors, self.text_encoders)
        for encoder, rows in tensors.items():
            if rows.dim() != 2 or len(rows) != 1:
                raise ObjdriveError(
                    f"the embedding file holds a tensor of shape {tuple(rows.shape)} for {encoder!r}, expected one row"
                )
        return {encoder: rows[0] for encoder, rows in tensors.items()}

    def _check_names(self, what: str, given: "Mapping[str, Tensor]", expected: tuple[str, ...]) -> None:
        if set(given) != set(expected):
            names = " and ".join(map(repr, expected))
            raise ObjdriveError(f"the {what} {sorted(given)}, expected only {names}")


_LORA_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    *("conv1", "conv2", "conv_shortcut"),
)
"""The UNet's transformers, and the convolutions of its residual blocks."""
_PARTS = ("text_encoder", "tokenizer", "unet", "vae", "scheduler")

STABLE_DIFFUSION = Family(
    name="Stable Diffusion",
    parts=_PARTS,
    text_encoders=("clip_l",),
    sized=False,
    size_step=8,
    checkpointing=False,
    lora_targets=_LORA_TARGETS,
    lora_prefix="unet.",
    # Common practice for SD 1.5; not tuned on it.
    tuning={"steps": 400, "lora_lr": 3e-4, "embedding_lr": 1e-3, "sample_steps": 25, "guidance_scale": 7.5},
)
"""Stable Diffusion 1.x and 2.x."""

STABLE_DIFFUSION_XL = Family(
    name="Stable Diffusion XL",
    parts=(*_PARTS, "text_encoder_2", "tokenizer_2"),
    text_encoders=("clip_l", "clip_g"),
    sized=True,
    size_step=64,
    checkpointing=True,
    lora_targets=_LORA_TARGETS,
    lora_prefix="unet.",
    # Rates of diffusers' SDXL scripts and its pipeline's guidance; not tuned on it.
    tuning={"steps": 400, "lora_lr": 1e-4, "embedding_lr": 3e-4, "sample_steps": 25, "guidance_scale": 5.0},
)
"""Stable Diffusion XL, without its refiner."""
