"""What a server needs to know: one model for one machine and for a cluster."""

import secrets
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from objdrive.adapters.store import ArtifactStore
from objdrive.errors import ObjdriveError

_LEAST_SECRET_BYTES = 32
Count = Annotated[int, Field(ge=1)]


class Settings(BaseModel):
    """Settings of a server.

    Attributes:
        store: the store's address.
        base: name of the base; empty: the one that the store's first object notes.
        clip: see `objdrive.base.find_base`.
        api_keys: file of the API keys (see `serve.auth`).
        no_auth: ask for no keys; requests are then answered only if they come from this machine.
        signing_key_file: file with the secret that links are signed with, at least 32 bytes; by default a random one,
            so that links end with the deployment.
        public_url: the server's address as clients see it, where a proxy stands between.
        draw_seconds: how long a picture may take.
        batch_size: pictures in a denoising step.
        slots: adapters on the device; more than one request names.
        rank: the highest rank of an adapter.
        host_mib: adapters in host memory.
        queue_limit: requests that wait, for each generator.
        threads: of PyTorch on the CPU; None: its own choice.
        generators: on a cluster, how many replicas draw, as MIN or MIN:MAX.
        refresh_seconds: between two looks at which objects there are, for the catalog's pages.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    store: Annotated[str, Field(min_length=1)]
    base: str = ""
    clip: str | None = None
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
    generators: Annotated[str, Field(pattern=r"^[1-9][0-9]*(:[1-9][0-9]*)?$")] = "1:4"
    refresh_seconds: Annotated[float, Field(gt=0)] = 30.0

    @classmethod
    def of(cls, **values: object) -> "Settings":
        """Check settings.

        Raises:
            ObjdriveError: a name is not known, or a value is not right.
        """
        try:
            settings = cls.model_validate(values)
        except ValidationError as error:
            raise ObjdriveError(f"the server's settings are not right: {error}") from error
        if (settings.api_keys is None) is not settings.no_auth:
            raise ObjdriveError("give either a file of API keys (api_keys) or no_auth, which answers this machine only")
        return settings

    def open_store(self) -> ArtifactStore:
        """The store to serve from; a local one whose folder is away can't be reached, and is not empty."""
        return ArtifactStore(self.store, must_exist=True)

    def base_name(self) -> str:
        """The base to draw with.

        Raises:
            ObjdriveError: none is named, and the store has no object that notes one.
        """
        if self.base:
            return self.base
        store = ArtifactStore(self.store)
        for object_id in store.object_ids():
            artifact = store.current(object_id)
            if artifact is not None:
                return artifact.base.id
        raise ObjdriveError(f"{store.url} has no objects yet: name the base that pictures are to be drawn with")

    def signing_secret(self) -> bytes:
        """What links are signed with.

        Raises:
            ObjdriveError: the file can't be read, or is too short to be a secret.
        """
        if self.signing_key_file is None:
            return secrets.token_bytes(_LEAST_SECRET_BYTES)
        try:
            secret = self.signing_key_file.read_bytes().strip()
        except OSError as error:
            raise ObjdriveError(f"the signing key can't be read: {error}") from error
        if len(secret) < _LEAST_SECRET_BYTES:
            raise ObjdriveError(
                f"{self.signing_key_file} holds {len(secret)} bytes, a signing key has at least {_LEAST_SECRET_BYTES}"
            )
        return secret
