"""Objects that are drawn and retrained at once, and the pictures that they must give."""

import threading
from collections import Counter
from dataclasses import replace

import torch

from objdrive.adapters.adapter import parse_adapter
from objdrive.adapters.bank import AdapterBank
from objdrive.base.prompts import marked_phrase
from objdrive.sampling.sampler import Layout, SampleSpec, draw_latents

VERSIONS = 2
STYLES = [
    {"steps": 2, "guidance_scale": 4.0, "scheduler": "ddim"},
    {"steps": 2, "guidance_scale": 1.0, "scheduler": "ddim"},
    {"steps": 3, "guidance_scale": 2.0, "scheduler": "dpmsolver++"},
]


class Catalog:
    """Objects that are retrained again and again while they are drawn.

    Args:
        commit: called with an object's number and version; commits that artifact, and returns its key.
    """

    def __init__(self, store, objects, commit):
        self._store = store
        self._versions = Counter()
        self._lock = threading.Lock()
        self._keys = [[commit(number, version) for version in range(VERSIONS)] for number in range(objects)]
        self.retrainings = 0
        for keys in self._keys:
            store.point(keys[0].object_id, keys[0].digest)

    def current(self, number):
        with self._lock:
            return self._keys[number][self._versions[number] % VERSIONS]

    def retrain(self, number):
        with self._lock:
            self._versions[number] += 1
            self.retrainings += 1
            key = self._keys[number][self._versions[number] % VERSIONS]
            self._store.point(key.object_id, key.digest)

    def some(self, dice):
        """One object's number or, now and then, two."""
        # Long-tailed, as catalogs are: half of all requests are for a tenth of the objects.
        objects = len(self._keys)
        number = dice.randrange(max(1, objects // 10)) if dice.random() < 0.5 else dice.randrange(objects)
        several = dice.random() < 0.1
        return [(number + offset) % objects for offset in range(1 + several)]


def draw_alone(base, store, request):
    """The latents (C, h, h) that the sampler gives a `DrawRequest`, with nothing beside it and nothing kept."""
    artifacts = [store.read(key.object_id, key.digest) for key in request.objects]
    adapters = [parse_adapter(files, token=metadata.token, family=base.family) for metadata, files in artifacts]
    alone = SampleSpec(
        request.prompt,
        request.seed,
        [marked_phrase(metadata.phrase, metadata.class_name, token=metadata.token) for metadata, _ in artifacts],
        [adapter.embeddings for adapter in adapters],
        dict.fromkeys(range(len(adapters)), 1.0),
        layout=Layout.of(
            [metadata.layout_noise for metadata, _ in artifacts],
            [metadata.class_name for metadata, _ in artifacts],
            [{slot: 1.0} for slot in range(len(adapters))],
        ),
        steps=request.steps,
        guidance_scale=request.guidance_scale,
        scheduler=request.scheduler,
    )
    with AdapterBank(
        base.unet, base.family.lora_targets, slots=len(adapters), rank=max(adapter.rank for adapter in adapters)
    ) as bank:
        for slot, adapter in enumerate(adapters):
            bank.load(slot, adapter.lora)
        return draw_latents(base, [alone], bank=bank)[0]


def least_difference(expected):
    """Between any two pictures that differ in their objects alone, the largest difference of elements: the least.

    Args:
        expected: tensor by `DrawRequest`.
    """
    alike = {}
    for request, picture in expected.items():
        alike.setdefault(replace(request, objects=()), []).append(picture.flatten())
    return min(float(torch.pdist(torch.stack(pictures), p=float("inf")).min()) for pictures in alike.values())
