"""The base that a run was planned for, on a worker."""

from typing import Any

from objdrive.base.stable_diffusion import Base
from objdrive.errors import ObjdriveError


def load_planned(name: str, fingerprint: str, **options: Any) -> Base:
    """Load a base, with `Base.load`'s options.

    Raises:
        ObjdriveError: the base here is not the one that the run was planned for.
    """
    base = Base.load(name, **options)
    if base.fingerprint != fingerprint:
        raise ObjdriveError(
            f"the base {name!r} on this node has the fingerprint {base.fingerprint}, the run was planned for "
            f"{fingerprint}: give all nodes the same base"
        )
    return base
