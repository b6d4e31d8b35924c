"""What an engine refuses to draw, whatever its store holds."""

import re
from typing import get_args

from objdrive.adapters.artifact import DIGEST_PATTERN, OBJECT_ID_PATTERN
from objdrive.base.prompts import fill_prompt, refuse_mark
from objdrive.base.sizes import Size
from objdrive.base.stable_diffusion import Base
from objdrive.base.steppers import SchedulerName
from objdrive.errors import InvalidPrompt, ObjdriveError, UnknownObject
from objdrive.sampling.inpainting import Canvas
from objdrive.sampling.requests import DrawRequest

_LONGEST_PROMPT = 4000


def check_request(request: DrawRequest, base: Base, slots: int) -> None:
    """Refuse what cannot be drawn by `base` with `slots` slots, whatever the store holds.

    Raises:
        InvalidPrompt: a place without an object, a NUL character, or far too long.
        UnknownObject: an object id or digest that is not well formed.
        ObjdriveError: a number out of range, or too many objects.
    """
    for prompt in (request.prompt, request.negative_prompt):
        if len(prompt) > _LONGEST_PROMPT:
            raise InvalidPrompt(f"a prompt of {len(prompt)} characters is too long: at most {_LONGEST_PROMPT}")
        refuse_mark(prompt)
    if not request.objects:
        fill_prompt(request.prompt, ())
    for key in request.objects:
        if not re.fullmatch(OBJECT_ID_PATTERN, key.object_id) or not re.fullmatch(DIGEST_PATTERN, key.digest):
            raise UnknownObject(f"there is no artifact {str(key)!r}: it is not of the form object_id@digest")
    if len(request.objects) > slots:
        raise ObjdriveError(f"{len(request.objects)} objects in one picture are too many: at most {slots}")
    ranges = {
        "seed": (0, 2**63 - 1),
        "steps": (1, base.noise.most_steps),
        "guidance_scale": (1, 100),
        "adapter_scale": (0, 10),
        "partial_images": (0, request.steps),
    }
    for name, (least, most) in ranges.items():
        value = getattr(request, name)
        if not least <= value <= most:
            raise ObjdriveError(f"{name}={value} must be at least {least} and at most {most}")
    if request.size is not None:
        base.sizes.check(request.size)
    if request.canvas is not None:
        _check_canvas(request.canvas, request.size or base.sizes.square)
    if request.scheduler not in get_args(SchedulerName):
        raise ObjdriveError(f"scheduler={request.scheduler!r} must be one of {', '.join(get_args(SchedulerName))}")


def _check_canvas(canvas: Canvas, size: Size) -> None:
    width, height = size
    if canvas.image.shape != (height, width, 3) or canvas.draw.shape != (height, width):
        raise ObjdriveError(
            f"a canvas of {canvas.image.shape} with a mask of {canvas.draw.shape} must be ({height}, {width}, 3) with "
            f"({height}, {width})"
        )
