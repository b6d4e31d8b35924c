"""Artifacts of objects that nobody fine-tuned, for benchmarks that need a store and no pictures of worth."""

from typing import Any

from objdrive.adapters.artifact import ArtifactMetadata, BaseRef, SceneMember, SourceRecord, Sources


def metadata_of(
    object_id: str, digest: str, *, token: str, class_name: str = "teapot", **about: Any
) -> ArtifactMetadata:
    """What an artifact says of itself: as little as it must, and `about`."""
    fields: dict[str, Any] = {
        "base": BaseRef(id="none", fingerprint=""),
        "recipe": {},
        "recipe_digest": "",
        "method_version": 0,
        "metrics": {},
        "sources": Sources(image=SourceRecord(uri="", size=0, mark="")),
        "versions": {},
        "created": "",
    }
    return ArtifactMetadata(
        object_id=object_id,
        class_name=class_name,
        token=token,
        phrase=token,
        digest=digest,
        members=[SceneMember(object_id=object_id, class_name=class_name, token=token)],
        **fields | about,
    )
