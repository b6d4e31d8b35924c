"""The engine: many requests, many objects, one denoising batch that requests join and leave at every step."""

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from objdrive.adapters.artifact import ArtifactKey
from objdrive.adapters.bank import AdapterBank
from objdrive.adapters.store import ArtifactStore
from objdrive.base.prompts import place_objects
from objdrive.base.sizes import Size
from objdrive.base.stable_diffusion import Base
from objdrive.errors import Cancelled, Draining, DrawingFailed, ObjdriveError, QueueFull
from objdrive.sampling.checks import check_request
from objdrive.sampling.device_clock import DeviceClock
from objdrive.sampling.finisher import Decoded, Finished, Finisher, Outcome
from objdrive.sampling.histogram import Histogram
from objdrive.sampling.negatives import NegativePrompts
from objdrive.sampling.requests import Drawing, DrawRequest, Partial, Picture, partial_steps
from objdrive.sampling.residency import Reservation, Residency, Resident
from objdrive.sampling.sampler import Layout, Sample, SampleSpec, begin, denoise, fitting_batch_size
from objdrive.sampling.stats import EngineStats
from objdrive.sampling.turns import Turns

_logger = logging.getLogger(__name__)
_MOST_OVERTAKEN = 32
_LONGEST_RETRY_SECONDS = 60.0
_NOT_FINITE = "the picture's values are not finite: lower guidance_scale or adapter_scale"


@dataclass(eq=False)
class _Ticket:
    """A request on its way through the engine."""

    drawing: Drawing
    reservation: Reservation
    submitted: float
    overtaken: int = 0


@dataclass(eq=False)
class _Place:
    """A request that holds a place in the batch."""

    ticket: _Ticket
    sample: Sample
    prompt: str
    started: float
    partials_after: tuple[int, ...]
    ended: bool = False
    failure: DrawingFailed | None = None
    """Why a partial picture could not be shown: the drawing ends before its next step."""

    @property
    def finished(self) -> bool:
        return self.sample.stepper.done

    @property
    def shows(self) -> bool:
        """Whether there is something to show after the step just taken."""
        return self.finished or self.sample.stepper.taken in self.partials_after

    @property
    def seen(self) -> Tensor:
        """(1, C, h, h) latents of what the picture is, or will become."""
        return self.sample.latents if self.finished else self.sample.stepper.predicted

    def partial(self) -> Callable[[Image.Image], Partial]:
        """What makes the partial picture of the step just taken, however many are taken meanwhile."""
        stepper = self.sample.stepper
        index, step = self.partials_after.index(stepper.taken), stepper.taken
        return lambda image: Partial(image, index, step, stepper.steps)


