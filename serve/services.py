"""What the API is made over."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from serve.auth import Gate
from serve.catalog import Catalog
from serve.drawing import Generators
from serve.guard import Drain
from serve.kept import Kept
from serve.metrics import Meter
from serve.objects import Objects
from serve.results import Results
from serve.signing import Signer

_DECODED_AT_ONCE = 2


@dataclass
class Services:
    """What the API is made over; one for each app.

    Attributes:
        generators: draw the pictures.
        objects: what the store says of an object.
        catalog: which objects there are.
        gate: who may ask.
        signer: of links to pictures.
        meter: takes the API's measurements.
        drain: begun when the server shuts down.
        results: pictures for links.
        kept: pictures of requests whose answer came too late.
        decoding: taken while a client's picture is decoded, which takes memory.
        model_aliases: other names of models, and what each stands for.
        public_url: the server's address as clients see it; empty: the one that each request was sent to.
        draw_seconds: a picture's time limit, counted from its request.
    """

    generators: Generators
    objects: Objects
    catalog: Catalog
    gate: Gate
    signer: Signer
    meter: Meter
    drain: Drain = field(default_factory=Drain)
    results: Results = field(default_factory=Results)
    kept: Kept = field(default_factory=Kept)
    decoding: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_DECODED_AT_ONCE))
    model_aliases: Mapping[str, str] = field(default_factory=dict)
    public_url: str = ""
    draw_seconds: float = 120.0
