"""`hyperagent serve trainer`: run the control process of the trainer."""

from __future__ import annotations

from hyperagent.auth import ensure_token
from hyperagent.cli.service_command import service_command
from hyperagent.logs import configure_logging
from hyperagent.services import Service
from hyperagent_trainer.control.settings import ControlSettings


@service_command(Service.TRAINER, ControlSettings)
def serve(settings: ControlSettings) -> None:
    """Serve the trainer's control endpoint: start, monitor, stop and resume training runs."""
    from hyperagent.http.server import listening, run

    configure_logging(service="trainer-control")
    # The port is bound before the runs folder is touched, so that a busy port has no side effects.
    with listening(host=settings.host, port=settings.port, allow_remote=settings.allow_remote) as listener:
        from hyperagent_trainer.control.app import create_control_app
        from hyperagent_trainer.control.supervisor import Supervisor

        supervisor = Supervisor(settings)
        app = create_control_app(supervisor, token=ensure_token())
        run(app, listener, allowed_hosts=settings.allowed_hosts, on_stop=supervisor.begin_close)
