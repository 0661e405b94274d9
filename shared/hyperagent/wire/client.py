"""The teacher's client: everybody who asks a teacher asks through this class.

Without `tls_ca` its channel is not encrypted, and the bearer token travels in the clear: that is for the loopback
interface and private networks.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
import numpy as np
from blake3 import blake3
from grpc_health.v1 import health_pb2, health_pb2_grpc
from numpy.typing import NDArray

from hyperagent.auth import BEARER
from hyperagent.errors import CorruptRecord, ServiceError
from hyperagent.identity import DataIdentity, TeacherIdentity, TokenizerIdentity
from hyperagent.topk import TopKRows
from hyperagent.wire import conversion, teacher_pb2_grpc
from hyperagent.wire import teacher_pb2 as pb
from hyperagent.wire.errors import no_answer, to_domain_error
from hyperagent.wire.outcome import PopulateOutcome
from hyperagent.wire.pem import read_pem

HEALTH_POLL_S = 0.2
RESUMES = 3
"""How often a stream that broke off is taken up again."""
RESUME_WAIT_S = 120.0
"""How long a teacher has to come back meanwhile."""
POPULATE_TIMEOUT_S = 7 * 24 * 3600.0

Trajectory = tuple[str, NDArray[np.uint32], NDArray[np.uint32]]
"""Id, token ids [T], positions [N]."""

_CHANNEL_OPTIONS = (
    # A service on this machine or in this cluster is never behind the proxy that `http_proxy` names.
    ("grpc.enable_http_proxy", 0),
    # A teacher that restarts is found again within a second; the default backs off to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A teacher whose machine is gone, or frozen as a whole, is noticed within a minute.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)


@dataclass(frozen=True)
class TeacherFacts:
    """What GetTeacher answers."""

    identity: TeacherIdentity
    max_tokens: int
    """Longest sequence accepted, in tokens."""
    max_pending_requests: int
    """Most requests scored or waiting at once."""


class TeacherClient:
    """A connection to one teacher; an async context manager.

    Every method raises `ServiceError` when no teacher answers, `ConfigError` when the token is not the
    teacher's, and otherwise the error that the teacher met.
    """

    def __init__(self, address: str, token: str, *, tls_ca: Path | None = None) -> None:
        """Name the teacher; nothing is sent yet.

        Args:
            address: `host:port`.
            token: see `hyperagent.auth.read_token`.
            tls_ca: PEM file with the certificates to trust; the channel is encrypted then.

        Raises:
            ConfigError: `tls_ca` cannot be read.
        """
        self.address = address
        self._trusted = None if tls_ca is None else read_pem(tls_ca)
        self._metadata = (("authorization", BEARER + token),)

    async def __aenter__(self) -> Self:
        if self._trusted is None:
            self._channel = grpc.aio.insecure_channel(self.address, options=_CHANNEL_OPTIONS)
        else:
            credentials = grpc.ssl_channel_credentials(root_certificates=self._trusted)
            self._channel = grpc.aio.secure_channel(self.address, credentials, options=_CHANNEL_OPTIONS)
        self._stub = teacher_pb2_grpc.TeacherServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._health = health_pb2_grpc.HealthStub(self._channel)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def wait_until_serving(self, timeout_s: float) -> None:
        """Return as soon as the teacher is ready to score.

        Raises:
            ServiceError: it is not within `timeout_s`.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        last = "no answer"
        while (left := deadline - loop.time()) > 0:
            try:
                check = await self._health.Check(health_pb2.HealthCheckRequest(), timeout=min(left, 5.0))
            except grpc.aio.AioRpcError as error:
                last = error.details() or error.code().name
            else:
                if check.status == health_pb2.HealthCheckResponse.SERVING:
                    return
                last = "its health is " + health_pb2.HealthCheckResponse.ServingStatus.Name(check.status)
            await asyncio.sleep(min(HEALTH_POLL_S, left))
        raise no_answer(self.address, f"waited {timeout_s:g} s: {last}")

    async def get_teacher(self, *, timeout_s: float = 10.0) -> TeacherFacts:
        """Ask who the teacher is and what it accepts."""
        with self._domain_errors():
            answer = await self._stub.GetTeacher(pb.GetTeacherRequest(), timeout=timeout_s, metadata=self._metadata)
        return TeacherFacts(
            conversion.teacher_from_proto(answer.identity), answer.max_tokens, answer.max_pending_requests
        )

    async def score_tokens(
        self,
        token_ids: NDArray[np.uint32],
        positions: NDArray[np.uint32],
        *,
        top_k: int,
        tokenizer: TokenizerIdentity,
        timeout_s: float = 600.0,
    ) -> AsyncGenerator[TopKRows, None]:
        """Score one sequence; yields its rows in order of position, some at a time.

        A stream that breaks off after it has begun is taken up again at the first row that is missing, up to
        `RESUMES` times. Leaving the loop early and closing the generator (`contextlib.aclosing`) stops the teacher.

        Args:
            token_ids: [T].
            positions: [N], strictly increasing in [1, T).
            top_k: ids wanted per row, at most the teacher's.
            timeout_s: for each attempt.

        Raises:
            InvalidRequest, LimitExceeded, IdentityMismatch: the teacher refuses the request.
            CorruptRecord: the rows are damaged, or not the ones asked for.
        """
        received = resumes = 0
        while received < len(positions) or not len(positions):
            begun_at = received
            request = pb.ScoreTokensRequest(
                tokenizer=conversion.tokenizer_to_proto(tokenizer),
                token_ids=conversion.pack_u32(token_ids, what="token ids"),
                positions=conversion.pack_u32(positions, what="positions"),
                top_k=top_k,
                first_row=received,
            )
            try:
                async with aclosing(self._score(request, positions, timeout_s)) as parts:
                    async for rows in parts:
                        received += rows.num_rows
                        yield rows
            except (ServiceError, CorruptRecord):
                resumes += 1
                # Rows that have all come, but with another digest, are not repaired by asking for no further row.
                if received in (begun_at, len(positions)) or resumes > RESUMES:
                    raise
                await self.wait_until_serving(RESUME_WAIT_S)

    async def _score(
        self, request: pb.ScoreTokensRequest, positions: NDArray[np.uint32], timeout_s: float
    ) -> AsyncGenerator[TopKRows, None]:
        """One attempt: the rows from `request.first_row` on."""
        call = self._stub.ScoreTokens(request, timeout=timeout_s, metadata=self._metadata)
        received = request.first_row
        digest, stated = blake3(), b""
        try:
            with self._domain_errors():
                async for chunk in call:
                    rows = conversion.chunk_to_rows(chunk)
                    _require_in_order(chunk, rows, positions, received, request.top_k)
                    conversion.update_digest(digest, chunk)
                    stated = chunk.digest
                    received += rows.num_rows
                    yield rows
            if received != len(positions):
                raise CorruptRecord(f"the teacher answered {received} of {len(positions)} rows; ask for them again")
            if stated != digest.digest():
                raise CorruptRecord("the rows do not have the digest that the teacher states; ask for them again")
        finally:
            call.cancel()

    def populate(
        self,
        trajectories: AsyncIterable[Trajectory] | Iterable[Trajectory],
        *,
        data: DataIdentity,
        timeout_s: float = POPULATE_TIMEOUT_S,
    ) -> AsyncGenerator[PopulateOutcome, None]:
        """Have trajectories scored into the teacher's cache; yields one outcome per trajectory, in order.

        A trajectory that cannot be scored is an outcome too. What is cached stays cached when this stops
        halfway; asking again goes on from there.

        Args:
            data: of the file the trajectories are from; the cache records it.
            timeout_s: for all of them together.

        Raises:
            IdentityMismatch: the teacher's tokenizer is another.
            StorageError: the teacher cannot write to its cache.
        """
        return self._populate(_trajectory_items(trajectories), data, timeout_s)

    def populate_file(
        self, name: str, *, data: DataIdentity, timeout_s: float = POPULATE_TIMEOUT_S
    ) -> AsyncGenerator[PopulateOutcome, None]:
        """`populate` with a tokens file inside the teacher's own data folder.

        Raises:
            NotFound: there is no such file there.
        """
        return self._populate(_file_item(name), data, timeout_s)

    async def _populate(
        self, items: AsyncIterator[pb.PopulateCacheRequest], data: DataIdentity, timeout_s: float
    ) -> AsyncGenerator[PopulateOutcome, None]:
        # grpc.aio loses the status of a call that ends while a message is being sent (grpc/grpc#36066), so nothing is
        # sent unless the teacher waits for it: each answer, and the acceptance of the options, is a turn to send.
        turns: asyncio.Queue[bool] = asyncio.Queue()
        failure: Exception | None = None

        async def requests() -> AsyncIterator[pb.PopulateCacheRequest]:
            nonlocal failure
            yield pb.PopulateCacheRequest(options=pb.PopulateOptions(data=conversion.data_to_proto(data)))
            if conversion.OPTIONS_ACCEPTED not in tuple(await call.initial_metadata()):
                await call.code()
                return
            turns.put_nowait(True)
            try:
                async for item in items:
                    if not await turns.get():
                        return
                    yield item
            except Exception as error:
                # gRPC drops an error of the request iterator and reports a cancelled call in its stead.
                failure = error
                raise

        call = self._stub.PopulateCache(requests(), timeout=timeout_s, metadata=self._metadata)
        try:
            with self._domain_errors():
                async for answer in call:
                    turns.put_nowait(True)
                    yield conversion.outcome_from_proto(answer)
        except asyncio.CancelledError:
            if failure is not None:
                raise failure from None
            raise
        finally:
            turns.put_nowait(False)
            call.cancel()

    @contextmanager
    def _domain_errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise to_domain_error(error, self.address) from error


