"""CLIP towers: text encoders with learned vectors at their input, and the spaces that they share with image towers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

from objdrive.base.prompts import TokenizedPrompt


@dataclass
class JointSpace:
    """A space in which texts and pictures are compared.

    Attributes:
        text: the text tower, whole. It may be longer than the encoder that a base conditions on.
        projection: of its pooled output into the space; None: the tower has its own.
        image: the image tower, with its projection.
    """

    text: CLIPTextModel | CLIPTextModelWithProjection
    projection: nn.Linear | None
    image: CLIPVisionModelWithProjection


@dataclass
class Tower:
    """A text encoder of a base.

    Attributes:
        name: by which learned embeddings are kept.
        tokenizer: of its prompts.
        encoder: as the base conditions on it.
        joint: what it shares with an image tower; None: there is none at hand.
    """

    name: str
    tokenizer: CLIPTokenizer
    encoder: CLIPTextModel | CLIPTextModelWithProjection
    joint: JointSpace | None

    @property
    def vocabulary(self) -> Tensor:
        """(V, d): the input embeddings of all tokens."""
        weight: Tensor = self.encoder.get_input_embeddings().weight
        return weight

    def encode(self, prompts: Sequence[TokenizedPrompt], vectors: Sequence[Tensor], *, hidden: bool = False) -> Any:
        """The encoder's output for N prompts, with (d,) vectors at the learned tokens' places, over all in order.

        Args:
            prompts: N of them.
            vectors: they are put in at the encoder's input; its vocabulary is not touched.
            hidden: whether the output has the states of all layers.
        """
        return self._run(self.encoder, *self._tensors(prompts, vectors), hidden)

    def encode_tokens(self, ids: Tensor, learned: Tensor, vectors: Tensor, *, hidden: bool = False) -> Any:
        """The encoder's output for N prompts; see `objdrive.base.stable_diffusion.Base.encode_tokens`.

        Args:
            ids: (N, L); below 0 where a prompt is padded.
            learned: (N, L), which of the vectors stands in each place; -1: none.
            vectors: (E, d).
            hidden: whether the output has the states of all layers.
        """
        return self._run(self.encoder, ids, learned, vectors, hidden)

    def embed(self, prompts: Sequence[TokenizedPrompt], vectors: Sequence[Tensor]) -> Tensor:
        """(N, D), float32: the prompts in the joint space; arguments as for `encode`.

        Raises:
            ValueError: there is no joint space.
        """
        if self.joint is None:
            raise ValueError(f"the text encoder {self.name!r} has no image tower at hand")
        output = self._run(self.joint.text, *self._tensors(prompts, vectors), False)
        projection = self.joint.projection
        embedded: Tensor = output.text_embeds if projection is None else projection(output.pooler_output)
        return embedded.float()

    def _tensors(self, prompts: Sequence[TokenizedPrompt], vectors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments of `encode_tokens`."""
        places = [(row, place) for row, prompt in enumerate(prompts) for place in prompt.places]
        if len(places) != len(vectors):
            raise ValueError(f"the prompts have {len(places)} places for learned tokens, got {len(vectors)} embeddings")
        ids = padded_ids(prompts, self.tokenizer.model_max_length)
        learned = torch.full_like(ids, -1)
        for number, place in enumerate(places):
            learned[place] = number
        device = self.vocabulary.device
        stacked = torch.stack(list(vectors)) if vectors else self.vocabulary[:0]
        return ids.to(device), learned.to(device), stacked

    def _run(self, encoder: Any, ids: Tensor, learned: Tensor, vectors: Tensor, hidden: bool) -> Any:
        padded = ids.masked_fill(ids < 0, self.tokenizer.pad_token_id)
        if not len(vectors):
            return encoder(padded, output_hidden_states=hidden)

        def put_in(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return torch.where(learned[..., None] >= 0, vectors.to(output)[learned.clamp(min=0)], output)

        hook = encoder.get_input_embeddings().register_forward_hook(put_in)
        try:
            return encoder(padded, output_hidden_states=hidden)
        finally:
            hook.remove()


def padded_ids(prompts: Sequence[TokenizedPrompt], length: int) -> Tensor:
    """(N, length) ids of N prompts; -1 beyond a prompt's end."""
    return torch.tensor([[*prompt.ids, *[-1] * (length - len(prompt.ids))] for prompt in prompts])
