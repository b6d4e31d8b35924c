"""What the API is made over."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from serve.auth import Gate
from serve.catalog import Catalog
from serve.drain import Drain
from serve.drawing import Generators
from serve.kept import Kept
from serve.metrics import Meter
from serve.objects import Objects
from serve.pools import Pool
from serve.results import Results
from serve.signing import Signer
from serve.uploads import Uploads

# A picture that a client sends may take half a gigabyte while it is decoded.
_DECODED_AT_ONCE = 2
_FINISHED_AT_ONCE = 2
_READ_AT_ONCE = 4


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
        decoding: threads that decode clients' pictures and place objects in them.
        finishing: threads that make the file that a client asked for.
        uploads: the memory of clients' pictures.
        photos: threads that read objects' own photos, from wherever those are.
        model_aliases: other names of models, and what each stands for.
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
    kept: Kept = field(default_factory=Kept)
    decoding: Pool = field(default_factory=lambda: Pool(_DECODED_AT_ONCE, "decode"))
    finishing: Pool = field(default_factory=lambda: Pool(_FINISHED_AT_ONCE, "finish"))
    uploads: Uploads = field(default_factory=Uploads)
    photos: Pool = field(default_factory=lambda: Pool(_READ_AT_ONCE, "photos"))
    model_aliases: Mapping[str, str] = field(default_factory=dict)
    public_url: str = ""
    draw_seconds: float = 120.0
    metrics: bool = True