async def _trajectory_items(
    trajectories: AsyncIterable[Trajectory] | Iterable[Trajectory],
) -> AsyncIterator[pb.PopulateCacheRequest]:
    if isinstance(trajectories, AsyncIterable):
        async for trajectory in trajectories:
            yield _trajectory_item(*trajectory)
    else:
        for trajectory in trajectories:
            yield _trajectory_item(*trajectory)


def _trajectory_item(
    trajectory_id: str, token_ids: NDArray[np.uint32], positions: NDArray[np.uint32]
) -> pb.PopulateCacheRequest:
    return pb.PopulateCacheRequest(
        trajectory=pb.TokenisedTrajectory(
            trajectory_id=trajectory_id,
            token_ids=conversion.pack_u32(token_ids, what="token ids"),
            positions=conversion.pack_u32(positions, what="positions"),
        )
    )


async def _file_item(name: str) -> AsyncIterator[pb.PopulateCacheRequest]:
    yield pb.PopulateCacheRequest(file=pb.TokensFile(name=name))


def _require_in_order(
    chunk: pb.ScoreTokensResponse, rows: TopKRows, positions: NDArray[np.uint32], received: int, top_k: int
) -> None:
    asked = positions[received : received + rows.num_rows]
    if chunk.first_row != received or rows.top_k != top_k or not np.array_equal(rows.positions, asked):
        raise CorruptRecord(f"the teacher answered other rows than were asked for, from row {received}; ask again")
