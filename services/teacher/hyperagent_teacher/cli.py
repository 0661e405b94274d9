"""The command `hyperagent serve teacher`."""

from __future__ import annotations

import os
import sys

from hyperagent.auth import ensure_token
from hyperagent.cli.service_command import service_command
from hyperagent.logs import configure_logging
from hyperagent.services import Service
from hyperagent_teacher.config import TeacherSettings


@service_command(Service.TEACHER, TeacherSettings)
def serve(settings: TeacherSettings) -> None:
    """Serve a teacher over gRPC: score token sequences and fill the cache with its top-k rows."""
    configure_logging(service="teacher")
    # gRPC's core logs to standard error; problems that the user can fix already arrive as errors.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # a progress bar would break up the log's JSON lines
    from hyperagent_teacher.service.server import serve as serve_teacher  # importing torch takes seconds

    serve_teacher(settings, token=ensure_token())
