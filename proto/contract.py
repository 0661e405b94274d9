"""What the .proto files promise: read from their descriptors, written as JSON, and compared with what was promised before.

A contract is plain JSON: messages, enums and services by full name; fields by number, enum values and methods by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)
from grpc_tools import protoc

Contract = dict[str, Any]

FIELD_FACTS = ("type", "type_name", "label", "oneof")
METHOD_FACTS = ("request", "response", "client_streaming", "server_streaming")


def compile_protos(folder: Path) -> FileDescriptorSet:
    """Compile every .proto file below `folder`, which is their import root."""
    sources = sorted(str(path) for path in folder.rglob("*.proto"))
    if not sources:
        raise ValueError(f"no .proto file below {folder}")
    with TemporaryDirectory() as scratch:
        out = Path(scratch) / "descriptors"
        options = [f"-I{folder}", f"-I{files('grpc_tools') / '_proto'}", "--include_source_info"]
        if protoc.main(["protoc", *options, f"--descriptor_set_out={out}", *sources]) != 0:
            raise ValueError(f"protoc refused the .proto files below {folder}; its reasons are on stderr")
        return FileDescriptorSet.FromString(out.read_bytes())


def messages(file: FileDescriptorProto) -> Iterator[tuple[str, DescriptorProto]]:
    """All messages by full name, nested ones after their parent; not the entries protoc makes for maps."""

    def walk(scope: str, level: list[DescriptorProto]) -> Iterator[tuple[str, DescriptorProto]]:
        for message in level:
            if not message.options.map_entry:
                name = _join(scope, message.name)
                yield name, message
                yield from walk(name, list(message.nested_type))

    return walk(file.package, list(file.message_type))


def enums(file: FileDescriptorProto) -> Iterator[tuple[str, EnumDescriptorProto]]:
    """All enums by full name."""
    for scope, owner in [(file.package, file), *messages(file)]:
        for enum in owner.enum_type:
            yield _join(scope, enum.name), enum


def extract(descriptors: FileDescriptorSet) -> Contract:
    """The contract of these files."""
    found: Contract = {"messages": {}, "enums": {}, "services": {}}
    for file in sorted(descriptors.file, key=lambda file: file.name):
        for name, message in messages(file):
            fields = sorted(message.field, key=lambda field: field.number)
            found["messages"][name] = {
                "fields": {str(field.number): _field(message, field) for field in fields},
                # protoc's range ends before `end`.
                "reserved_numbers": [[span.start, span.end - 1] for span in message.reserved_range],
                "reserved_names": list(message.reserved_name),
            }
        for name, enum in enums(file):
            found["enums"][name] = {
                "values": {value.name: value.number for value in enum.value},
                # For an enum, `end` is the last reserved number.
                "reserved_numbers": [[span.start, span.end] for span in enum.reserved_range],
                "reserved_names": list(enum.reserved_name),
            }
        for service in file.service:
            found["services"][_join(file.package, service.name)] = {
                "methods": {
                    method.name: {
                        "request": method.input_type.lstrip("."),
                        "response": method.output_type.lstrip("."),
                        "client_streaming": method.client_streaming,
                        "server_streaming": method.server_streaming,
                    }
                    for method in service.method
                }
            }
    return found


def contract_text(folder: Path) -> str:
    """contract.json for the .proto files below `folder`."""
    return _render(extract(compile_protos(folder)), indent="") + "\n"


def breaking_changes(recorded: Contract, current: Contract) -> list[str]:
    """One sentence for each change that an old client or an old server would notice; an addition is none."""
    found: list[str] = []
    compare = {"message": _message_changes, "enum": _enum_changes, "service": _service_changes}
    for kind, changes in compare.items():
        for name, old in recorded[f"{kind}s"].items():
            new = current[f"{kind}s"].get(name)
            if new is None:
                found.append(f"{kind} {name} was removed or renamed")
            else:
                found += [f"{kind} {name}: {change}" for change in [*_unreserved(old, new), *changes(old, new)]]
    return found


def _field(message: DescriptorProto, field: FieldDescriptorProto) -> dict[str, str]:
    entries = {entry.name: entry for entry in message.nested_type if entry.options.map_entry}
    entry = entries.get(field.type_name.rpartition(".")[2])
    if entry:
        key, value = (side.type_name.lstrip(".") or _type(side) for side in entry.field)
        return {"name": field.name, "type": f"map<{key}, {value}>", "label": "map"}
    found = {"name": field.name, "type": _type(field)}
    if field.type_name:
        found["type_name"] = field.type_name.lstrip(".")
    if field.label == FieldDescriptorProto.LABEL_OPTIONAL:
        # `optional` written out means that absence and zero differ.
        found["label"] = "optional" if field.proto3_optional else "singular"
    else:
        found["label"] = FieldDescriptorProto.Label.Name(field.label).removeprefix("LABEL_").lower()
    # protoc puts each `optional` field into a oneof of its own, which nobody wrote.
    if field.HasField("oneof_index") and not field.proto3_optional:
        found["oneof"] = message.oneof_decl[field.oneof_index].name
    return found


def _type(field: FieldDescriptorProto) -> str:
    return FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()


def _message_changes(old: Contract, new: Contract) -> Iterator[str]:
    numbers = {field["name"]: number for number, field in new["fields"].items()}
    for number, was in old["fields"].items():
        name = was["name"]
        if name in numbers:
            now = new["fields"][numbers[name]]
            if numbers[name] != number:
                yield f"field {name} changed its number from {number} to {numbers[name]}"
        elif number in new["fields"]:
            now = new["fields"][number]
            yield f"field {name} = {number} was renamed to {now['name']}"
        else:
            if not (_reserves(new, int(number)) and name in new["reserved_names"]):
                yield f"field {name} = {number} was removed, and its number and name are not both reserved"
            continue
        for fact in FIELD_FACTS:
            if was.get(fact) != now.get(fact):
                yield f"field {name} = {number} changed its {fact} from {was.get(fact)} to {now.get(fact)}"


def _enum_changes(old: Contract, new: Contract) -> Iterator[str]:
    for name, number in old["values"].items():
        if name not in new["values"]:
            yield f"value {name} = {number} was removed or renamed"
        elif new["values"][name] != number:
            yield f"value {name} changed its number from {number} to {new['values'][name]}"


def _service_changes(old: Contract, new: Contract) -> Iterator[str]:
    for name, was in old["methods"].items():
        now = new["methods"].get(name)
        if now is None:
            yield f"method {name} was removed or renamed"
            continue
        for fact in METHOD_FACTS:
            if was[fact] != now[fact]:
                yield f"method {name} changed its {fact} from {was[fact]} to {now[fact]}"


def _unreserved(old: Contract, new: Contract) -> Iterator[str]:
    for first, last in old.get("reserved_numbers", []):
        if not _reserves(new, first, last):
            yield f"the numbers {first} to {last} were reserved and no longer are"
    for name in old.get("reserved_names", []):
        if name not in new["reserved_names"]:
            yield f"the name {name} was reserved and no longer is"


def _reserves(holder: Contract, first: int, last: int | None = None) -> bool:
    """Whether all of [first, last] is reserved, be it by several ranges."""
    last = first if last is None else last
    for start, end in sorted(holder["reserved_numbers"]):
        if start <= first <= end:
            first = end + 1
    return first > last


def _join(scope: str, name: str) -> str:
    return f"{scope}.{name}" if scope else name


def _render(value: Any, *, indent: str) -> str:
    """JSON with one line per field, value and method."""
    if not isinstance(value, dict) or not any(isinstance(inner, dict | list) for inner in value.values()):
        return json.dumps(value)
    deeper = indent + "  "
    lines = [f"{deeper}{json.dumps(key)}: {_render(inner, indent=deeper)}" for key, inner in value.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
