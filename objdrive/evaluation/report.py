"""The contact sheet: one self-contained HTML page that shows what came out of a run."""

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --muted: #777; --bad: #c33; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 75rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 0 0 .3rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.muted { color: var(--muted); } .bad { color: var(--bad); }
.counts { display: flex; flex-wrap: wrap; gap: 1.5rem; margin: 1rem 0; }
.counts b { font-size: 1.4rem; display: block; }
label { display: inline-block; margin: .5rem 0; } select { font: inherit; padding: .2rem; }
.object { border-top: 1px solid var(--line); padding: .8rem 0; }
.pictures { display: flex; flex-wrap: wrap; gap: .6rem; margin-top: .5rem; }
figure { margin: 0; width: 128px; } figcaption { font-size: .75rem; color: var(--muted); overflow-wrap: anywhere; }
img { width: 128px; height: 128px; object-fit: contain; background: #8882; display: block; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; padding: .3rem .6rem .3rem 0;
border-top: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; } code { font-size: .85em; }
"""
_SCRIPT = """
document.getElementById('class').addEventListener('change', event => {
  for (const object of document.querySelectorAll('.object'))
    object.hidden = event.target.value !== '' && object.dataset.class !== event.target.value;
});
"""


@dataclass(frozen=True)
class Picture:
    """A WebP picture and what it shows."""

    caption: str
    webp: bytes


@dataclass(frozen=True)
class ReportedObject:
    """One object of the report; `note` is a warning or empty."""

    object_id: str
    class_name: str
    status: str
    digest: str
    note: str = ""
    pictures: Sequence[Picture] = ()


@dataclass(frozen=True)
class Failure:
    """One row that came to nothing."""

    object_id: str
    where: str
    code: str
    message: str


@dataclass(frozen=True)
class Report:
    """What the page says: a title, facts as (name, value), counts by outcome, objects, failures.

    `objects` and `failures` may be the first ones only; the counts say how many there are in all.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    counts: dict[str, int]
    objects: Sequence[ReportedObject] = field(default=())
    failures: Sequence[Failure] = field(default=())


def render(report: Report) -> str:
    """Return the page, which loads nothing from anywhere."""
    return page(report.title, report.facts, _parts(report))


def page(title: str, facts: Sequence[tuple[str, str]], parts: Iterable[str], *, style: str = "") -> str:
    """A whole page around `parts` (HTML, as are the rules in `style`), below its title and facts (plain text)."""
    body = "".join(parts)
    return "".join(
        (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{_STYLE}{style}</style></head><body>",
            f"<h1>{escape(title)}</h1>",
            '<div class="muted">',
            "<br>".join(f"{escape(k)}: <code>{escape(v)}</code>" for k, v in facts),
            f"</div>{body}</body></html>",
        )
    )


def _parts(report: Report) -> Iterable[str]:
    yield '<div class="counts">'
    yield "".join(f"<div><b>{count:,}</b>{escape(name)}</div>" for name, count in report.counts.items())
    yield "</div>"
    yield from _failures(report)
    yield from _objects(report)
    yield f"<script>{_SCRIPT}</script>"


def _failures(report: Report) -> Iterable[str]:
    if not report.failures:
        return
    total = report.counts.get("rejected", 0) + report.counts.get("failed", 0)
    yield f'<h2 class="bad">Rows that came to nothing{_of(len(report.failures), total)}</h2><table>'
    yield "<tr><th>row</th><th>object</th><th>reason</th><th>message</th></tr>"
    for failure in report.failures:
        yield f"<tr><td>{escape(failure.where)}</td><td>{escape(failure.object_id)}</td>"
        yield f"<td><code>{escape(failure.code)}</code></td><td>{escape(failure.message)}</td></tr>"
    yield "</table>"


def _objects(report: Report) -> Iterable[str]:
    total = sum(count for name, count in report.counts.items() if name not in ("rejected", "failed"))
    yield f"<h2>Objects{_of(len(report.objects), total)}</h2>"
    yield '<label>Class <select id="class"><option value="">all</option>'
    for name in sorted({shown.class_name for shown in report.objects}):
        yield f"<option>{escape(name)}</option>"
    yield "</select></label>"
    for shown in report.objects:
        yield f'<section class="object" data-class="{escape(shown.class_name)}">'
        yield f"<b>{escape(shown.object_id)}</b> · {escape(shown.class_name)} · {escape(shown.status)} "
        yield f'<code class="muted">{escape(shown.digest)}</code>'
        if shown.note:
            yield f'<div class="bad">{escape(shown.note)}</div>'
        yield '<div class="pictures">' + "".join(map(figure, shown.pictures)) + "</div></section>"


def figure(picture: Picture) -> str:
    """A picture with its caption, held in the page itself."""
    data = base64.b64encode(picture.webp).decode()
    caption = escape(picture.caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/webp;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


def _of(shown: int, total: int) -> str:
    return f" (the first {shown:,} of {total:,})" if shown < total else ""
