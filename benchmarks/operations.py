"""How many operations a training step and a step of drawing launch, by kind: what a fast GPU waits for.

Usage: ``python benchmarks/operations.py``. Counts on a processor, on a network with Stable Diffusion 1.5's layers and a
few channels: how many operations there are depends on neither widths nor device. Views launch nothing and don't count.
"""

import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from group import catalog_scenes
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig
from transformers.utils.logging import disable_progress_bar

from objdrive.adapters.bank import AdapterBank
from objdrive.base.files import find_base
from objdrive.base.stable_diffusion import Base
from objdrive.sampling.sampler import SampleSpec, draw_latents
from objdrive.training.personalize import personalize
from objdrive.training.recipe import Recipe, make_recipe
from objdrive.training.views import Scene

_NOTHING = ("aten::detach", "aten::empty", "aten::_unsafe_view", "aten::lift_fresh", "aten::_local_scalar_dense")
"""Not views, and yet no work for a device's kernels."""


class Launches(TorchDispatchMode):
    """Counts the operations that run meanwhile, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count it unless it only looks at its input."""
        name = func._schema.name
        if not func.is_view and not name.startswith(_NOTHING):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def count(work: Callable[[int], object], steps: int) -> Counter[str]:
    """What `work` of so many steps more launches, for each of them."""
    counts = []
    for times in (1, 2):
        with Launches() as launches:
            work(times * steps)
        counts.append(launches.counts)
    return Counter({name: number / steps for name, number in (counts[1] - counts[0]).items()})


def write_base(folder: Path) -> Base:
    """SD 1.5's layers in a few channels, in bfloat16 as on a GPU."""
    snapshot, clip = folder / "base", folder / "clip"
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(find_base("tiny64").snapshot / "tokenizer")
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "projection_dim": 16}
    text = CLIPTextConfig(vocab_size=len(tokenizer), num_hidden_layers=12, eos_token_id=tokenizer.eos_token_id, **size)
    vision = CLIPVisionConfig(image_size=32, patch_size=16, num_hidden_layers=1, **size)
    parts = {
        "unet": UNet2DConditionModel(
            sample_size=8, cross_attention_dim=16, attention_head_dim=2, block_out_channels=(8,) * 4, norm_num_groups=4
        ),
        "vae": AutoencoderKL(
            block_out_channels=(32,) * 4, latent_channels=4, sample_size=64,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        ),
        "text_encoder": CLIPTextModel(text),
    }  # fmt: skip
    CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    ).save_pretrained(clip)
    for name, part in parts.items():
        part.save_pretrained(snapshot / name)
    tokenizer.save_pretrained(snapshot / "tokenizer")
    DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
        snapshot / "scheduler"
    )
    return Base.load(str(snapshot), clip=str(clip), device="cpu", dtype=torch.bfloat16)


def training_step(base: Base, scenes: Sequence[Scene], recipe: Recipe) -> Counter[str]:
    """Operations of one step of a group."""
    return count(lambda steps: personalize(base, scenes, recipe.model_copy(update={"steps": steps})), 8)


def drawing_step(base: Base, objects: int) -> Counter[str]:
    """Operations of one step of a picture of each of so many objects; 0: one picture by the base alone."""
    specs = [
        SampleSpec("a photo of {}", slot, ("a mug",), (), {slot: 1.0} if objects else {}, steps=1, guidance_scale=7.5)
        for slot in range(max(1, objects))
    ]
    with AdapterBank(base.unet, base.family.lora_targets, slots=max(1, objects), rank=8) as bank:
        for slot in range(objects):
            bank.initialise(slot, torch.Generator().manual_seed(slot))

        for steps in (4, 8):
            # What a way's steps do is worked out once for all pictures, on the CPU.
            base.noise.stepper("ddim", steps)

        def draw(steps: int) -> Any:
            return draw_latents(base, [_with_steps(spec, steps) for spec in specs], bank=bank)

        return count(draw, 4)


def _with_steps(spec: SampleSpec, steps: int) -> SampleSpec:
    return SampleSpec(
        spec.prompt, spec.seed, spec.phrases, spec.embeddings, spec.slots, steps=steps, guidance_scale=7.5
    )


def main() -> None:
    disable_progress_bar()
    recipe = make_recipe(overrides=["prototype_steps=1", "mend_masks=false"])
    with tempfile.TemporaryDirectory() as folder:
        base = write_base(Path(folder))
        scenes = catalog_scenes()[:4]
        counts = {
            "training, 1 scene": training_step(base, scenes[:1], recipe),
            "training, 4 scenes": training_step(base, scenes, recipe),
            "drawing, the base alone": drawing_step(base, 0),
            "drawing, 8 objects": drawing_step(base, 8),
        }
    for what, launched in counts.items():
        print(f"{what}: {launched.total():,.0f} operations a step")
        print(
            "    "
            + ", ".join(f"{name.removeprefix('aten::')} {number:.0f}" for name, number in launched.most_common(12))
        )


if __name__ == "__main__":
    main()
