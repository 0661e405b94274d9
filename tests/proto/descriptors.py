"""Load descriptors of the project's .proto files and of files that a test writes."""

from __future__ import annotations

from pathlib import Path

from contract import compile_protos
from google.protobuf.descriptor_pb2 import FileDescriptorSet

PROTO = Path(__file__).parents[2] / "proto"


def project_descriptors() -> FileDescriptorSet:
    """Return the descriptors of the .proto files under proto/."""
    return compile_protos(PROTO)


def descriptors_of(text: str, folder: Path, name: str) -> FileDescriptorSet:
    """Return the descriptor of one .proto file, written to `folder`/`name`."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return compile_protos(folder)
