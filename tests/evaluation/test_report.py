import base64
import re
from html.parser import HTMLParser

import pytest

from objdrive.evaluation.report import CaptionedPicture, Failure, Report, ReportedObject, render

NASTY = "<script>alert(\"1\")</script> & 'co'"


class Page(HTMLParser):
    """What a browser would see: tags with attributes, and texts by enclosing tag."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.texts, self._open = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self._open[-1] if self._open else "", data))

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    def text(self, tag):
        return [data for name, data in self.texts if name == tag]


def an_object(object_id="mug-1", class_name="mug", **fields):
    return ReportedObject(object_id, class_name, "committed", "0123abcd" * 4, **fields)


def a_report(**fields):
    return Report(**{"title": "What came out", "facts": [("store", "s3://out")], "counts": {"committed": 1}} | fields)


def test_an_empty_run_makes_a_whole_page():
    page = Page(render(a_report(counts={})))
    assert page._open == []
    assert page.text("title") == ["What came out"]
    assert not page.all("table")


def test_facts_counts_objects_and_failures_are_there():
    page = Page(
        render(
            a_report(
                counts={"committed": 1234567, "rejected": 1},
                objects=[an_object(note="the base does not know 'mug'")],
                failures=[Failure("lamp-1", "row 7", "mask_empty", "the mask is empty")],
            )
        )
    )
    texts = [data for _, data in page.texts]
    for expected in ("s3://out", "1,234,567", "mug-1", "0123abcd" * 4, "the base does not know 'mug'"):
        assert expected in texts
    assert page.text("td") == ["row 7", "lamp-1", "the mask is empty"]
    assert "mask_empty" in page.text("code")


def test_nothing_from_the_manifest_becomes_markup():
    html = render(
        Report(
            title=NASTY,
            facts=[(NASTY, NASTY)],
            counts={NASTY: 1},
            objects=[ReportedObject(NASTY, NASTY, NASTY, NASTY, NASTY, [CaptionedPicture(NASTY, b"webp")])],
            failures=[Failure(NASTY, NASTY, NASTY, NASTY)],
        )
    )
    page, plain = Page(html), Page(render(a_report(objects=[an_object()])))
    assert html.count("<script>") == render(a_report()).count("<script>") == 1
    assert len(page.all("script")) == len(plain.all("script")) == 1
    assert page._open == []
    assert page.all("section")[0] == {"class": "object", "data-class": NASTY}
    assert page.all("img")[0]["alt"] == NASTY
    assert page.text("td") == [NASTY, NASTY, NASTY]
    assert NASTY in page.text("b")
    assert page.text("option") == ["all", NASTY]


def test_pictures_are_part_of_the_page():
    webp = bytes(range(256))
    page = Page(
        render(
            a_report(
                objects=[an_object(pictures=[CaptionedPicture("on grass", webp), CaptionedPicture("at sea", b"2")])]
            )
        )
    )
    sources = [image["src"] for image in page.all("img")]
    assert [base64.b64decode(source.removeprefix("data:image/webp;base64,")) for source in sources] == [webp, b"2"]
    assert page.text("figcaption") == ["on grass", "at sea"]


def test_the_page_loads_nothing_from_anywhere():
    html = render(a_report(facts=[], objects=[an_object(pictures=[CaptionedPicture("on grass", b"webp")])]))
    page = Page(html)
    loading = ("src", "href", "srcset", "data", "action")
    loaded = [attrs[key] for _, attrs in page.tags for key in loading if key in attrs]
    assert loaded == ["data:image/webp;base64,d2VicA=="]
    assert not re.search(r"//|url\(|@import|fetch", html)
    assert not page.all("link")
    assert not any(attrs.get("src") for attrs in page.all("script"))


def test_the_class_filter_offers_each_class_once():
    objects = [an_object(f"o-{i}", name) for i, name in enumerate(["wine glass", "mug", "wine glass"])]
    page = Page(render(a_report(objects=objects)))
    assert page.text("option") == ["all", "mug", "wine glass"]
    assert [section["data-class"] for section in page.all("section")] == ["wine glass", "mug", "wine glass"]
    assert page.all("select") == [{"id": "class"}]


@pytest.mark.parametrize(
    ("counts", "headings"),
    [
        ({"committed": 2, "rejected": 1}, ["Rows without an adapter", "Objects"]),
        (
            {"committed": 1500, "already there": 500, "rejected": 9, "failed": 1},
            ["Rows without an adapter (the first 1 of 10)", "Objects (the first 2 of 2,000)"],
        ),
    ],
)
def test_the_page_says_when_it_shows_the_first_ones_only(counts, headings):
    failures = [Failure("lamp-1", "row 7", "mask_empty", "the mask is empty")]
    page = Page(render(a_report(counts=counts, objects=[an_object("a"), an_object("b")], failures=failures)))
    assert page.text("h2") == headings
