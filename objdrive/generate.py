"""Draw pictures of a store's objects."""

from collections.abc import Sequence

from PIL import Image

from objdrive.adapters.adapter import parse_adapter
from objdrive.adapters.artifact import ArtifactMetadata
from objdrive.adapters.bank import AdapterBank
from objdrive.adapters.store import ArtifactStore
from objdrive.base.prompts import marked_phrase
from objdrive.base.sizes import Size
from objdrive.base.stable_diffusion import Base
from objdrive.base.steppers import SchedulerName
from objdrive.errors import ObjdriveError
from objdrive.sampling.sampler import Layout, SampleSpec, draw_pictures
from objdrive.training.recipe import drawing_recipe


def generate(
    store: ArtifactStore,
    object_id: str,
    prompt: str,
    *,
    seeds: Sequence[int],
    negative_prompt: str = "",
    steps: int | None = None,
    guidance_scale: float | None = None,
    base: str | None = None,
    clip: str | None = None,
    vae: str | None = None,
    size: Size | None = None,
    scheduler: SchedulerName = "ddim",
) -> list[Image.Image]:
    """Draw one picture per seed of an object's current artifact.

    Args:
        store: where the artifact is.
        object_id: of what.
        prompt: with ``{}`` where the object stands.
        seeds: of the starting noise.
        negative_prompt: what guidance leads away from.
        steps: of the scheduler; default: the recipe's.
        guidance_scale: default: the recipe's.
        base: name of the base; default: the one that the artifact notes.
        clip: see `objdrive.base.files.find_base`.
        vae: see `objdrive.base.files.find_base`.
        size: width and height in pixels; default: the base's native square.
        scheduler: which solver.

    Raises:
        ObjdriveError: no such object, a damaged artifact, another base, a prompt without ``{}``, or a number that
            is out of range.
    """
    if not seeds:
        raise ObjdriveError("asked for no pictures: --n must be at least 1")
    if any(seed.bit_length() > 63 for seed in seeds):
        raise ObjdriveError(f"the seeds {seeds[0]} to {seeds[-1]} must fit 63 bits: choose smaller ones")
    metadata, files = store.read(object_id)
    recipe = drawing_recipe(metadata.recipe, object_id, steps=steps, guidance_scale=guidance_scale)
    loaded = _matching_base(metadata, base, clip, vae)
    adapter = parse_adapter(files, token=metadata.token, family=loaded.family)
    phrase = marked_phrase(metadata.phrase, metadata.class_name, token=metadata.token)
    with AdapterBank(loaded.unet, loaded.family.lora_targets, slots=1, rank=adapter.rank) as bank:
        bank.load(0, adapter.lora, least_rank=metadata.least_rank)
        specs = [
            SampleSpec(
                prompt,
                seed,
                (phrase,),
                (adapter.embeddings,),
                {0: 1.0},
                negative_prompt=negative_prompt,
                layout=Layout.of([metadata.layout_noise], [metadata.class_name], [{0: 1.0}]),
                steps=recipe.sample_steps,
                guidance_scale=recipe.guidance_scale,
                scheduler=scheduler,
                size=size,
            )
            for seed in seeds
        ]
        return draw_pictures(loaded, specs, bank=bank)


def _matching_base(metadata: ArtifactMetadata, name: str | None, clip: str | None, vae: str | None) -> Base:
    base = Base.load(name or metadata.base.id, clip=clip, vae=vae)
    if base.fingerprint != metadata.base.fingerprint:
        raise ObjdriveError(
            f"the artifact of {metadata.object_id!r} was made on the base {metadata.base.id!r} with the fingerprint "
            f"{metadata.base.fingerprint}, {base.name!r} has {base.fingerprint}: name the right one with --base"
        )
    return base
