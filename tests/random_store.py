"""A store of random adapters, strong enough that each changes every picture."""

import hashlib
import io

import torch
from PIL import Image

from objdrive.adapters.adapter import Adapter, adapter_files
from objdrive.adapters.artifact import ArtifactMetadata, BaseRef, Preview, SceneMember, SourceRecord, Sources
from objdrive.adapters.bank import AdapterBank

RANK = 4
STEPS = 2
SECRET = Sources(image=SourceRecord(uri="s3://inside/secret.png", size=1, mark="m"))
PREVIEWS = {"input": "input", "picture": "a photo of {} on grass"}


def digest_of(object_id, version=0):
    """The digest of a version of an object."""
    return hashlib.sha256(f"{object_id}:{version}".encode()).hexdigest()[:32]


def random_adapter(base, object_id, version=0):
    """An adapter of all the layers that a bank adapts."""
    generator = torch.Generator().manual_seed(int(digest_of(object_id, version)[:8], 16))
    with AdapterBank(base.unet, base.family.lora_targets, slots=1, rank=RANK) as bank:
        bank.initialise(0, generator)
        lora = {
            key: 0.3 * torch.randn(value.shape, generator=generator) if "lora_B" in key else value
            for key, value in bank.export(0).items()
        }
    width = base.vocabularies["clip_l"].shape[1]
    return Adapter(lora, {"clip_l": torch.randn(width, generator=generator)})


def metadata_of(
    object_id, base, *, version=0, class_name="mug", row=None, fingerprint=None, previews=None, sources=SECRET
):
    """What an artifact of that object says of itself."""
    token = f"<{object_id}>"
    return ArtifactMetadata(
        object_id=object_id,
        class_name=class_name,
        token=token,
        phrase=token,
        digest=digest_of(object_id, version),
        members=[SceneMember(object_id=object_id, class_name=class_name, token=token)],
        base=BaseRef(id="small", fingerprint=fingerprint or base.fingerprint),
        recipe={"sample_steps": STEPS, "guidance_scale": 3.0},
        recipe_digest="r",
        method_version=1,
        metrics={"loss": 0.5},
        sources=sources,
        previews=[
            Preview(file=f"previews/{number}.webp", kind=kind, caption=caption)
            for number, (kind, caption) in enumerate((previews or {}).items())
        ],
        row=row or {},
        versions={},
        created="2026-11-22T18:45:00+00:00",
    )


def commit(store, base, object_id, *, version=0, previews=PREVIEWS, **about):
    """Commit a random artifact and make it the object's current one; returns its digest.

    `previews` are captions by kind.
    """
    metadata = metadata_of(object_id, base, version=version, previews=previews, **about)
    files = adapter_files(random_adapter(base, object_id, version), token=metadata.token, family=base.family)
    for number, preview in enumerate(metadata.previews):
        files[preview.file] = _webp((50 * number, 100, 150))
    store.commit(files, metadata)
    return metadata.digest


def _webp(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "WEBP")
    return buffer.getvalue()
