"""Requests to the engine, what they tell on their way, and their handle."""

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from PIL import Image
from torch import Tensor

from objdrive.adapters.artifact import ArtifactKey
from objdrive.base.sizes import Size
from objdrive.base.steppers import SchedulerName
from objdrive.errors import ObjdriveError
from objdrive.sampling.inpainting import Canvas

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DrawRequest:
    """One picture to draw.

    Attributes:
        prompt: ``{}`` marks the objects' places; without any, see `objdrive.base.prompts.place_objects`.
        seed: of the starting noise, below 2**63.
        objects: the artifacts that it shows, in the order of their places; none draws with the base alone.
        steps: of the scheduler.
        guidance_scale: at least 1, which draws without guidance.
        adapter_scale: of the objects' LoRA deltas. 0 is the base: each object's place then holds its class word.
        negative_prompt: what guidance leads away from.
        scheduler: ``ddim``, or ``dpmsolver++`` for DPM-Solver++(2M).
        size: width and height in pixels; None: the base's native square.
        partial_images: how many pictures of what the drawing will become are delivered on the way, at most one a step.
        canvas: the picture to draw into, of the size that is drawn; none: an empty one.
    """

    prompt: str
    seed: int
    objects: tuple[ArtifactKey, ...] = ()
    steps: int = field(kw_only=True)
    guidance_scale: float = field(kw_only=True)
    adapter_scale: float = 1.0
    negative_prompt: str = ""
    scheduler: SchedulerName = "ddim"
    size: Size | None = None
    partial_images: int = 0
    canvas: Canvas | None = None


@dataclass(frozen=True)
class Partial:
    """What a drawing will probably become, seen from `step` of `steps`; `index` counts from 0."""

    image: Image.Image
    index: int
    step: int
    steps: int


@dataclass(frozen=True)
class Picture:
    """A finished picture, and what drew it.

    Attributes:
        image: RGB.
        latents: (C, h, w) on the CPU.
        objects: the artifacts that drew it.
        seed: of the starting noise.
        prompt: as it was drawn, with ``{}`` in the objects' places.
        base: the base's name.
        base_fingerprint: of all its weights.
        queue_seconds: from `Engine.submit` to the first step.
        draw_seconds: from the first step to the picture.
    """

    image: Image.Image
    latents: Tensor
    objects: tuple[ArtifactKey, ...]
    seed: int
    prompt: str
    base: str
    base_fingerprint: str
    queue_seconds: float
    draw_seconds: float


DrawingEvent = Partial | Picture | ObjdriveError
"""What a drawing tells: partial pictures, and at the end its picture or why there is none."""


class Drawing:
    """A request that an engine has taken: a handle for any number of threads."""

    def __init__(self, request: DrawRequest, cancel: Callable[["Drawing"], None]) -> None:
        self.request = request
        self.cancelled = False
        self._cancel = cancel
        self._changed = threading.Condition()
        self._events: list[DrawingEvent] = []
        self._subscribers: list[Callable[[DrawingEvent], None]] = []

    @property
    def done(self) -> bool:
        """Whether the last event has been told."""
        with self._changed:
            return bool(self._events) and not isinstance(self._events[-1], Partial)

    def events(self) -> Iterator[Partial | Picture]:
        """Yield the partial pictures as they come, and at last the picture.

        Raises:
            ObjdriveError: why there is no picture, such as Cancelled.
        """
        for index in range(self.request.steps + 1):
            with self._changed:
                while len(self._events) <= index:
                    self._changed.wait()
                event = self._events[index]
            if isinstance(event, ObjdriveError):
                raise event
            yield event
            if isinstance(event, Picture):
                return

    def result(self, timeout: float | None = None) -> Picture:
        """Wait for the picture.

        Raises:
            TimeoutError: it took longer than `timeout` seconds; it is still being drawn.
            ObjdriveError: why there is no picture.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"no picture within {timeout} s")
        *_, picture = self.events()
        assert isinstance(picture, Picture)
        return picture

    def subscribe(self, callback: Callable[[DrawingEvent], None]) -> None:
        """Have `callback` called with every event in order, those already past at once.

        It is called on a thread of the engine's, so it must only pass the event on: for asyncio,
        ``lambda event: loop.call_soon_threadsafe(queue.put_nowait, event)``.
        """
        with self._changed:
            self._subscribers.append(callback)
            for event in self._events:
                _call(callback, event)

    def cancel(self) -> None:
        """Give the place up; the engine draws no further step of it. No effect once it is done."""
        self.cancelled = True
        self._cancel(self)

    def tell(self, event: DrawingEvent) -> None:
        """For the engine: add an event, unless the last one has been told."""
        with self._changed:
            if self.done:
                return
            self._events.append(event)
            self._changed.notify_all()
            for callback in self._subscribers:
                _call(callback, event)


def _call(callback: Callable[[DrawingEvent], None], event: DrawingEvent) -> None:
    try:
        callback(event)
    except Exception:
        # A subscriber that is gone (a closed event loop) must not take the others' pictures down.
        _logger.exception("a subscriber to a drawing failed on %s", type(event).__name__)


def partial_steps(steps: int, count: int) -> tuple[int, ...]:
    """After which steps (counted from 1) to show `count` partial pictures, evenly, none after the last."""
    wanted = {round((index + 1) * steps / (count + 1)) for index in range(count)}
    return tuple(sorted(wanted & set(range(1, steps))))