class Engine:
    """Draws requests on a thread of its own, all that run sharing every pass of the UNet (continuous batching).

    That thread decodes pictures too; what is left to do of them is done on another (see `Finisher`).

    A request is admitted as soon as its adapters are in the bank and a place in the batch is free, in the order of
    arrival; those whose adapters are still being loaded are overtaken. One that waits for slots is overtaken only by
    requests that need no further slot, and not for ever. All methods are thread-safe. The base must have no other user
    meanwhile.

    Requests of one size share a pass; sizes take turns (see `Turns`).

    Args:
        base: what draws.
        store: where artifacts come from.
        batch_size: most requests under way, of the base's native size; with guidance each takes two rows of the UNet's
            batch. Of larger ones there are fewer, so that they have no more pixels together.
        slots: how many adapters the bank holds; at least as many as one request names.
        rank: the highest rank of an adapter.
        host_bytes: limit of host memory for adapters, see `Residency`.
        queue_limit: most requests that wait for a place in the batch; as many more may wait for the store, so that
            storage that hangs holds up only those whose adapters it has.
    """

    def __init__(
        self,
        base: Base,
        store: ArtifactStore,
        *,
        batch_size: int,
        slots: int,
        rank: int,
        host_bytes: int,
        queue_limit: int,
    ) -> None:
        for name, value in {"batch_size": batch_size, "slots": slots, "queue_limit": queue_limit}.items():
            if value < 1:
                raise ObjdriveError(f"{name}={value} must be at least 1")
        self._base = base
        self._batch_size = batch_size
        self._queue_limit = queue_limit
        self._bank = AdapterBank(base.unet, base.family.lora_targets, slots=slots, rank=rank)
        self._residency = Residency(base, store, self._bank, host_bytes=host_bytes, on_loaded=self._wake)
        self._condition = threading.Condition()
        self._waiting: deque[_Ticket] = deque()
        self._unfinished = 0
        self._awake = False
        self._draining = False
        self._closing = False
        self._batch: list[_Place] = []
        self._turns = Turns()
        self._negatives = NegativePrompts(base)
        self._outcomes: Counter[str] = Counter()
        self._mean_draw_seconds = 1.0
        self._queue_seconds = Histogram()
        self._batch_sizes = Histogram([2**power for power in range(batch_size.bit_length() + 1)])
        self._steps, self._decodes = DeviceClock(base.device), DeviceClock(base.device)
        self._finisher = Finisher()
        self._thread = threading.Thread(target=self._run, name="objdrive-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def submit(self, request: DrawRequest, *, whatever_waits: bool = False) -> Drawing:
        """Take a request; its drawing starts as soon as there is room.

        With `whatever_waits`, it is taken however many wait already: for a check of the engine's health.

        Raises:
            QueueFull: too many wait already.
            Draining: the engine takes nothing new.
            InvalidPrompt, UnknownObject, ObjdriveError: the request cannot be drawn, whatever the store holds.
        """
        try:
            check_request(request, self._base, self._bank.slots)
            return self._enqueue(request, whatever_waits)
        except ObjdriveError as error:
            self._count(error.code)
            raise

    def stats(self) -> EngineStats:
        """Return counters and gauges as they are now."""
        for clock in (self._steps, self._decodes):
            clock.collect()
        with self._condition:
            outcomes, waiting = dict(self._outcomes), len(self._waiting)
        return EngineStats(
            requests=outcomes,
            waiting=waiting,
            running=len(self._batch),
            queue_seconds=self._queue_seconds.snapshot(),
            batch_size=self._batch_sizes.snapshot(),
            batch_limit=self._batch_size,
            step_seconds=self._steps.seconds.snapshot(),
            decode_seconds=self._decodes.seconds.snapshot(),
            swap_seconds=self._residency.swap_seconds.snapshot(),
            hits=self._residency.hits,
            resident=len(self._residency.resident),
            hosted=len(self._residency.hosted),
            hosted_bytes=self._residency.hosted_bytes,
        )

    def drain(self) -> None:
        """Refuse new requests, and return when all that were taken have ended."""
        with self._condition:
            self._draining = True
            self._condition.wait_for(lambda: not self._unfinished)

    def close(self) -> None:
        """Refuse new requests, cancel all that were taken, and take the bank off the base."""
        with self._condition:
            self._draining = self._closing = True
            self._condition.notify_all()
        self._thread.join()
        self._finisher.close()
        closed = Draining("the engine was closed before the picture was drawn: ask another")
        self._end_batch(closed)
        self._end_waiting(closed)
        self._residency.close()
        self._bank.close()

    def _enqueue(self, request: DrawRequest, whatever_waits: bool) -> Drawing:
        drawing = Drawing(request, self._withdraw)
        ticket = _Ticket(drawing, Reservation(request.objects), time.monotonic())
        with self._condition:
            if self._draining:
                raise Draining("the engine is draining and takes no new requests: ask another")
            waiting = self._waiting_like(ticket)
            if waiting >= self._queue_limit and not whatever_waits:
                raise self._queue_full(waiting)
            self._waiting.append(ticket)
            self._unfinished += 1
        # Not left to the engine's thread, which may be within a step: the load runs beside it.
        self._residency.prepare(ticket.reservation)
        self._wake()
        return drawing

    def _waiting_like(self, ticket: _Ticket) -> int:
        """How many wait for the store, if the ticket will; else how many wait for a place in the batch."""
        loading = self._residency.waits_for_store(ticket.reservation)
        return sum(self._residency.waits_for_store(other.reservation) is loading for other in self._waiting)

    def _queue_full(self, waiting: int) -> QueueFull:
        rounds = math.ceil((waiting + 1) / self._batch_size)
        seconds = min(max(1.0, rounds * self._mean_draw_seconds), _LONGEST_RETRY_SECONDS)
        return QueueFull(f"{waiting} requests wait already: try again in {seconds:.0f} s", seconds)

    def _withdraw(self, drawing: Drawing) -> None:
        with self._condition:
            ticket = next((ticket for ticket in self._waiting if ticket.drawing is drawing), None)
            if ticket:
                self._waiting.remove(ticket)
        if ticket:
            self._end(ticket, _cancelled())
        # One that runs is seen by the engine's thread at its next step.
        self._wake()

    def _wake(self) -> None:
        with self._condition:
            self._awake = True
            self._condition.notify_all()

    def _run(self) -> None:
        while self._await_work():
            try:
                self._drop_ended()
                self._admit()
                if self._batch:
                    self._step()
            except Exception as error:
                # No later request must find the thread dead.
                _logger.exception("a step of %d drawings failed", len(self._batch))
                if self._batch:
                    self._end_batch(_failure(error))
                else:
                    self._end_waiting(_failure(error))

    def _await_work(self) -> bool:
        with self._condition:
            self._condition.wait_for(lambda: self._closing or self._awake or self._batch)
            self._awake = False
            return not self._closing

    def _drop_ended(self) -> None:
        for place in [place for place in self._batch if place.failure or place.ticket.drawing.cancelled]:
            self._batch.remove(place)
            self._end(place.ticket, place.failure or _cancelled())

    def _admit(self) -> None:
        with self._condition:
            waiting = list(self._waiting)
        blocked: _Ticket | None = None
        for ticket in waiting:
            if len(self._batch) == self._batch_size:
                break
            if not self._residency.prepare(ticket.reservation) or not self._residency.ready(ticket.reservation):
                continue
            # Only now: one whose adapters are still being loaded keeps nobody out.
            if not self._fits(ticket):
                break
            if blocked and not self._may_overtake(ticket, blocked):
                continue
            # One whose adapters went meanwhile is loading again, and nobody has to wait for that.
            if not self._seat(ticket) and self._residency.ready(ticket.reservation):
                blocked = blocked or ticket

    def _fits(self, ticket: _Ticket) -> bool:
        """Whether there is memory for one more."""
        sizes = [self._size_of(one) for one in (ticket, *(place.ticket for place in self._batch))]
        pixels = sum(width * height for width, height in sizes)
        # One picture is drawn in any case.
        most = self._batch_size * self._base.resolution**2
        return len(sizes) == 1 or pixels <= most

    def _size_of(self, ticket: _Ticket) -> Size:
        return ticket.drawing.request.size or self._base.sizes.square

    def _may_overtake(self, ticket: _Ticket, blocked: _Ticket) -> bool:
        if blocked.overtaken == _MOST_OVERTAKEN or not self._residency.needs_no_slot(ticket.reservation):
            return False
        blocked.overtaken += 1
        return True

    def _seat(self, ticket: _Ticket) -> bool:
        """Give the ticket a place, or end it if it cannot be drawn; False if its slots are not free yet."""
        try:
            residents = self._residency.lease(ticket.reservation)
            if residents is None:
                return False
            begun: _Place | ObjdriveError = self._begin(ticket, {resident.key: resident for resident in residents})
        except ObjdriveError as error:
            begun = error
        except Exception as error:
            _logger.exception("a drawing of %s could not begin", ", ".join(map(str, ticket.drawing.request.objects)))
            begun = _failure(error)
        with self._condition:
            cancelled = ticket not in self._waiting
            if not cancelled:
                self._waiting.remove(ticket)
        if cancelled:
            self._residency.release(ticket.reservation)
            self._wake()
        elif isinstance(begun, _Place):
            self._batch.append(begun)
        else:
            self._end(ticket, begun)
        return True

    def _begin(self, ticket: _Ticket, residents: Mapping[ArtifactKey, Resident]) -> _Place:
        request = ticket.drawing.request
        shown = [residents[key] for key in request.objects]
        prompt = place_objects(request.prompt, [resident.class_name for resident in shown])
        sample = begin(self._base, _sample_spec(request, prompt, shown), self._negatives)
        started = time.monotonic()
        self._queue_seconds.observe(started - ticket.submitted)
        return _Place(ticket, sample, prompt, started, partial_steps(request.steps, request.partial_images))

    def _step(self) -> None:
        size = self._turns.next(self._size_of(place.ticket) for place in self._batch)
        places = [place for place in self._batch if self._size_of(place.ticket) == size]
        with self._steps.measure():
            denoise(self._base, [place.sample for place in places], self._bank)
        self._batch_sizes.observe(len(places))
        self._turns.took(size, len(places))
        self._show([place for place in places if place.shows])

    def _show(self, places: Sequence[_Place]) -> None:
        """Decode partial and finished pictures, and have them delivered."""
        at_once = fitting_batch_size(self._base, self._size_of(places[0].ticket)) if places else 1
        for first in range(0, len(places), at_once):
            some = places[first : first + at_once]
            seen = torch.cat([place.seen for place in some])
            with self._decodes.measure():
                decoded = Decoded.of(seen, self._base.decode_latents(seen))
            tell = [partial(self._finish, place) if place.finished else self._showing(place) for place in some]
            for place in some:
                place.ended = place.finished
            self._batch = [place for place in self._batch if not place.ended]
            self._finisher.give(decoded, tell)

    def _finish(self, place: _Place, outcome: Outcome) -> None:
        """End a drawing by what came of its picture."""
        if isinstance(outcome, Finished):
            self._end(place.ticket, self._picture(place, outcome))
        else:
            self._end(place.ticket, _why(outcome))

    def _showing(self, place: _Place) -> Callable[[Outcome], None]:
        made = place.partial()

        def show(outcome: Outcome) -> None:
            if isinstance(outcome, Finished):
                place.ticket.drawing.tell(made(outcome.image))
            else:
                # Its slots are in use: the engine's thread ends it before the next step.
                place.failure = _why(outcome)

        return show

    def _picture(self, place: _Place, finished: Finished) -> Picture:
        request = place.ticket.drawing.request
        seconds = time.monotonic() - place.started
        self._mean_draw_seconds += 0.1 * (seconds - self._mean_draw_seconds)
        return Picture(
            image=finished.image,
            latents=finished.latents,
            objects=request.objects,
            seed=request.seed,
            prompt=place.prompt,
            base=self._base.name,
            base_fingerprint=self._base.fingerprint,
            queue_seconds=place.started - place.ticket.submitted,
            draw_seconds=seconds,
        )

    def _end_place(self, place: _Place, event: Picture | ObjdriveError) -> None:
        place.ended = True
        self._end(place.ticket, event)

    def _end_batch(self, error: ObjdriveError) -> None:
        for place in self._batch:
            if not place.ended:
                self._end_place(place, error)
        self._batch = []

    def _end_waiting(self, error: ObjdriveError) -> None:
        with self._condition:
            tickets = list(self._waiting)
            self._waiting.clear()
        for ticket in tickets:
            self._end(ticket, error)

    def _end(self, ticket: _Ticket, event: Picture | ObjdriveError) -> None:
        self._residency.release(ticket.reservation)
        self._count("drawn" if isinstance(event, Picture) else event.code)
        ticket.drawing.tell(event)
        with self._condition:
            self._unfinished -= 1
        # Its place and slots may be what another waits for.
        self._wake()

    def _count(self, outcome: str) -> None:
        with self._condition:
            self._outcomes[outcome] += 1


def _sample_spec(request: DrawRequest, prompt: str, shown: Sequence[Resident]) -> SampleSpec:
    adapted = request.adapter_scale > 0
    # Objects of one scene share their LoRA, which must not be added twice.
    slots = {resident.lora_sha256: resident.slot for resident in shown if resident.lora_sha256}
    scale = request.adapter_scale
    layout = Layout.of(
        [resident.layout_noise for resident in shown],
        [resident.class_name for resident in shown],
        [{resident.slot: scale} if resident.lora_sha256 else {} for resident in shown],
    )
    return SampleSpec(
        prompt=prompt,
        seed=request.seed,
        phrases=[resident.phrase if adapted else resident.class_name for resident in shown],
        embeddings=[resident.embeddings for resident in shown] if adapted else [],
        slots={slot: scale for slot in slots.values()} if adapted else {},
        layout=layout if adapted else None,
        negative_prompt=request.negative_prompt,
        steps=request.steps,
        guidance_scale=request.guidance_scale,
        scheduler=request.scheduler,
        size=request.size,
        canvas=request.canvas,
    )


def _cancelled() -> Cancelled:
    return Cancelled("the request was cancelled before its picture was drawn")


def _why(outcome: Exception | None) -> DrawingFailed:
    return DrawingFailed(_NOT_FINITE) if outcome is None else _failure(outcome)


def _failure(error: Exception) -> DrawingFailed:
    return DrawingFailed(f"the picture could not be drawn ({type(error).__name__}): the server's log says more")
