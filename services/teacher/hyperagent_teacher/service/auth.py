"""Bearer-token authentication for gRPC calls."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import grpc

from hyperagent.auth import is_authorized
from hyperagent.wire.errors import rich_details

_HEALTH = "/grpc.health.v1.Health/"


class RequireToken(grpc.aio.ServerInterceptor):
    """Refuses every call without the bearer token, except to the health service, which orchestrators call without it."""

    def __init__(self, token: str) -> None:
        self._token = token

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Continue to the method if the call is authorized, otherwise to a refusal."""
        header = dict(handler_call_details.invocation_metadata).get("authorization")
        if handler_call_details.method.startswith(_HEALTH) or is_authorized(header, self._token):
            return await continuation(handler_call_details)
        return grpc.stream_stream_rpc_method_handler(_refuse)


async def _refuse(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
    # A client that is still sending its first message might never receive the status (grpc/grpc#36066).
    await anext(requests, None)
    code, message = grpc.StatusCode.UNAUTHENTICATED, "no valid access token; send it as `authorization: Bearer TOKEN`"
    await context.abort(code, message, rich_details(code, message, "UNAUTHENTICATED"))
