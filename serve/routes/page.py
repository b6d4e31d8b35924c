"""The page, and its content security policy."""

import base64
import hashlib
import re
from functools import cache
from importlib import resources

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

router = APIRouter(include_in_schema=False)


@router.get("/")
async def show_page() -> HTMLResponse:
    """The page: one HTML file that loads nothing from elsewhere."""
    html = _html()
    headers = {"content-security-policy": content_security_policy(html), "cache-control": "no-cache"}
    return HTMLResponse(html, headers=headers)


def content_security_policy(html: str) -> str:
    """What the page may do: run its own inline scripts, known by their hash, and talk to this server."""
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", html, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes) or "'none'"
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src 'self' data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


@cache
def _html() -> str:
    return resources.files("serve").joinpath("page.html").read_text(encoding="utf-8")
