"""What a worker does with a lease: read and mend; fine-tune as one group and draw previews; commit."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Literal

import numpy as np
import torch
from PIL import Image

from jobs.bases import load_planned
from jobs.ingest import Checked, digest_inputs, read_photo, source_record
from jobs.leases import Alive, LeaseLostError
from jobs.outcomes import RowOutcome, fail_row
from jobs.plan import Unit
from jobs.settings import PREVIEW_PROMPTS, FineTuneSettings
from objdrive.adapters.adapter import adapter_files
from objdrive.adapters.artifact import (
    ArtifactMetadata,
    BaseRef,
    Preview,
    PreviewKind,
    SceneMember,
    Sources,
    adapter_digest,
    library_versions,
)
from objdrive.adapters.bank import AdapterBank
from objdrive.adapters.store import ArtifactStore
from objdrive.base.prompts import TOKEN_MARK, marked_phrase
from objdrive.base.stable_diffusion import Base
from objdrive.catalog.masks import intersection_over_union
from objdrive.catalog.photos import Photo, masks_overlap
from objdrive.errors import RowError, StoreError
from objdrive.pictures import encode_picture
from objdrive.sampling.sampler import Layout, SampleSpec, draw_pictures, fitting_batch_size
from objdrive.seeds import seed_of
from objdrive.training.class_pictures import ClassPictures
from objdrive.training.memory import fitting_group_size
from objdrive.training.personalize import Diverged, FineTuned, personalize
from objdrive.training.recipe import METHOD_VERSION
from objdrive.training.views import Scene, SceneObject, with_mended_masks

_THUMBNAIL = 256
_FATAL = (LeaseLostError, torch.AcceleratorError)
"""Exceptions that concern all of a worker's work: its tasks are another's by now, or its device has failed."""
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Loaded:
    """A unit whose pictures are read."""

    unit: Unit
    photos: list[Photo]
    digest: str
    scene: Scene

    @classmethod
    def of(cls, unit: Unit, photos: list[Photo], digest: str) -> "_Loaded":
        objects = [
            SceneObject(record.row.object_id, record.row.class_name, photo.mask)
            for record, photo in zip(unit.rows, photos, strict=True)
        ]
        return cls(unit, photos, digest, Scene(digest, photos[0].image, tuple(objects)))


@dataclass(frozen=True)
class _Drawn:
    object_id: str
    kind: PreviewKind
    caption: str
    picture: Image.Image


@dataclass(frozen=True)
class _Tuned:
    """What became of a unit on the device: its fine-tune, its pictures, and which class words the base lacks."""

    result: FineTuned
    previews: Sequence[_Drawn]
    unknown: frozenset[str]


class _Counted:
    """Tells with every call how many there have been, of how many."""

    def __init__(self, alive: Alive, of: int) -> None:
        self._alive, self._of, self._done = alive, of, 0

    def __call__(self) -> None:
        self._done = min(self._done + 1, self._of)
        self._alive(self._done, self._of)


class _Group:
    """A lease of units, which are fine-tuned together. Its stages are those of `jobs.stages.Job`."""

    def __init__(self, work: "FineTune", units: list[Unit], alive: Alive) -> None:
        self._work = work
        self._units = units
        self._alive = _Counted(alive, work.steps(units))
        self._loaded: dict[int, _Loaded] = {}
        self._tuned: list[tuple[int, _Loaded, _Tuned]] = []
        self._outcomes: dict[int, list[RowOutcome]] = {}

    def prepare(self) -> None:
        for index, unit in enumerate(self._units):
            self._alive()
            ready = self._work.load(unit)
            if isinstance(ready, _Loaded):
                self._loaded[index] = ready
            else:
                self._outcomes[index] = ready
        if self._work.mends:
            for index, one in list(self._loaded.items()):
                mended = self._work.mended(one)
                self._alive()
                if isinstance(mended, _Loaded):
                    self._loaded[index] = mended
                else:
                    self._outcomes[index] = mended
                    del self._loaded[index]

    def train(self) -> None:
        loaded = list(self._loaded.values())
        results = self._work.personalize([one.scene for one in loaded], self._alive)
        fine = [(one, r) for one, r in zip(loaded, results, strict=True) if isinstance(r, FineTuned)]
        previews = iter(self._work.draw_previews(fine, self._alive))
        for (index, one), result in zip(self._loaded.items(), results, strict=True):
            if isinstance(result, FineTuned):
                drawn = next(previews)
                if isinstance(drawn, Exception):
                    self._outcomes[index] = _failed(one.unit, drawn)
                else:
                    self._tuned.append((index, one, _Tuned(result, drawn, self._work.unknown_classes(one.unit))))
            elif isinstance(result, Diverged):
                self._outcomes[index] = _fail(one.unit, "diverged", result.message)
            else:
                self._outcomes[index] = _failed(one.unit, result)

    def commit(self) -> list[list[RowOutcome]]:
        """For each unit one outcome per row."""
        for index, one, tuned in self._tuned:
            self._outcomes[index] = self._work.commit(one, tuned, self._alive)
        return [self._outcomes[index] for index in range(len(self._units))]


class FineTune:
    """Fine-tunes leases of units on a base that it holds.

    Raises:
        ObjdriveError: the base here is not the one that the run was planned for.
    """

    def __init__(self, settings: FineTuneSettings) -> None:
        self._target = settings.target
        self._base = load_planned(settings.base, self._target.base_fingerprint, clip=settings.clip, vae=settings.vae)
        self._recipe = settings.recipe
        self._store = ArtifactStore(self._target.store_url)
        self._class_pictures = ClassPictures(self._base, self._recipe)
        self.group_size = settings.group_size or fitting_group_size(self._base, self._recipe)

    def begin(self, payloads: list[Unit], alive: Alive) -> "_Group":
        """What is to be done with a lease of units. What a unit raises is its own failure: the others go on."""
        return _Group(self, payloads, alive)

    def steps(self, units: Sequence[Unit]) -> int:
        """How often `alive` is called for a lease of these, unless something goes wrong."""
        rows = [record.row for unit in units for record in unit.rows]
        previewed = sum(len(unit.rows) for unit in units if unit.previews)
        pictures = math.ceil(previewed * (1 + len(PREVIEW_PROMPTS)) / fitting_batch_size(self._base))
        classes = {row.class_name for row in rows} if self._recipe.keeps_classes else set()
        mended = 2 * len(units) if self.mends else 0
        prepared = len(units) + mended + 1 + self._class_pictures.steps_to_draw(classes) + len(units)
        return prepared + self._recipe.steps + pictures * (self._recipe.sample_steps + 1) + len(rows)

    @property
    def mends(self) -> bool:
        """Whether masks are mended."""
        return self._recipe.mend_masks

    def mended(self, loaded: _Loaded) -> _Loaded | list[RowOutcome]:
        """The unit with mended masks."""
        try:
            return replace(loaded, scene=with_mended_masks(loaded.scene))
        except Exception as error:
            return _failed(loaded.unit, error)

    def unknown_classes(self, unit: Unit) -> frozenset[str]:
        """Class words that the base does not know. Only where nothing else uses the tokenizer, which has no lock."""
        return frozenset(name for name in (r.row.class_name for r in unit.rows) if not self._base.knows(name))

    def load(self, unit: Unit) -> _Loaded | list[RowOutcome]:
        """Read the unit's pictures; its outcomes if there is nothing to fine-tune."""
        try:
            photos, members = zip(
                *(read_photo(r.row, r.image, r.mask, self._target.hosts) for r in unit.rows), strict=True
            )
            digest = adapter_digest(members, **digest_inputs(self._target))
            if all(self._store.has(r.row.object_id, digest) for r in unit.rows):
                for record in unit.rows:
                    self._store.point(record.row.object_id, digest, look=record.look)
                return [RowOutcome("already", digest)] * len(unit.rows)
            if len(photos) > 1 and (pair := masks_overlap([photo.mask for photo in photos])):
                return _fail(unit, "scene_overlap", _overlap_message(unit, *pair))
            return _Loaded.of(unit, list(photos), digest)
        except RowError as error:
            return _fail(unit, error.code, str(error))
        except StoreError as error:
            return _fail(unit, "store_failed", str(error))
        except Exception as error:
            return _failed(unit, error)

    def personalize(
        self, scenes: Sequence[Scene], alive: Callable[[], None]
    ) -> Sequence[FineTuned | Diverged | Exception]:
        """Fine-tune a group. One result per scene; an exception for a scene that raised it."""
        if not scenes:
            return []
        try:
            return personalize(self._base, scenes, self._recipe, class_pictures=self._class_pictures, on_step=alive)
        except _FATAL:
            raise
        except Exception as error:
            if len(scenes) == 1:
                _logger.exception("a fine-tune failed")
                # Its frames hold all that the scene took of the device.
                return [error.with_traceback(None)]
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
        # Not in the handler, for the same reason.
        # The group is only an optimisation, so halves give the same adapters; and in the end the culprit is alone.
        half = len(scenes) // 2
        if out_of_memory:
            self.group_size = half
            torch.cuda.empty_cache()
        return [*self.personalize(scenes[:half], alive), *self.personalize(scenes[half:], alive)]

    def draw_previews(
        self, fine: Sequence[tuple[_Loaded, FineTuned]], alive: Callable[[], None]
    ) -> Sequence[list[_Drawn] | Exception]:
        """Draw previews.

        Returns:
            For each unit the pictures of its objects, none where none are wanted; an exception if it raised one.
        """
        try:
            return self._drawn(fine, alive)
        except _FATAL:
            raise
        except Exception as error:
            if len(fine) == 1:
                return [error]
        return [previews for one in fine for previews in self.draw_previews([one], alive)]

    def _drawn(self, fine: Sequence[tuple[_Loaded, FineTuned]], alive: Callable[[], None]) -> list[list[_Drawn]]:
        asks = [ask for slot, (unit, result) in enumerate(fine) for ask in self._asks(slot, unit, result)]
        drawn: list[list[_Drawn]] = [[] for _ in fine]
        if not asks:
            return drawn
        with AdapterBank(
            self._base.unet, self._base.family.lora_targets, slots=len(fine), rank=self._recipe.rank
        ) as bank:
            for slot, (_, result) in enumerate(fine):
                bank.load(slot, result.adapters[0].lora, least_rank=self._recipe.least_rank)
            pictures = draw_pictures(
                self._base,
                [request for *_, request in asks],
                bank=bank,
                on_step=alive,
            )
        for (slot, object_id, kind, caption, _), picture in zip(asks, pictures, strict=True):
            drawn[slot].append(_Drawn(object_id, kind, caption, picture))
        return drawn

    def _asks(
        self, slot: int, loaded: _Loaded, result: FineTuned
    ) -> list[tuple[int, str, PreviewKind, str, SampleSpec]]:
        """(slot, object id, kind, caption, picture) of each preview: one with the prototype only, then the contexts."""
        if not loaded.unit.previews:
            return []
        asks: list[tuple[int, str, PreviewKind, str, SampleSpec]] = []
        ask = partial(SampleSpec, steps=self._recipe.sample_steps, guidance_scale=self._recipe.guidance_scale)
        for record, prototype, adapter in zip(loaded.unit.rows, result.prototypes, result.adapters, strict=True):
            object_id, phrase = record.row.object_id, marked_phrase(self._recipe.phrase, record.row.class_name)
            seeds = [seed_of(f"{loaded.digest}:{prompt}") for prompt in PREVIEW_PROMPTS]
            first = ask(PREVIEW_PROMPTS[0], seeds[0], (phrase,), (prototype,))
            asks.append((slot, object_id, "prototype", f"prototype only: {PREVIEW_PROMPTS[0]}", first))
            for prompt, seed in zip(PREVIEW_PROMPTS, seeds, strict=True):
                layout = Layout.of([self._recipe.layout_noise], [record.row.class_name], [{slot: 1.0}])
                picture = ask(prompt, seed, (phrase,), (adapter.embeddings,), {slot: 1.0}, layout=layout)
                asks.append((slot, object_id, "picture", prompt, picture))
        return asks

    def commit(self, loaded: _Loaded, tuned: _Tuned, alive: Callable[[], None]) -> list[RowOutcome]:
        """Encode and commit the unit's objects; one outcome per row."""
        outcomes = []
        for index, record in enumerate(loaded.unit.rows):
            drawn = [(p.kind, p.caption, p.picture) for p in tuned.previews if p.object_id == record.row.object_id]
            try:
                outcomes.append(self._commit_object(loaded, index, tuned, drawn, alive))
            except _FATAL:
                raise
            except StoreError as error:
                outcomes.append(fail_row(record, "store_failed", str(error)))
            except Exception as error:
                outcomes.append(_failed_row(record, error))
            alive()
        return outcomes

    def _commit_object(
        self,
        loaded: _Loaded,
        index: int,
        tuned: _Tuned,
        drawn: list[tuple[PreviewKind, str, Image.Image]],
        alive: Callable[[], None],
    ) -> RowOutcome:
        record, photo, result = loaded.unit.rows[index], loaded.photos[index], tuned.result
        learned_by = result.masks[index]
        mended = learned_by is not photo.mask
        # A catalog shows every object, those without drawn previews too.
        pictures: list[tuple[PreviewKind, str, Image.Image]] = [("input", "input", _thumbnail(photo.image))]
        if drawn:
            pictures.append(("mask", "mask", _mask_picture(photo.mask)))
            if mended:
                pictures.append(("mended_mask", "mended mask", _mask_picture(learned_by)))
            pictures += drawn
        names = [f"previews/{number}.webp" for number in range(len(pictures))]
        adapter = result.adapters[index].in_half_precision()
        files = adapter_files(adapter, token=_token(record.row.object_id), family=self._base.family)
        files |= {name: _webp(picture) for name, (*_, picture) in zip(names, pictures, strict=True)}
        notes = [
            Preview(file=name, kind=kind, caption=caption)
            for name, (kind, caption, _) in zip(names, pictures, strict=True)
        ]
        metadata = self._metadata(loaded, record, result, notes)
        committed = self._store.commit(files, metadata, look=record.look, alive=alive)
        warnings = [_unknown_class(record, self._base)] if record.row.class_name in tuned.unknown else []
        warnings += photo.warnings
        if mended:
            warnings.append(_mended(photo.mask, learned_by))
        status: Literal["committed", "already"] = "committed" if committed else "already"
        return RowOutcome(status, loaded.digest, warning="; ".join(warnings), metrics=result.metrics)

    def _metadata(
        self, loaded: _Loaded, record: Checked, result: FineTuned, previews: list[Preview]
    ) -> ArtifactMetadata:
        row = record.row
        token = _token(row.object_id)
        return ArtifactMetadata(
            object_id=row.object_id,
            class_name=row.class_name,
            token=token,
            phrase=marked_phrase(self._recipe.phrase, row.class_name).replace(TOKEN_MARK, token),
            digest=loaded.digest,
            scene=row.scene,
            members=[
                SceneMember(object_id=o.row.object_id, class_name=o.row.class_name, token=_token(o.row.object_id))
                for o in loaded.unit.rows
            ],
            base=BaseRef(id=self._base.name, fingerprint=self._base.fingerprint),
            recipe=self._recipe.model_dump(mode="json"),
            recipe_digest=self._recipe.digest,
            method_version=METHOD_VERSION,
            metrics=result.metrics,
            sources=Sources(
                image=source_record(record.image), mask=source_record(record.mask) if record.mask else None
            ),
            previews=previews,
            row=row.metadata,
            versions=library_versions(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )


def _token(object_id: str) -> str:
    return f"<{object_id}>"


def _failed(unit: Unit, error: Exception) -> list[RowOutcome]:
    return [_failed_row(record, error) for record in unit.rows]


def _failed_row(record: Checked, error: Exception) -> RowOutcome:
    _logger.error("%s failed", record.row.where, exc_info=error)
    return fail_row(record, "fine_tune_failed", f"the fine-tune failed: {type(error).__name__}: {error}")


def _fail(unit: Unit, code: str, message: str) -> list[RowOutcome]:
    return [fail_row(record, code, message) for record in unit.rows]


def _overlap_message(unit: Unit, first: int, second: int, share: float) -> str:
    a, b = unit.rows[first].row, unit.rows[second].row
    return (
        f"scene {a.scene!r}: the masks of {a.object_id!r} and {b.object_id!r} share {share:.0%} of the smaller one, "
        "so they can't be told apart: give each object a mask of its own"
    )


def _unknown_class(record: Checked, base: Base) -> str:
    return (
        f"the base {base.name!r} does not know the class word {record.row.class_name!r}: "
        "it starts from what the word's pieces mean"
    )


def _mended(given: np.ndarray, learned_by: np.ndarray) -> str:
    agreement = intersection_over_union(given >= 0.5, learned_by >= 0.5)
    return (
        f"the mask's edge does not follow the picture and was mended (intersection over union: {agreement:.2f}): "
        "look at the object's previews, and give a better mask, or use this one as it is: --set mend_masks=false"
    )


def _mask_picture(mask: np.ndarray) -> Image.Image:
    return _thumbnail((mask * 255).astype(np.uint8))


def _thumbnail(pixels: np.ndarray) -> Image.Image:
    picture = Image.fromarray(pixels)
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return picture


def _webp(picture: Image.Image) -> bytes:
    return encode_picture(picture, "WEBP", quality=90)
