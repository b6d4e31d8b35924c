"""One drawing as a stream of events, from an engine in this process or in another."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from objdrive.base.sizes import Sizes
from objdrive.base.stable_diffusion import Base
from objdrive.errors import ObjdriveError
from objdrive.pictures import DigitalSource, encode_picture, picture_file
from objdrive.sampling.engine import Engine
from objdrive.sampling.requests import Drawing, DrawingEvent, DrawRequest, Partial, Picture
from serve.errors import api_error
from serve.pools import Pool

_ENCODERS = 2
BASE_MODEL_ID = "base"
"""The model id of pictures that the base alone draws."""


@dataclass(frozen=True)
class BaseInfo:
    """The base that pictures are drawn with.

    `sizes` are those that it draws; `steps` and `guidance_scale` are what suits it.
    """

    id: str
    fingerprint: str
    sizes: Sizes
    steps: int
    guidance_scale: float

    @property
    def resolution(self) -> int:
        """Edge in pixels of the square that it draws unless asked for another size."""
        return self.sizes.native


@dataclass(frozen=True)
class Accepted:
    """The drawing has a place in the queue. Always the first event."""


@dataclass(frozen=True)
class PartialPicture:
    """The picture before it is finished; `index` counts from 0. A PNG, until `serve.finishing` makes it another."""

    index: int
    data: bytes


@dataclass(frozen=True)
class FinishedPicture:
    """The picture, whose file says what drew it, and the prompt that was drawn. The last event.

    A PNG, until `serve.finishing` makes it another.
    """

    data: bytes
    prompt: str


@dataclass(frozen=True)
class Refused:
    """There will be no picture. The last event. A value, not an exception, so that it crosses processes unchanged."""

    code: str
    message: str
    retry_after: int | None = None


PictureEvent = Accepted | PartialPicture | FinishedPicture | Refused


class Generators(Protocol):
    """Draws pictures, in this process or in others."""

    async def describe(self) -> BaseInfo:
        """The base. Raises ApiError (503) while there is none."""
        ...

    def draw(self, request: DrawRequest) -> AsyncGenerator[PictureEvent, None]:
        """Draw a picture. Closing the iterator cancels it."""
        ...


def model_id(request: DrawRequest) -> str:
    """The artifacts that a request is drawn with: ``object_id@digest``, several joined by ``+``."""
    return "+".join(f"{key.object_id}@{key.digest}" for key in request.objects) or BASE_MODEL_ID


class LocalGenerators:
    """An engine in this process."""

    def __init__(self, base: Base, engine: Engine) -> None:
        self._engine = engine
        # Its own: a picture does not wait for what else the process does in threads.
        self._encoders = Pool(_ENCODERS, "encode")
        usual = base.files.tuning
        self._info = BaseInfo(
            base.name,
            base.fingerprint,
            base.sizes,
            int(usual["sample_steps"]),
            float(usual["guidance_scale"]),
        )

    async def describe(self) -> BaseInfo:
        """See `Generators`."""
        return self._info

    async def draw(self, request: DrawRequest) -> AsyncGenerator[PictureEvent, None]:
        """See `Generators`."""
        try:
            drawing = self._engine.submit(request)
        except ObjdriveError as error:
            yield _refused(error)
            return
        try:
            yield Accepted()
            async for event in _told(drawing):
                yield await self._encoders.run(_encoded, event, request)
        finally:
            drawing.cancel()


async def _told(drawing: Drawing) -> AsyncGenerator[DrawingEvent, None]:
    """The events of the engine's thread, in the event loop, up to the last one."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[DrawingEvent] = asyncio.Queue()

    def tell(event: DrawingEvent) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, event)

    drawing.subscribe(tell)
    while True:
        event = await queue.get()
        yield event
        if not isinstance(event, Partial):
            return


def _encoded(event: DrawingEvent, request: DrawRequest) -> PictureEvent:
    if isinstance(event, ObjdriveError):
        return _refused(event)
    if isinstance(event, Partial):
        return PartialPicture(event.index, encode_picture(event.image, "PNG"))
    source: DigitalSource = (
        "trainedAlgorithmicMedia" if request.canvas is None else "compositeWithTrainedAlgorithmicMedia"
    )
    return FinishedPicture(picture_file(event.image, "png", _facts(event, request), source=source), event.prompt)


def _facts(picture: Picture, request: DrawRequest) -> dict[str, str]:
    """What drew the picture, for its file."""
    return {
        "model": model_id(request),
        "base": f"{picture.base}@{picture.base_fingerprint}",
        "seed": str(picture.seed),
        "prompt": picture.prompt,
        "negative_prompt": request.negative_prompt,
        "steps": str(request.steps),
        "guidance_scale": f"{request.guidance_scale:g}",
        "adapter_scale": f"{request.adapter_scale:g}",
        "scheduler": request.scheduler,
    }


def _refused(error: ObjdriveError) -> Refused:
    answer = api_error(error)
    return Refused(answer.code, str(answer), answer.retry_after)
