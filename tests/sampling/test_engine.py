import asyncio
import copy
import pickle
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline

from objdrive.adapters.adapter import Adapter
from objdrive.adapters.artifact import LORA_FILE, ArtifactKey
from objdrive.adapters.store import ArtifactStore
from objdrive.base.prompts import TOKEN_MARK
from objdrive.errors import (
    Cancelled,
    CorruptArtifact,
    Draining,
    DrawingFailed,
    InvalidPrompt,
    ObjdriveError,
    QueueFull,
    StoreError,
    UnknownObject,
    WrongBase,
)
from objdrive.sampling.engine import Engine
from objdrive.sampling.requests import DrawRequest, Partial, Picture, partial_steps
from objdrive.sampling.sampler import SampleSpec, draw_latents

RANK = 4
STEPS = 4
LONG = 400
WAIT = 60

ask = partial(DrawRequest, steps=STEPS, guidance_scale=4.0)


@pytest.fixture(scope="module")
def filled(tmp_path_factory, small, put_adapter):
    """A store of object-0 to object-4, whose ranks differ, and their keys."""
    store = ArtifactStore(str(tmp_path_factory.mktemp("filled")))
    return store, [put_adapter(store, small, f"object-{n}", n, rank=1 + n % RANK) for n in range(5)]


@pytest.fixture
def keys(filled):
    return filled[1]


@pytest.fixture
def engine(filled, small):
    """Call it with settings: an engine on the small base and the filled store."""
    opened = []

    def open_engine(store=filled[0], **settings):
        settings = {"batch_size": 8, "slots": 4, "rank": RANK, "host_bytes": 10**9, "queue_limit": 64} | settings
        opened.append(Engine(small, store, **settings))
        return opened[-1]

    yield open_engine
    for engine in opened:
        engine.close()


def draw(engine, request):
    return engine.submit(request).result(WAIT)


def difference(one, other):
    return float((one - other).abs().max())


def running(engine, *objects, **fields):
    """A drawing that goes on for long, of which a first step is taken."""
    drawing = engine.submit(ask("a photo of {}" if objects else "a mug", 1, objects, **{"steps": LONG} | fields))
    assert isinstance(next(drawing.events()), Partial)
    return drawing


running = partial(running, partial_images=LONG - 1)


