"""Objects an hour on this machine against stock diffusers and peft: DreamBooth-LoRA, one object after another.

Usage: ``python benchmarks/stock.py``. The stock loop is our own few lines on the public API of diffusers and peft, and
trains as diffusers' ``train_dreambooth_lora.py`` does: one image a step, the loss of the whole picture, no picture of
the class. Both run in this process, on the same base and objects, with as many steps; what comes before the first step
counts.
"""

import argparse
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline
from group import catalog_scenes
from peft import LoraConfig
from transformers.utils.logging import disable_progress_bar

from objdrive.base.stable_diffusion import Base
from objdrive.training.personalize import personalize
from objdrive.training.recipe import make_recipe
from objdrive.training.views import Scene, main_picture, to_pixels


def stock_fine_tune(base: Base, scene: Scene, steps: int, rank: int) -> None:
    """One DreamBooth-LoRA."""
    pipe = StableDiffusionPipeline.from_pretrained(base.files.snapshot, torch_dtype=torch.float32)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    unet, vae, text_encoder = pipe.unet, pipe.vae, pipe.text_encoder
    for part in (unet, vae, text_encoder):
        part.requires_grad_(False)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets))
    optimizer = torch.optim.AdamW([value for value in unet.parameters() if value.requires_grad], lr=1e-4)
    pixels = to_pixels(base, [main_picture(base, scene, make_recipe("dreambooth"))])
    prompt = pipe.tokenizer(
        f"a photo of sks {scene.objects[0].class_name}", padding="max_length", return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        latents = vae.encode(pixels * 2 - 1).latent_dist.sample() * vae.config.scaling_factor
        states = text_encoder(prompt)[0]
    for _ in range(steps):
        noise = torch.randn_like(latents)
        timestep = torch.randint(0, scheduler.config.num_train_timesteps, (1,))
        predicted = unet(scheduler.add_noise(latents, noise, timestep), timestep, states).sample
        velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(latents, noise, timestep) if velocity else noise
        F.mse_loss(predicted, target).backward()
        optimizer.step()
        optimizer.zero_grad()


def ours(base: Base, scenes: Sequence[Scene], steps: int) -> None:
    """All of them as one group, by the default recipe."""
    personalize(base, scenes, make_recipe(tuning=base.files.tuning, overrides=[f"steps={steps}"]))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--steps", type=int, default=300)
    options.add_argument("--objects", type=int, default=8)
    options.add_argument("--threads", type=int, default=1)
    arguments = options.parse_args()
    disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    base, scenes = Base.load("tiny64", device="cpu"), catalog_scenes()[: arguments.objects]
    print(f"{arguments.threads} thread(s), {arguments.steps} steps, {len(scenes)} objects; processor time")
    started = time.process_time()
    for scene in scenes:
        stock_fine_tune(base, scene, arguments.steps, make_recipe().rank)
    middle = time.process_time()
    ours(base, scenes, arguments.steps)
    seconds = [middle - started, time.process_time() - middle]
    for name, took in zip(("stock, one after another", "objdrive, one group"), seconds, strict=True):
        print(f"{name}: {3600 * len(scenes) / took:.0f} objects an hour and core")
    print(
        f"objdrive / stock: {seconds[0] / seconds[1]:.2f}, with three samples a step, and the base's own, against one"
    )


if __name__ == "__main__":
    main()
