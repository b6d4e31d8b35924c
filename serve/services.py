"""What the API is made over."""

from dataclasses import dataclass, field

from serve.auth import Gate
from serve.catalog import Catalog
from serve.drain import Drain
from serve.drawing import Generators
from serve.metrics import Meter
from serve.objects import Objects
from serve.results import Results
from serve.signing import Signer


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
        public_url: the server's address as clients see it; empty: the one that each request was sent to.
        draw_seconds: a picture's time limit, counted from its request.
        metrics: whether a server of one process answers `/metrics`.
    """

    generators: Generators
    objects: Objects
    catalog: Catalog
    gate: Gate
    signer: Signer
    meter: Meter
    drain: Drain = field(default_factory=Drain)
    results: Results = field(default_factory=Results)
    public_url: str = ""
    draw_seconds: float = 120.0
    metrics: bool = True
