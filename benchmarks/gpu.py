"""SD 1.5's architecture on this machine's GPU, with random weights: a step's time, memory, pictures.

Usage: ``python benchmarks/gpu.py`` (``--smoke`` tries it out on a processor, in miniature). How long a step takes does
not depend on what the weights are, so none are needed. A base of 5.6 GiB is written to a temporary folder.

The share of the peak is the operations of a step's matrix products, convolutions and attention, counted once as they
run, against what the card could do of them in bfloat16 in that time.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice, pairwise
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from group import catalog_scenes
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig
from transformers.utils.logging import disable_progress_bar

from objdrive.adapters.bank import AdapterBank
from objdrive.base.files import find_base
from objdrive.base.prompts import marked_phrase
from objdrive.base.stable_diffusion import Base
from objdrive.sampling.sampler import Layout, SampleSpec, draw_pictures
from objdrive.training.memory import fitting_group_size
from objdrive.training.personalize import FineTuned, personalize
from objdrive.training.recipe import Recipe, make_recipe
from objdrive.training.views import Scene

GIB = 2**30
PEAKS = {
    "H200 NVL": 835.5e12, "H200": 989.4e12, "H100 NVL": 835.5e12, "H100 PCIe": 756e12, "H100": 989.4e12,
    "A100": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12,
}  # fmt: skip
"""Floating-point operations a second by what a card's name contains, the first that fits: NVIDIA's data sheets, tensor
cores in bfloat16 without sparsity."""


@dataclass(frozen=True)
class Size:
    """Of an architecture: the UNet's and the autoencoder's widths, the towers' layers, the groups, timed steps."""

    unet: tuple[int, ...]
    vae: tuple[int, ...]
    layers: int
    groups: tuple[int, ...]
    steps: int
    sample_steps: int


SD15 = Size((320, 640, 1280, 1280), (128, 256, 512, 512), 12, (1, 4, 16), 12, 25)
SMOKE = Size((32, 64, 64, 64), (32, 32, 32, 32), 1, (1, 2), 2, 2)


def write_base(folder: Path, size: Size) -> tuple[Path, Path]:
    """A base in diffusers' layout and the CLIP beside it, with random weights."""
    snapshot, clip = folder / "base", folder / "clip"
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(find_base("tiny64").snapshot / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, projection_dim=768, hidden_act="quick_gelu",
        num_hidden_layers=size.layers, num_attention_heads=12, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, projection_dim=768, num_hidden_layers=2 * size.layers,
        num_attention_heads=16, image_size=224, patch_size=14, hidden_act="quick_gelu",
    )  # fmt: skip
    joint = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=768)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        parts = {
            "unet": UNet2DConditionModel(
                sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=size.unet
            ),
            "vae": AutoencoderKL(
                block_out_channels=size.vae, layers_per_block=2, latent_channels=4, sample_size=512,
                down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            ),
            "text_encoder": CLIPTextModel(text),
        }  # fmt: skip
        CLIPModel(joint).save_pretrained(clip)
    for name, part in parts.items():
        part.save_pretrained(snapshot / name)
    tokenizer.save_pretrained(snapshot / "tokenizer")
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, set_alpha_to_one=False
    ).save_pretrained(snapshot / "scheduler")
    return snapshot, clip


def read_scenes(count: int) -> list[Scene]:
    """So many scenes of one object of the example catalog; its objects again if it has fewer."""
    repeated = islice(cycle(catalog_scenes()), count)
    return [replace(scene, key=f"{scene.key}-{number}") for number, scene in enumerate(repeated)]


def step_operations(base: Base, scene: Scene, recipe: Recipe) -> float:
    """Floating-point operations of a step of one scene: those of twice the steps, less those of the steps."""
    counts = []
    for times in (1, 2):
        with FlopCounterMode(display=False) as counter:
            personalize(base, [scene], recipe.model_copy(update={"steps": times * recipe.steps}))
        counts.append(counter.get_total_flops())
    return (counts[1] - counts[0]) / recipe.steps


