"""The gRPC methods: they decode, call the domain and encode, and know nothing else.

Answers are written rather than yielded: a cancelled call then always raises inside the method, so the engine is
closed at once; a generator would be left suspended at its yield until it is collected.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

import grpc
import structlog

from hyperagent.errors import HyperagentError, InvalidRequest
from hyperagent.identity import DataIdentity, TokenizerIdentity, require_same
from hyperagent.wire import codec, teacher_pb2_grpc
from hyperagent.wire import teacher_pb2 as pb
from hyperagent.wire.status import status_code
from hyperagent_teacher.admission import Admission
from hyperagent_teacher.engine import ScoringEngine, require_scorable
from hyperagent_teacher.populate import Populator, Trajectory

_log = structlog.get_logger()


class TeacherServicer(teacher_pb2_grpc.TeacherServiceServicer):
    """TeacherService of proto/hyperagent/teacher/v1/teacher.proto."""

    def __init__(self, engine: ScoringEngine, populator: Populator, admission: Admission) -> None:
        self._engine = engine
        self._populator = populator
        self._admission = admission
        self._tokenizer = TokenizerIdentity(engine.identity.tokenizer_sha256, engine.identity.template_sha256)

    async def GetTeacher(  # noqa: N802  # the contract's name, like the two below
        self, _request: pb.GetTeacherRequest, _context: grpc.aio.ServicerContext
    ) -> pb.GetTeacherResponse:
        """Say who the teacher is."""
        return pb.GetTeacherResponse(
            identity=codec.teacher_to_proto(self._engine.identity),
            max_tokens=self._engine.max_tokens,
            max_pending_requests=self._admission.max_pending_requests,
        )

    async def ScoreTokens(  # noqa: N802
        self, request: pb.ScoreTokensRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """Score one sequence."""
        async with _errors_as_status(context):
            with self._admission.slot():
                self._require_tokenizer(codec.tokenizer_from_proto(request.tokenizer))
                token_ids = codec.unpack_u32(request.token_ids, what="token ids")
                positions = codec.unpack_u32(request.positions, what="positions")
                require_scorable(self._engine, token_ids, positions, top_k=request.top_k)
                first_row = 0
                async with aclosing(self._engine.score(token_ids, positions, top_k=request.top_k)) as parts:
                    async for rows in parts:
                        for chunk in codec.rows_to_chunks(rows, first_row=first_row):
                            await context.write(chunk)
                        first_row += rows.num_rows

    async def PopulateCache(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.PopulateCacheRequest], context: grpc.aio.ServicerContext
    ) -> None:
        """Fill the cache."""
        async with _errors_as_status(context):
            # Nothing is judged before the options are read: their sender might not learn the status (grpc/grpc#36066).
            first = await anext(request_iterator, None)
            with self._admission.slot():
                if first is None or first.WhichOneof("item") != "options":
                    raise InvalidRequest("the first message of PopulateCache must be its options")
                data = codec.data_from_proto(first.options.data)
                self._require_tokenizer(data.tokenizer)
                await self._populator.begin(data)
                await context.send_initial_metadata((codec.OPTIONS_ACCEPTED,))
                async with aclosing(self._trajectories(request_iterator, data)) as trajectories:
                    async for trajectory in trajectories:
                        self._admission.require_open()
                        outcome = await self._populator.populate(trajectory)
                        await context.write(codec.outcome_to_proto(outcome))

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
                    raise InvalidRequest("after its options, PopulateCache takes trajectories and files only")

    def _require_tokenizer(self, tokenizer: TokenizerIdentity) -> None:
        require_same(
            "the tokenizer",
            expected=self._tokenizer,
            found=tokenizer,
            remedy="tokenise with the teacher's tokenizer folder",
        )


def _trajectory_from_proto(message: pb.TokenisedTrajectory) -> Trajectory:
    name = f"of trajectory {message.trajectory_id!r}"
    return Trajectory(
        message.trajectory_id,
        codec.unpack_u32(message.token_ids, what=f"token ids {name}"),
        codec.unpack_u32(message.positions, what=f"positions {name}"),
    )


@asynccontextmanager
async def _errors_as_status(context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
    try:
        yield
    except HyperagentError as error:
        await context.abort(status_code(error), str(error))
    except Exception as defect:
        _log.exception("a call failed", error=type(defect).__name__)
        await context.abort(grpc.StatusCode.INTERNAL, "the teacher met an unexpected error")
