"""What a family of bases sets for its adapters: text encoders, layers with LoRA, names in files."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from objdrive.errors import ObjdriveError


@dataclass(frozen=True)
class Family:
    """Bases of one architecture, whose adapters have the same layers and the same names in files.

    Attributes:
        text_encoder: the name of the text encoder, by which learned embeddings are kept.
        lora_targets: ends of the names of the network's layers that get LoRA.
        lora_prefix: what stock diffusers expects before those names in a file.
    """

    text_encoder: str
    lora_targets: tuple[str, ...]
    lora_prefix: str

    def embedding_tensors(self, embeddings: Mapping[str, Tensor], token: str) -> dict[str, Tensor]:
        """The tensors of an embedding file by name, as diffusers' ``load_textual_inversion`` reads them.

        Args:
            embeddings: vectors (d,) by text encoder.
            token: what stands for the object in prompts.

        Raises:
            ObjdriveError: the vectors are not those of the family's text encoders.
        """
        if set(embeddings) != {self.text_encoder}:
            raise ObjdriveError(f"the embeddings are for {sorted(embeddings)}, expected only {self.text_encoder!r}")
        return {token: embeddings[self.text_encoder]}

    def read_embeddings(self, tensors: Mapping[str, Tensor], token: str) -> dict[str, Tensor]:
        """The vectors (d,) by text encoder that an embedding file holds, the inverse of `embedding_tensors`.

        Raises:
            ObjdriveError: the file holds other tokens.
        """
        if set(tensors) != {token}:
            raise ObjdriveError(f"the embedding file holds tokens {sorted(tensors)}, expected only {token!r}")
        return {self.text_encoder: tensors[token]}


STABLE_DIFFUSION = Family(
    text_encoder="clip_l",
    lora_targets=(
        *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
        *("conv1", "conv2", "conv_shortcut"),
    ),
    lora_prefix="unet.",
)
"""Stable Diffusion 1.x and 2.x. LoRA is on the UNet's transformers, and on the convolutions of its residual blocks."""