def describe_speed(operations: float, seconds: float, card: str) -> str:
    """How fast so many floating-point operations were, and of a known card which share of its peak that is."""
    speed = operations / seconds
    peak = next((peak for name, peak in PEAKS.items() if name in card), None)
    share = f"{speed / peak:.0%} of the card's peak" if peak else "the peak is not known"
    return f"{speed / 1e12:.3g} TFLOP/s, {share}"


def fine_tune(base: Base, scenes: Sequence[Scene], recipe: Recipe, operations: float) -> list[FineTuned]:
    """Fine-tune a group, whose scenes take so many operations a step each; print what a step and its memory take."""
    moments: list[float] = []

    def on_step() -> None:
        _wait()
        moments.append(time.perf_counter())

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    results = personalize(base, scenes, recipe, on_step=on_step)
    tuned = [result for result in results if isinstance(result, FineTuned)]
    step = statistics.median(after - before for before, after in pairwise(moments[-recipe.steps :]))
    peak = torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0
    full = make_recipe().steps
    speed = describe_speed(len(scenes) * operations, step, device_name())
    print(
        f"a group of {len(scenes)}: {step:.3f} s a step, {speed}, at most {peak:.1f} GiB; at {full} steps "
        f"{3600 * len(scenes) / (step * full):.0f} objects an hour, without what comes before and after",
        flush=True,
    )
    return tuned


def draw(base: Base, scenes: Sequence[Scene], tuned: Sequence[FineTuned], recipe: Recipe) -> None:
    """Draw three pictures of each of a few objects; print how long one takes."""
    few = list(zip(scenes, tuned, strict=True))[:4]
    how = {"steps": recipe.sample_steps, "guidance_scale": recipe.guidance_scale}
    with AdapterBank(base.unet, base.family.lora_targets, slots=len(few), rank=recipe.rank) as bank:
        requests = []
        for slot, (scene, result) in enumerate(few):
            bank.load(slot, result.adapters[0].lora)
            phrase = marked_phrase(recipe.phrase, scene.objects[0].class_name)
            embeddings = result.adapters[0].embeddings
            layout = Layout.of([recipe.layout_noise], [scene.objects[0].class_name], [{slot: 1.0}])
            requests += [
                SampleSpec("a photo of {}", seed, (phrase,), (embeddings,), {slot: 1.0}, layout=layout, **how)
                for seed in (1, 2, 3)
            ]
        draw_pictures(base, requests[:1], bank=bank)
        _wait()
        started = time.perf_counter()
        draw_pictures(base, requests, bank=bank)
        _wait()
        seconds = (time.perf_counter() - started) / len(requests)
    print(f"pictures of {base.resolution} x {base.resolution}, {recipe.sample_steps} steps: {seconds:.2f} s each")


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "a processor"


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--smoke", action="store_true", help="in miniature: tries it all out")
    size = SMOKE if options.parse_args().smoke else SD15
    changes = [f"steps={size.steps}", "class_pool=1", f"sample_steps={size.sample_steps}", "prototype_steps=3"]
    recipe = make_recipe(overrides=changes)
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        snapshot, clip = write_base(Path(folder), size)
        base = Base.load(str(snapshot), clip=str(clip))
        fits = fitting_group_size(base, recipe)
        print(f"{device_name()}, torch {torch.__version__}; groups that fit: {fits}", flush=True)
        operations = step_operations(base, read_scenes(1)[0], recipe)
        print(f"a step of one scene: {operations / 1e12:.3g} TFLOP", flush=True)
        for count in sorted({*size.groups, *([fits] if torch.cuda.is_available() else [])}):
            scenes = read_scenes(count)
            tuned = fine_tune(base, scenes, recipe, operations)
        draw(base, scenes, tuned, recipe)


if __name__ == "__main__":
    main()