@pytest.fixture(scope="module")
def stock(small, filled):
    """Call it with a key and a scheduler: the stock pipeline with that artifact's folder loaded."""

    def stock(key, scheduler):
        snapshot = small.files.snapshot
        pipe = StableDiffusionPipeline(
            vae=small.vae,
            text_encoder=copy.deepcopy(small.towers[0].encoder),
            tokenizer=copy.deepcopy(small.tokenizer),
            unet=copy.deepcopy(small.unet),
            scheduler=scheduler.from_pretrained(snapshot / "scheduler"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        folder = filled[0].folder(key.object_id, key.digest)
        pipe.load_lora_weights(folder)
        pipe.load_textual_inversion(folder, use_safetensors=True)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return stock


class TestOneRequest:
    @pytest.mark.parametrize(
        ("name", "scheduler"), [("ddim", DDIMScheduler), ("dpmsolver++", DPMSolverMultistepScheduler)]
    )
    @pytest.mark.parametrize("guidance_scale", [1.0, 3.5])
    def test_draws_what_stock_diffusers_draws(self, engine, stock, keys, name, scheduler, guidance_scale):
        key = keys[1]
        request = DrawRequest(
            "a photo of {} on grass",
            2**40,
            (key,),
            steps=7,
            guidance_scale=guidance_scale,
            negative_prompt="snow",
            scheduler=name,
        )
        pipe = stock(key, scheduler)
        theirs = {
            kind: pipe(
                f"a photo of <{key.object_id}> mug on grass",
                negative_prompt="snow",
                num_inference_steps=7,
                guidance_scale=guidance_scale,
                generator=torch.Generator().manual_seed(2**40),
                output_type=kind,
            ).images
            for kind in ("latent", "pil")
        }
        picture = draw(engine(), request)
        assert difference(picture.latents, theirs["latent"][0]) < 1e-3
        pixels = np.asarray(picture.image, np.int16) - np.asarray(theirs["pil"][0], np.int16)
        assert np.abs(pixels).max() <= 1

    def test_says_what_drew_it(self, engine, small, keys):
        picture = draw(engine(), ask("a blue mug and snow", 7, (keys[0],)))
        assert picture.objects == (keys[0],)
        assert picture.seed == 7
        assert picture.prompt == "a blue {} and snow"
        assert (picture.base, picture.base_fingerprint) == (small.name, small.fingerprint)
        assert picture.image.size == (16, 16)
        assert picture.latents.shape == (4, 8, 8)
        assert picture.queue_seconds > 0
        assert picture.draw_seconds > 0

    def test_shows_what_it_will_become(self, engine, small):
        events = list(engine().submit(ask("a mug", 1, steps=8, partial_images=3)).events())
        assert [type(event) for event in events] == [Partial] * 3 + [Picture]
        assert [(event.index, event.step, event.steps) for event in events[:-1]] == [(0, 2, 8), (1, 4, 8), (2, 6, 8)]
        target = np.asarray(events[-1].image, np.int16)
        far = [np.abs(np.asarray(event.image, np.int16) - target).mean() for event in events[:-1]]
        assert far[0] > far[-1] > 0

    @pytest.mark.parametrize(("steps", "count", "after"), [(8, 3, (2, 4, 6)), (1, 1, ()), (3, 3, (1, 2)), (9, 0, ())])
    def test_partial_pictures_are_spread_over_the_steps(self, steps, count, after):
        assert partial_steps(steps, count) == after


class TestBatches:
    def test_a_picture_does_not_depend_on_its_batch(self, engine, keys):
        one, two, three, four, five = keys
        requests = [
            ask("a photo of {} on grass", 1, (one,)),
            ask("a photo of {} on grass", 1, (two,), steps=9),
            ask("a photo of {} in snow", 2, (one,), guidance_scale=1.0),
            ask("{} and {}", 3, (three, two), scheduler="dpmsolver++", steps=6),
            ask("a photo of a mug", 1),
            ask("{}", 4, (four,), adapter_scale=0.4, scheduler="dpmsolver++"),
            ask("{}", 4, (five,), negative_prompt="red, blue", guidance_scale=9.0),
            ask("a photo of {} on grass", 1, (one,), partial_images=2),
            ask("a photo of {} on grass", 2, (one,), steps=1),
        ]
        batching = engine(slots=3)
        alone = [draw(batching, request).latents for request in requests]
        drawings = [batching.submit(request) for request in requests * 2]
        together = [drawing.result(WAIT).latents for drawing in drawings]
        assert batching.stats().batch_size.at_most[0] < batching.stats().batch_size.count
        for index, latents in enumerate(together):
            distances = [difference(latents, other) for other in alone]
            own = index % len(requests)
            assert distances[own] < 1e-3
            # The first request comes twice, once with partial pictures.
            same = {0, 7} if own in (0, 7) else {own}
            assert all(distance > 0.01 for other, distance in enumerate(distances) if other not in same)

    def test_a_request_joins_those_that_run_and_leaves_before_them(self, engine, keys):
        one = engine()
        long = running(one, keys[0])
        draw(one, ask("{}", 2, (keys[1],)))
        assert not long.done
        assert one.stats().batch_size.total > one.stats().batch_size.count

    def test_fewer_slots_than_places_still_draw_all(self, engine, keys):
        tight = engine(slots=1, batch_size=4)
        requests = [ask("{}", index, (keys[index % 3],)) for index in range(9)]
        drawings = [tight.submit(request) for request in requests]
        pictures = [drawing.result(WAIT) for drawing in drawings]
        roomy = engine(slots=4)
        for request, picture in zip(requests, pictures, strict=True):
            assert difference(picture.latents, draw(roomy, request).latents) < 1e-3
        assert tight.stats().resident == 1

    def test_no_host_memory_beyond_what_is_waited_for(self, engine, keys):
        tight = engine(slots=2, host_bytes=1)
        drawings = [
            tight.submit(ask("{} and {}", index, (keys[index % 5], keys[(index + 1) % 5]))) for index in range(9)
        ]
        assert len({drawing.result(WAIT).objects for drawing in drawings}) == 5
        assert tight.stats().hosted == 0


class TestSeveralObjects:
    def test_deltas_are_summed(self, engine, small, keys, random_adapter):
        """Against both LoRAs merged into a copy of the weights."""
        adapters = [random_adapter(small, n, 1 + n % RANK) for n in (2, 3)]
        picture = draw(engine(), ask("{} left of {}", 5, (keys[2], keys[3]), adapter_scale=0.5))
        merged = replace(small, unet=copy.deepcopy(small.unet))
        for adapter in adapters:
            for key in adapter.lora:
                layer = key.removesuffix(".lora_A.weight")
                if layer != key:
                    up = adapter.lora[f"{layer}.lora_B.weight"]
                    weight = merged.unet.get_submodule(layer).weight
                    weight.data += 0.5 * (up.flatten(1) @ adapter.lora[key].flatten(1)).view_as(weight)
        phrases = [f"{TOKEN_MARK} mug"] * 2
        embeddings = [adapter.embeddings for adapter in adapters]
        request = SampleSpec("{} left of {}", 5, phrases, embeddings, steps=STEPS, guidance_scale=4.0)
        assert difference(picture.latents, draw_latents(merged, [request])[0]) < 1e-3
        assert difference(picture.latents, draw_latents(small, [request])[0]) > 0.01

    def test_objects_of_a_scene_share_one_delta_and_keep_their_tokens(
        self, engine, small, put_adapter, random_adapter, tmp_path
    ):
        store, lora = ArtifactStore(str(tmp_path)), random_adapter(small, 1).lora
        vectors = [random_adapter(small, seed).embeddings for seed in (2, 3)]
        cup, jug = (
            put_adapter(store, small, name, 1, adapter=Adapter(lora, vector), digest="5" * 32, scene="table")
            for name, vector in zip(("cup", "jug"), vectors, strict=True)
        )
        alone = put_adapter(store, small, "alone", 1, adapter=Adapter(lora, vectors[0]))
        one = engine(store)
        both = draw(one, ask("{} and {}", 1, (cup, jug)))
        swapped = draw(one, ask("{} and {}", 1, (jug, cup)))
        assert difference(both.latents, swapped.latents) > 0.01
        twice = draw(one, ask("{} and {}", 1, (cup, cup)))
        assert difference(twice.latents, draw(one, ask("{} and {}", 1, (alone,))).latents) < 1e-3
        assert difference(twice.latents, both.latents) > 0.01

    def test_scale_zero_is_the_base_with_the_class_words(self, engine, keys):
        one = engine()
        off = draw(one, ask("{} and {}, red", 5, (keys[0], keys[1]), adapter_scale=0.0))
        assert difference(off.latents, draw(one, ask("mug and mug, red", 5)).latents) < 1e-3

    def test_more_objects_than_slots_are_refused(self, engine, keys):
        with pytest.raises(ObjdriveError, match="3 objects in one picture are too many: at most 2"):
            engine(slots=2).submit(ask("{} {} {}", 1, tuple(keys[:3])))


class TestSizes:
    def test_a_picture_does_not_depend_on_those_of_other_sizes(self, engine, keys):
        sizes = [(24, 16), (16, 16), (16, 32), None, (24, 16)]
        requests = [ask("{} on grass", 1, (keys[index % 2],), size=size) for index, size in enumerate(sizes)]
        one = engine()
        alone = [draw(one, request) for request in requests]
        assert [picture.image.size for picture in alone] == [size or (16, 16) for size in sizes]
        assert [picture.latents.shape[1:] for picture in alone[:3]] == [(8, 12), (8, 8), (16, 8)]
        together = [drawing.result(WAIT) for drawing in [one.submit(request) for request in requests]]
        for ours, theirs in zip(together, alone, strict=True):
            assert difference(ours.latents, theirs.latents) < 1e-3

    def test_together_they_have_no_more_pixels_than_a_batch_of_the_native_size(self, engine):
        tight = engine(batch_size=2)
        drawings = [tight.submit(ask("a mug", seed, size=(16, 32))) for seed in range(3)]
        for drawing in drawings:
            drawing.result(WAIT)
        sizes = tight.stats().batch_size
        assert sizes.at_most[0] == sizes.count == 3 * STEPS

    def test_a_long_drawing_of_one_size_does_not_hold_up_another(self, engine):
        one = engine()
        long = running(one, size=(16, 32))
        draw(one, ask("a mug", 2))
        assert not long.done

    def test_a_large_one_that_waits_for_the_store_keeps_nobody_out(self, engine, filled, keys):
        hangs = threading.Event()

        class Slow(ArtifactStore):
            def read(self, *args, **options):
                assert hangs.wait(WAIT)
                return super().read(*args, **options)

        slow = engine(Slow(filled[0].url), batch_size=2)
        try:
            long = running(slow)
            # Beside the long one there is no room for it.
            large = slow.submit(ask("{}", 1, (keys[0],), size=(16, 32)))
            draw(slow, ask("a mug", 2))
            assert not long.done
        finally:
            hangs.set()
        long.cancel()
        assert large.result(WAIT).image.size == (16, 32)

    @pytest.mark.parametrize("size", [(20, 16), (32, 32), (8, 0)])
    def test_sizes_that_the_base_does_not_draw_are_refused_at_once(self, engine, size):
        one = engine()
        with pytest.raises(ObjdriveError, match=f"size={size[0]}x{size[1]}"):
            one.submit(ask("a mug", 1, size=size))


class TestCancelling:
    def test_frees_the_place(self, engine, keys):
        one = engine(batch_size=1, slots=1)
        long = running(one, keys[0])
        waits = one.submit(ask("{}", 1, (keys[1],)))
        assert not waits.done
        long.cancel()
        assert waits.result(WAIT).objects == (keys[1],)
        with pytest.raises(Cancelled):
            long.result(WAIT)
        assert one.stats().requests == {"cancelled": 1, "drawn": 1}
        assert one.stats().batch_size.count < LONG

    def test_of_one_that_waits(self, engine, keys):
        one = engine(batch_size=1, queue_limit=1)
        long = running(one)
        waits = one.submit(ask("{}", 1, (keys[1],)))
        waits.cancel()
        with pytest.raises(Cancelled):
            list(waits.events())
        assert one.stats().waiting == 0
        again = one.submit(ask("{}", 1, (keys[1],)))
        long.cancel()
        assert again.result(WAIT).seed == 1

    def test_of_one_that_is_done_changes_nothing(self, engine):
        one = engine()
        drawing = one.submit(ask("a mug", 1))
        picture = drawing.result(WAIT)
        drawing.cancel()
        assert drawing.result() is picture
        assert one.stats().requests == {"drawn": 1}


class TestLimits:
    def test_a_full_queue_says_when_to_come_back(self, engine):
        one = engine(batch_size=1, queue_limit=2)
        long = running(one)
        admitted = [one.submit(ask("a mug", seed)) for seed in range(2)]
        with pytest.raises(QueueFull, match="2 requests wait already") as refusal:
            one.submit(ask("a mug", 3))
        assert 1 <= refusal.value.retry_after <= 60
        assert pickle.loads(pickle.dumps(refusal.value)).retry_after == refusal.value.retry_after
        assert one.stats().requests == {"queue_full": 1}
        long.cancel()
        assert [drawing.result(WAIT).seed for drawing in admitted] == [0, 1]

    def test_what_waits_for_the_store_takes_no_place_of_the_others(self, engine, filled, keys):
        hangs = threading.Event()

        class Slow(ArtifactStore):
            def read(self, *args, **options):
                assert hangs.wait(WAIT)
                return super().read(*args, **options)

        slow = engine(Slow(filled[0].url), queue_limit=2)
        try:
            cold = [slow.submit(ask("a photo of {}", seed, (keys[seed],))) for seed in range(2)]
            with pytest.raises(QueueFull):
                slow.submit(ask("a photo of {}", 3, (keys[3],)))
            for seed in range(4):
                assert draw(slow, ask("a mug", seed)).image
        finally:
            hangs.set()
        assert [drawing.result(WAIT).objects for drawing in cold] == [(keys[0],), (keys[1],)]

    def test_draining_finishes_what_was_taken(self, engine, keys):
        one = engine(batch_size=1)
        drawings = [one.submit(ask("{}", seed, (keys[seed],))) for seed in range(3)]
        one.drain()
        assert all(drawing.done for drawing in drawings)
        assert [drawing.result().seed for drawing in drawings] == [0, 1, 2]
        with pytest.raises(Draining):
            one.submit(ask("a mug", 1))

    def test_closing_ends_everything_and_leaves_the_base_alone(self, engine, small, keys):
        one = engine(batch_size=1)
        long, waits = running(one, keys[0]), one.submit(ask("a mug", 1))
        one.close()
        one.close()
        for drawing in (long, waits):
            with pytest.raises(Draining):
                drawing.result(WAIT)
        assert not any(module._forward_hooks for module in small.unet.modules())

    @pytest.mark.parametrize(
        ("fields", "error", "message"),
        [
            ({"prompt": "a {}"}, InvalidPrompt, "1 places {} for 0 object"),
            ({"prompt": "a \0"}, InvalidPrompt, "holds a NUL character"),
            ({"negative_prompt": "a \0"}, InvalidPrompt, "holds a NUL character"),
            ({"prompt": "a" * 4001}, InvalidPrompt, "4001 characters is too long: at most 4000"),
            ({"steps": 0}, ObjdriveError, "steps=0 must be at least 1 and at most 998"),
            ({"steps": 999}, ObjdriveError, "steps=999"),
            ({"seed": -1}, ObjdriveError, "seed=-1"),
            ({"seed": 2**63}, ObjdriveError, "seed="),
            ({"guidance_scale": 0.9}, ObjdriveError, "guidance_scale=0.9 must be at least 1 and at most 100"),
            ({"guidance_scale": float("nan")}, ObjdriveError, "guidance_scale=nan"),
            ({"adapter_scale": -0.1}, ObjdriveError, "adapter_scale=-0.1"),
            ({"adapter_scale": float("inf")}, ObjdriveError, "adapter_scale=inf"),
            ({"partial_images": -1}, ObjdriveError, "partial_images=-1"),
            ({"scheduler": "euler"}, ObjdriveError, "'euler' must be one of ddim, dpmsolver"),
            ({"objects": (ArtifactKey("../x", "0" * 32),)}, UnknownObject, "'../x@0"),
            ({"objects": (ArtifactKey("x", "0"),)}, UnknownObject, "not of the form object_id@digest"),
        ],
    )
    def test_what_can_never_be_drawn_is_refused_at_once(self, engine, fields, error, message):
        with pytest.raises(error, match=message) as refusal:
            engine().submit(ask(**{"prompt": "a mug", "seed": 1} | fields))
        assert type(refusal.value) is error

    @pytest.mark.parametrize(
        ("prompt", "message"),
        [("{} {} {}", r"3 places {} for 2 object"), ("red " * 99 + "{} {}", r"takes 10\d tokens, the base reads 77")],
    )
    def test_prompts_that_do_not_fit_their_objects(self, engine, keys, prompt, message):
        with pytest.raises(InvalidPrompt, match=message):
            draw(engine(), ask(prompt, 1, tuple(keys[:2])))

    @pytest.mark.parametrize("name", ["batch_size", "slots", "queue_limit"])
    def test_settings_are_checked(self, engine, name):
        with pytest.raises(ObjdriveError, match=f"{name}=0 must be at least 1"):
            engine(**{name: 0})


class TestFaults:
    def test_a_bad_artifact_fails_its_own_requests_only(self, engine, small, put_adapter, tmp_path):
        store = ArtifactStore(str(tmp_path), attempts=1)
        good, cut, flipped = (
            put_adapter(store, small, name, seed) for seed, name in enumerate(("good", "cut", "flip"))
        )
        other = put_adapter(store, small, "other", 3, base={"id": "sd15", "fingerprint": "0" * 32})
        for key, change in ((cut, lambda data: data[:-7]), (flipped, lambda data: data[:-1] + bytes([data[-1] ^ 1]))):
            path = Path(store.folder(key.object_id, key.digest)) / LORA_FILE
            path.write_bytes(change(path.read_bytes()))
        expected = {
            good: None,
            cut: CorruptArtifact,
            flipped: CorruptArtifact,
            other: WrongBase,
            ArtifactKey("absent", "0" * 32): UnknownObject,
        }
        one = engine(store)
        drawings = {key: one.submit(ask("{}", 1, (key,))) for key in expected}
        with_cut = one.submit(ask("{} {}", 1, (good, cut)))
        for key, drawing in drawings.items():
            if expected[key]:
                with pytest.raises(expected[key]):
                    drawing.result(WAIT)
            else:
                assert drawing.result(WAIT).objects == (key,)
        with pytest.raises(CorruptArtifact):
            with_cut.result(WAIT)
        counted = {"drawn": 1, "corrupt_artifact": 3, "wrong_base": 1, "unknown_object": 1}
        assert one.stats().requests == counted
        assert one.stats().resident == one.stats().hosted == 1

    def test_a_store_that_is_gone_and_comes_back(self, engine, small, put_adapter, tmp_path):
        store = ArtifactStore(str(tmp_path / "store"), attempts=1)
        resident, cold = put_adapter(store, small, "resident", 1), put_adapter(store, small, "cold", 2)
        one = engine(store)
        draw(one, ask("{}", 1, (resident,)))
        (tmp_path / "store").rename(tmp_path / "away")
        (tmp_path / "store").write_text("not a folder")
        with pytest.raises(StoreError):
            draw(one, ask("{}", 1, (cold,)))
        draw(one, ask("{}", 1, (resident,)))
        (tmp_path / "store").unlink()
        (tmp_path / "away").rename(tmp_path / "store")
        assert draw(one, ask("{}", 1, (cold,))).objects == (cold,)

    def test_a_retrained_object_is_drawn_by_its_new_artifact(self, engine, small, put_adapter, tmp_path):
        store = ArtifactStore(str(tmp_path))
        one, seen = engine(store), []
        for seed in range(2):
            key = put_adapter(store, small, "mug-1", seed)
            seen.append(draw(one, ask("{}", 1, (key,))))
        assert seen[0].objects != seen[1].objects
        assert difference(seen[0].latents, seen[1].latents) > 0.01
        assert difference(draw(one, ask("{}", 1, seen[0].objects)).latents, seen[0].latents) < 1e-3

    def test_a_failing_device_fails_the_batch_and_not_the_next(self, engine, small, keys, caplog):
        def fail(*_):
            hook.remove()
            raise torch.OutOfMemoryError("no memory left")

        one = engine()
        hook = small.unet.register_forward_pre_hook(fail)
        with pytest.raises(DrawingFailed, match="OutOfMemoryError"):
            draw(one, ask("{}", 1, (keys[0],)))
        assert "no memory left" in caplog.text
        assert draw(one, ask("{}", 1, (keys[0],))).objects == (keys[0],)

    def test_values_that_are_not_finite_fail_their_own_request_only(
        self, engine, small, put_adapter, random_adapter, tmp_path
    ):
        store, adapter = ArtifactStore(str(tmp_path)), random_adapter(small, 1)
        huge = Adapter({key: value * 1e30 for key, value in adapter.lora.items()}, adapter.embeddings)
        bad, good = put_adapter(store, small, "bad", 1, adapter=huge), put_adapter(store, small, "good", 2)
        one = engine(store)
        expected = draw(one, ask("{}", 1, (good,)))
        long = running(one)
        drawings = [one.submit(ask("{}", 1, (key,))) for key in (bad, good)]
        with pytest.raises(DrawingFailed, match="not finite"):
            drawings[0].result(WAIT)
        assert difference(drawings[1].result(WAIT).latents, expected.latents) < 1e-3
        shown = one.submit(ask("{}", 1, (bad,), steps=LONG, partial_images=LONG - 1))
        with pytest.raises(DrawingFailed, match="not finite"):
            shown.result(WAIT)
        assert not long.done


class TestHandles:
    def test_any_number_of_readers_get_all_events(self, engine):
        drawing, seen = engine().submit(ask("a mug", 1, partial_images=2)), []
        readers = [threading.Thread(target=lambda: seen.append(list(drawing.events()))) for _ in range(3)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        late = list(drawing.events())
        assert [type(event) for event in late] == [Partial, Partial, Picture]
        assert all(events == late for events in seen)

    def test_asyncio_can_wait_without_a_thread(self, engine):
        async def collect(drawing):
            queue, loop = asyncio.Queue(), asyncio.get_running_loop()
            drawing.subscribe(lambda event: loop.call_soon_threadsafe(queue.put_nowait, event))
            events = [await queue.get()]
            while isinstance(events[-1], Partial):
                events.append(await queue.get())
            return events

        one = engine()
        drawing = one.submit(ask("a mug", 1, partial_images=2))
        for _ in range(2):  # while it is drawn, and after
            assert [type(event) for event in asyncio.run(collect(drawing))] == [Partial, Partial, Picture]
        failed = one.submit(ask("{}", 1, (ArtifactKey("absent", "0" * 32),)))
        assert [type(event) for event in asyncio.run(collect(failed))] == [UnknownObject]

    def test_a_subscriber_that_fails_does_not_harm_the_picture(self, engine, caplog):
        drawing = engine().submit(ask("a mug", 1))
        drawing.subscribe(lambda event: {}["loop is closed"])
        assert drawing.result(WAIT).seed == 1
        drawing.subscribe(lambda event: None)
        assert "a subscriber to a drawing failed on Picture" in caplog.text

    def test_a_slow_reader_holds_up_no_step(self, engine, small):
        one, passes, told = engine(), [], []
        last = threading.Event()

        def count(*_):
            passes.append(1)
            if len(passes) == STEPS:
                last.set()

        hook = small.unet.register_forward_pre_hook(count)
        try:
            drawing = one.submit(ask("a mug", 1, partial_images=1))
            drawing.subscribe(lambda event: told.append(last.wait(WAIT)))
            assert drawing.result(2 * WAIT).seed == 1
        finally:
            hook.remove()
        # The partial picture was still being told when the last step began.
        assert told[0]

    def test_waiting_can_time_out(self, engine):
        drawing = running(engine())
        with pytest.raises(TimeoutError, match=r"no picture within 0\.01 s"):
            drawing.result(0.01)
        assert not drawing.done


def test_stats_count_what_happened(engine, keys):
    one = engine(batch_size=4)
    for drawing in [one.submit(ask("{}", 1, (key,))) for key in (keys[0], keys[0], keys[1])]:
        drawing.result(WAIT)
    one.drain()
    stats = one.stats()
    assert stats.requests == {"drawn": 3}
    assert (stats.waiting, stats.running) == (0, 0)
    assert sum(stats.hits.values()) == stats.queue_seconds.count == 3
    assert stats.resident == stats.hosted == stats.swap_seconds.count == 2
    assert stats.batch_size.total == 3 * STEPS
    assert stats.step_seconds.count == stats.batch_size.count >= STEPS
    assert stats.hosted_bytes > 0
