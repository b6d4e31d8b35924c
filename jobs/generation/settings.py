"""How a run draws and where its pictures go."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import get_args

from jobs.drawing import PlannedBase
from objdrive.base.sizes import Size
from objdrive.pictures import PictureFormat
from objdrive.sampling.exact import AROUND_VERSION, Place

FORMATS: tuple[PictureFormat, ...] = get_args(PictureFormat)
PICTURES = "pictures"
INDEX = "index"


@dataclass(frozen=True)
class GenerationSettings:
    """What all pictures of a run have in common.

    Attributes:
        base: what draws.
        store: the address of the objects' artifacts.
        out: the address that pictures, index and report go to.
        format: of the pictures' files.
        negative_prompt: what guidance leads away from.
        size: width and height of the pictures; none: the base's native square.
        place: where an object stands that keeps its own pixels; none: objects are drawn.
        scored: whether pictures are measured.
    """

    base: PlannedBase
    store: str
    out: str
    format: PictureFormat
    negative_prompt: str = ""
    size: Size | None = None
    place: Place | None = None
    scored: bool = False


@dataclass(frozen=True)
class PlannedPicture:
    """One picture to draw, as the plan has it.

    Attributes:
        object_id: of what.
        digest: the artifact that draws it.
        class_name: the object's class word.
        prompt_id: which prompt.
        prompt: its text.
        seed: of the starting noise.
        steps: of DDIM.
        guidance_scale: of classifier-free guidance.
    """

    object_id: str
    digest: str
    class_name: str
    prompt_id: str
    prompt: str
    seed: int
    steps: int
    guidance_scale: float

    def key(self, settings: GenerationSettings) -> str:
        """32 hexadecimal digits of all that the picture's file depends on."""
        drawn = asdict(self) | {
            "base": settings.base.fingerprint,
            "format": settings.format,
            "negative_prompt": settings.negative_prompt,
            "size": settings.size,
            "place": settings.place and asdict(settings.place) | {"version": AROUND_VERSION},
        }
        return hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()[:32]

    def path(self, key: str, settings: GenerationSettings) -> str:
        """Where the picture's file is, below `GenerationSettings.out`."""
        return f"{PICTURES}/{self.object_id}/{self.prompt_id}-{self.seed}-{key[:12]}.{settings.format}"
