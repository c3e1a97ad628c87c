"""Console page: a single file, with a content security policy that allows only its own inline script and style."""

import base64
import re
from functools import cache
from hashlib import sha256
from importlib.resources import files

from fastapi import Response

_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


@cache
def _page() -> tuple[str, dict[str, str]]:
    """HTML of the page, and its headers."""
    html = files("query.api").joinpath("console.html").read_text(encoding="utf-8")
    hashes = {tag: base64.b64encode(sha256(text.encode()).digest()).decode() for tag, text in _INLINE.findall(html)}
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src 'sha256-{hashes['script']}'",
            f"style-src 'sha256-{hashes['style']}'",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
    return html, {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


async def console() -> Response:
    """Serve the console, a browser client of the query API."""
    html, headers = _page()
    return Response(html, headers=headers, media_type="text/html")
