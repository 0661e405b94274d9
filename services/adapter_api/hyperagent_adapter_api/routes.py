"""REST routes: translation between HTTP and the service."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Annotated, BinaryIO

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response, status
from fastapi.responses import StreamingResponse

from hyperagent.adapter_files import CONFIG_FILE, MODEL_FILE
from hyperagent.http.adapter_models import (
    AdapterBody,
    AdaptersBody,
    BundleBody,
    Lease,
    LeaseRequest,
    PromptBody,
    StoredAdapter,
)
from hyperagent_adapter_api.service import AdapterService
from hyperagent_adapter_api.store import HOLDER_PATTERN, ID_PATTERN

router = APIRouter()

_CHUNK_BYTES = 1 << 20


def _service(request: Request) -> AdapterService:
    service: AdapterService = request.app.state.service
    return service


Served = Annotated[AdapterService, Depends(_service)]


@router.post("/adapters", status_code=status.HTTP_201_CREATED)
async def create_adapter(body: PromptBody, response: Response, service: Served) -> AdapterBody:
    """Generate the adapter for a prompt: 201, or 200 if it already exists."""
    adapter, is_new = await service.create(body.parts())
    if not is_new:
        response.status_code = status.HTTP_200_OK
    response.headers["Location"] = _path(adapter)
    return _body(adapter)


@router.get("/adapters")
def list_adapters(
    service: Served,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str | None, Query(pattern=ID_PATTERN, description="Start after this id.")] = None,
) -> AdaptersBody:
    """List the adapters in ascending order of id."""
    page = service.store.page(after=after, limit=limit + 1)
    following = f"/v1/adapters?limit={limit}&after={page[limit - 1].id}" if len(page) > limit else None
    return AdaptersBody(adapters=[_body(adapter) for adapter in page[:limit]], next=following)


@router.head("/adapters/{adapter_id}", include_in_schema=False)
@router.get("/adapters/{adapter_id}")
def get_adapter(adapter_id: str, service: Served) -> AdapterBody:
    """Get one adapter."""
    return _body(service.store.get(adapter_id))


@router.head(f"/adapters/{{adapter_id}}/{MODEL_FILE}", response_class=StreamingResponse, include_in_schema=False)
@router.get(f"/adapters/{{adapter_id}}/{MODEL_FILE}", response_class=StreamingResponse)
def get_adapter_model(
    adapter_id: str, service: Served, if_none_match: Annotated[str | None, Header()] = None
) -> Response:
    """Download the adapter's weights for PEFT and vLLM."""
    return _download(service, adapter_id, MODEL_FILE, "application/octet-stream", if_none_match)


@router.head(f"/adapters/{{adapter_id}}/{CONFIG_FILE}", response_class=StreamingResponse, include_in_schema=False)
@router.get(f"/adapters/{{adapter_id}}/{CONFIG_FILE}", response_class=StreamingResponse)
def get_adapter_config(
    adapter_id: str, service: Served, if_none_match: Annotated[str | None, Header()] = None
) -> Response:
    """Download the adapter's LoraConfig for PEFT and vLLM."""
    return _download(service, adapter_id, CONFIG_FILE, "application/json", if_none_match)


@router.put("/adapters/{adapter_id}/leases/{holder}")
def lease_adapter(
    adapter_id: str,
    holder: Annotated[str, Path(pattern=HOLDER_PATTERN)],
    service: Served,
    body: LeaseRequest | None = None,
) -> Lease:
    """Keep an adapter from being evicted or deleted while an engine uses it; repeat it to renew the lease."""
    return service.store.lease(adapter_id, holder, ttl_s=(body or LeaseRequest()).ttl_s)


@router.delete("/adapters/{adapter_id}/leases/{holder}", status_code=status.HTTP_204_NO_CONTENT)
def end_lease(adapter_id: str, holder: Annotated[str, Path(pattern=HOLDER_PATTERN)], service: Served) -> None:
    """End a lease."""
    service.store.release(adapter_id, holder)


@router.delete("/adapters/{adapter_id}", status_code=status.HTTP_204_NO_CONTENT)
def delete_adapter(adapter_id: str, service: Served) -> None:
    """Delete an adapter that is not leased; generating it again gives the same id."""
    service.store.delete(adapter_id)


@router.get("/bundle")
def get_bundle(service: Served) -> BundleBody:
    """Describe the bundle that generates the adapters."""
    manifest = service.bundle.manifest
    return BundleBody(
        fingerprint=service.bundle.fingerprint,
        base_model=manifest.base_model,
        student_weights=manifest.student_weights,
        teacher=manifest.teacher,
        data=manifest.data.fingerprint,
        condition=manifest.condition,
        rank=manifest.rank,
        alpha=manifest.alpha,
        num_layers=len(manifest.layers),
        max_prompt_tokens=manifest.max_prompt_tokens,
        step=manifest.step,
    )


def _download(
    service: AdapterService, adapter_id: str, name: str, media_type: str, if_none_match: str | None
) -> Response:
    adapter, file = service.store.open(adapter_id, name)
    headers = {"ETag": f'"{adapter.sha256[name]}"'}
    if if_none_match is not None and _matches(if_none_match, headers["ETag"]):
        file.close()
        return Response(status_code=status.HTTP_304_NOT_MODIFIED, headers=headers)
    headers["Content-Length"] = str(os.fstat(file.fileno()).st_size)
    return StreamingResponse(_chunks(file), media_type=media_type, headers=headers)


def _matches(if_none_match: str, etag: str) -> bool:
    """Compare weakly, as If-None-Match requires (RFC 9110, section 13.1.2); our tags contain no comma."""
    tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return "*" in tags or etag in tags


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def _path(adapter: StoredAdapter) -> str:
    return f"/v1/adapters/{adapter.id}"


def _body(adapter: StoredAdapter) -> AdapterBody:
    path = _path(adapter)
    links = {"self": path, "adapter_model": f"{path}/{MODEL_FILE}", "adapter_config": f"{path}/{CONFIG_FILE}"}
    return AdapterBody(**adapter.model_dump(), links=links)
