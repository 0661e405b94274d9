"""Status page: public static files that require the token before they show any run.

Nothing is loaded from other sites and only the page's own scripts run; the content security policy makes the browser
enforce this.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files

from fastapi import APIRouter, Response

_MEDIA_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "client.js": "text/javascript; charset=utf-8",
    "curves.js": "text/javascript; charset=utf-8",
    "chart.js": "text/javascript; charset=utf-8",
    "numbers.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def _path(name: str) -> str:
    return "/" if name == "index.html" else f"/static/{name}"


PUBLIC_PATHS = tuple(map(_path, _MEDIA_TYPES))
"""Paths of the page's static files, which are served without the token."""


def page_router() -> APIRouter:
    """Return the routes of the page's files, which are read once, here; request paths are never used as file paths."""
    router = APIRouter(include_in_schema=False)
    for name, media_type in _MEDIA_TYPES.items():
        content = (files("hyperagent_trainer.control") / "static" / name).read_bytes()
        router.add_api_route(_path(name), _answer_with(content, media_type))
    return router


def _answer_with(content: bytes, media_type: str) -> Callable[[], Response]:
    def answer() -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return answer
