"""Implement the gRPC methods: decode the request, call the domain code and encode the response.

Responses are written rather than yielded: a canceled call then always raises inside the method, so the engine's
generator is closed at once. A generator method would stay suspended at its yield until it is garbage-collected.

Rows do not wait in memory for their reader: the engine's are put into a response buffer on disk, and written from there.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import grpc
import numpy as np
import structlog
from numpy.typing import NDArray

from hyperagent.errors import BeyondEnd, HyperagentError, InvalidRequest
from hyperagent.identity import DataIdentity, TokenizerIdentity, require_same
from hyperagent.wire import conversion, teacher_pb2_grpc
from hyperagent.wire import teacher_pb2 as pb
from hyperagent.wire.errors import refusal, rich_details
from hyperagent_teacher.engines.base import ScoringEngine, require_scorable, score_from
from hyperagent_teacher.service.admission import Admission
from hyperagent_teacher.service.memory_budget import MemoryBudget
from hyperagent_teacher.service.populate import Populator, Trajectory
from hyperagent_teacher.service.response_buffer import ResponseBuffer

_log = structlog.get_logger()


class TeacherServicer(teacher_pb2_grpc.TeacherServiceServicer):
    """The TeacherService of proto/hyperagent/teacher/v1/teacher.proto."""

    def __init__(
        self,
        engine: ScoringEngine,
        populator: Populator,
        admission: Admission,
        row_memory: MemoryBudget,
        *,
        buffer_folder: Path,
        chunk_bytes: int,
    ) -> None:
        self._engine = engine
        self._populator = populator
        self._admission = admission
        self._row_memory = row_memory
        self._buffer_folder = buffer_folder
        self._chunk_bytes = chunk_bytes
        self._tokenizer = engine.identity.tokenizer

    async def GetTeacher(  # noqa: N802  # named by the contract, like the two below
        self, _request: pb.GetTeacherRequest, _context: grpc.aio.ServicerContext
    ) -> pb.GetTeacherResponse:
        """Return the teacher's identity and limits."""
        return pb.GetTeacherResponse(
            identity=conversion.teacher_to_proto(self._engine.identity),
            max_tokens=self._engine.max_tokens,
            max_pending_requests=self._admission.max_pending_requests,
        )

    async def ScoreTokens(  # noqa: N802
        self, request: pb.ScoreTokensRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """Score one sequence and stream its rows."""
        async with _errors_as_status(context):
            _require_deadline(context)
            with self._admission.slot(), ResponseBuffer(self._buffer_folder) as buffer:
                self._require_tokenizer(conversion.tokenizer_from_proto(request.tokenizer))
                token_ids = conversion.unpack_u32(request.token_ids, what="token ids")
                positions = conversion.unpack_u32(request.positions, what="positions")
                require_scorable(self._engine, token_ids, positions, top_k=request.top_k)
                if request.first_row >= len(positions):
                    raise BeyondEnd(
                        f"there is no row {request.first_row:,} among {len(positions):,} positions; "
                        "resume the stream at a row that is missing"
                    )
                filling = asyncio.create_task(self._fill(buffer, token_ids, positions, request))
                try:
                    async for message in buffer.messages():
                        chunk = pb.ScoreTokensResponse.FromString(message)
                        del message  # a reader that does not read keeps one message in memory instead of two
                        await context.write(chunk)
                finally:
                    filling.cancel()
                    await asyncio.wait({filling})

    async def _fill(
        self,
        buffer: ResponseBuffer,
        token_ids: NDArray[np.uint32],
        positions: NDArray[np.uint32],
        request: pb.ScoreTokensRequest,
    ) -> None:
        """Put a request's messages into its response buffer."""
        top_k, num_temperatures = request.top_k, len(self._engine.identity.temperatures)
        encoder = conversion.ChunkEncoder(
            top_k=top_k, num_temperatures=num_temperatures, first_row=request.first_row, max_bytes=self._chunk_bytes
        )
        try:
            async with (
                self._row_memory.held(
                    (len(positions) - request.first_row) * conversion.row_bytes(top_k, num_temperatures)
                ),
                aclosing(score_from(self._engine, token_ids, positions, request.first_row, top_k=top_k)) as parts,
            ):
                async for rows in parts:
                    for chunk in encoder.add(rows):
                        await buffer.put(chunk.SerializeToString())
                await buffer.put(encoder.finish().SerializeToString())
            buffer.finish()
        except Exception as error:
            buffer.finish(error)

    async def PopulateCache(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.PopulateCacheRequest], context: grpc.aio.ServicerContext
    ) -> None:
        """Fill the cache with the trajectories of a stream, and stream their outcomes."""
        async with _errors_as_status(context):
            # Read the options before refusing anything: their sender might otherwise not receive the status (grpc/grpc#36066).
            first = await anext(request_iterator, None)
            _require_deadline(context)
            with self._admission.slot():
                if first is None or first.WhichOneof("item") != "options":
                    raise InvalidRequest("the first message of PopulateCache must be its options")
                data = conversion.data_from_proto(first.options.data)
                self._require_tokenizer(data.tokenizer)
                await self._populator.begin(data)
                await context.send_initial_metadata((conversion.OPTIONS_ACCEPTED,))
                async with aclosing(self._trajectories(request_iterator, data)) as trajectories:
                    async for trajectory in trajectories:
                        self._admission.require_open()
                        outcome = await self._populator.populate(trajectory)
                        await context.write(conversion.outcome_to_proto(outcome))

    async def _trajectories(
        self, requests: AsyncIterator[pb.PopulateCacheRequest], data: DataIdentity
    ) -> AsyncGenerator[Trajectory, None]:
        async for request in requests:
            match request.WhichOneof("item"):
                case "trajectory":
                    yield _trajectory_from_proto(request.trajectory)
                case "file":
                    async for trajectory in self._populator.read_file(request.file.name, data):
                        yield trajectory
                case _:
                    raise InvalidRequest(
                        "after its options, PopulateCache accepts only trajectories and files; send one of them"
                    )

    def _require_tokenizer(self, tokenizer: TokenizerIdentity) -> None:
        require_same(
            "the tokenizer",
            expected=self._tokenizer,
            found=tokenizer,
            remedy="tokenize with the teacher's tokenizer folder",
        )


def _trajectory_from_proto(message: pb.TokenisedTrajectory) -> Trajectory:
    name = f"of trajectory {message.trajectory_id!r}"
    return Trajectory(
        message.trajectory_id,
        conversion.unpack_u32(message.token_ids, what=f"token ids {name}"),
        conversion.unpack_u32(message.positions, what=f"positions {name}"),
    )


def _require_deadline(context: grpc.aio.ServicerContext) -> None:
    # A call without a deadline would keep its slot for ever if its client hung.
    if context.time_remaining() is None:
        raise InvalidRequest("the call has no deadline; set one, such as the timeout of a Python stub's method")


@asynccontextmanager
async def _errors_as_status(context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
    try:
        yield
    except HyperagentError as error:
        await context.abort(*refusal(error))
    except Exception as defect:
        _log.exception("a call failed", error=type(defect).__name__)
        code, message = grpc.StatusCode.INTERNAL, "the teacher met an unexpected error; its log has the details"
        await context.abort(code, message, rich_details(code, message, "DEFECT"))
