"""A server's settings, the same for one machine and for a cluster."""

import secrets
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from objdrive.adapters.store import ArtifactStore
from objdrive.errors import ObjdriveError

_LEAST_SECRET_BYTES = 32
Count = Annotated[int, Field(ge=1)]


def _pairs(value: object) -> object:
    """A mapping of text such as ``a=b,c=d``."""
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",") if part]
    if not all(name and target for name, _, target in pairs):
        raise ValueError(f"{value!r} must be NAME=MODEL, several with commas between them")
    return {name: target for name, _, target in pairs}


class Settings(BaseModel):
    """Settings of a server.

    Attributes:
        store: the store's address.
        base: name of the base; empty: the one that the store's first object was fine-tuned on.
        clip: see `objdrive.base.files.find_base`.
        vae: see `objdrive.base.files.find_base`.
        api_keys: file of the API keys (see `serve.auth`).
        no_auth: ask for no keys; only this machine's own requests are then answered.
        signing_key_file: file with the secret that signs links, at least 32 bytes; by default the secret is random,
            and links end with the deployment.
        public_url: the server's address as clients see it, if there is a proxy between.
        draw_seconds: a picture's time limit.
        batch_size: pictures in one denoising step, at most.
        slots: adapters on the device at once; at least as many as a request may name (4).
        rank: the highest rank that an adapter may have.
        host_mib: host memory for adapters, in MiB.
        queue_limit: requests that may wait for each generator; others are refused with 429.
        threads: PyTorch's threads on the CPU; None: as many as a short measurement at the start finds fastest.
        generators: on a cluster, the number of replicas that draw, as MIN or MIN:MAX. 0:MAX keeps none, and no GPU,
            while nothing is asked; the first request then waits until one has started.
        ingress: on a cluster, the number of replicas that answer HTTP, as MIN or MIN:MAX.
        model_aliases: other names of models, and what each stands for: an object's id, several as `a+b`, or `base` for
            the base alone. As a mapping, or as text such as ``gpt-image-1=base,dall-e-3=teapot-02``.
        refresh_seconds: time between two listings of the store, for the catalog's pages.
        metrics: whether a server on one machine answers `/metrics`.
        connections: of a server on one machine, at most; further ones are answered with 503.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    store: Annotated[str, Field(min_length=1)]
    base: str = ""
    clip: str | None = None
    vae: str | None = None
    api_keys: Path | None = None
    no_auth: bool = False
    signing_key_file: Path | None = None
    public_url: str = ""
    draw_seconds: Annotated[float, Field(gt=0)] = 120.0
    batch_size: Count = 8
    slots: Annotated[int, Field(ge=4)] = 32
    rank: Count = 16
    host_mib: Annotated[int, Field(ge=0)] = 1024
    queue_limit: Count = 64
    threads: Count | None = None
    generators: Annotated[str, Field(pattern=r"^([1-9][0-9]*|[0-9]+:[1-9][0-9]*)$")] = "1:4"
    ingress: Annotated[str, Field(pattern=r"^[1-9][0-9]*(:[1-9][0-9]*)?$")] = "1"
    model_aliases: Annotated[dict[str, str], BeforeValidator(_pairs)] = {}
    refresh_seconds: Annotated[float, Field(gt=0)] = 30.0
    metrics: bool = True
    connections: Count = 1000

    @classmethod
    def of(cls, **values: object) -> "Settings":
        """Check settings.

        Raises:
            ObjdriveError: a setting is unknown, or its value is not allowed.
        """
        try:
            settings = cls.model_validate(values)
        except ValidationError as error:
            raise ObjdriveError(f"the server's settings are wrong: {error}") from error
        if (settings.api_keys is None) is not settings.no_auth:
            raise ObjdriveError("give either a file of API keys (api_keys) or no_auth, which answers this machine only")
        return settings

    def open_store(self) -> ArtifactStore:
        """The store to serve from. A missing local folder is an unreachable store, not an empty one."""
        return ArtifactStore(self.store, must_exist=True)

    def base_name(self) -> str:
        """The base to draw with.

        Raises:
            ObjdriveError: the settings name none, and the store has no object.
        """
        if self.base:
            return self.base
        store = ArtifactStore(self.store)
        for object_id in store.object_ids():
            artifact = store.current(object_id)
            if artifact is not None:
                return artifact.base.id
        raise ObjdriveError(f"{store.url} has no objects yet: name the base to draw with")

    def signing_secret(self) -> bytes:
        """The secret that links are signed with.

        Raises:
            ObjdriveError: the file can't be read, or is too short.
        """
        if self.signing_key_file is None:
            return secrets.token_bytes(_LEAST_SECRET_BYTES)
        try:
            secret = self.signing_key_file.read_bytes().strip()
        except OSError as error:
            raise ObjdriveError(f"the signing key file can't be read: {error}") from error
        if len(secret) < _LEAST_SECRET_BYTES:
            raise ObjdriveError(
                f"{self.signing_key_file} holds {len(secret)} bytes: a signing key needs at least {_LEAST_SECRET_BYTES}"
            )
        return secret
