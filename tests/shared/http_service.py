"""Run a small service for the tests of the HTTP server: `python http_service.py PORT`."""

from __future__ import annotations

import sys
import time

from fastapi import Request

from hyperagent.errors import Conflict
from hyperagent.http.app import create_app
from hyperagent.http.server import listening, run
from hyperagent.logs import configure_logging

configure_logging(service="test")
app = create_app(title="test", version="1", token="secret", max_body_bytes=1000)


@app.post("/length")
async def length(request: Request) -> dict[str, int]:
    return {"length": len(await request.body())}


@app.get("/slow")
def slow() -> dict[str, str]:
    sys.stderr.write("slow has begun\n")
    sys.stderr.flush()
    time.sleep(1.0)
    return {"slow": "done"}


@app.get("/conflict")
def conflict() -> None:
    raise Conflict("the run is not stopped; stop it first")


with listening(host="127.0.0.1", port=int(sys.argv[1]), allow_remote=False) as listener:
    run(app, listener)
