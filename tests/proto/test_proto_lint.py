"""Check proto/ against the relevant rules of `buf lint` (category STANDARD), under buf's names, and one additional rule.

Each rule must find nothing in proto/ and must be the only one that finds something in its bad file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pytest
from contract import enums, messages
from descriptors import descriptors_of, project_descriptors
from google.protobuf.descriptor_pb2 import (
    EnumDescriptorProto,
    EnumValueDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
)

PASCAL = r"[A-Z][A-Za-z0-9]*"
LOWER_SNAKE = r"[a-z][a-z0-9]*(_[a-z0-9]+)*"
UPPER_SNAKE = r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*"
# v1, v1beta2, v1p1alpha1, v1test..., after at least one other part.
VERSIONED = r".+\.v[1-9][0-9]*((p[1-9][0-9]*)?(alpha|beta)([1-9][0-9]*)?|test.*)?"
SYNTAX_PATH = [FileDescriptorProto.SYNTAX_FIELD_NUMBER]


def package_version_suffix(descriptors: FileDescriptorSet) -> list[str]:
    return [file.package for file in descriptors.file if not re.fullmatch(VERSIONED, file.package)]


def package_directory_match(descriptors: FileDescriptorSet) -> list[str]:
    return [
        f"{file.name} has package {file.package}"
        for file in descriptors.file
        if PurePosixPath(file.name).parent != PurePosixPath(*file.package.split("."))
    ]


def package_lower_snake_case(descriptors: FileDescriptorSet) -> list[str]:
    return _unlike(rf"{LOWER_SNAKE}(\.{LOWER_SNAKE})*", [file.package for file in descriptors.file])


def file_lower_snake_case(descriptors: FileDescriptorSet) -> list[str]:
    return _unlike(LOWER_SNAKE, [PurePosixPath(file.name).stem for file in descriptors.file])


def syntax_specified(descriptors: FileDescriptorSet) -> list[str]:
    # In a descriptor an empty `syntax` means proto2; only the source locations tell whether it was written.
    return [
        file.name
        for file in descriptors.file
        if not any(list(place.path) == SYNTAX_PATH for place in file.source_code_info.location)
    ]


def import_no_public(descriptors: FileDescriptorSet) -> list[str]:
    return [file.dependency[index] for file in descriptors.file for index in file.public_dependency]


def message_pascal_case(descriptors: FileDescriptorSet) -> list[str]:
    names = [message.name for file in descriptors.file for _, message in messages(file)]
    return _unlike(PASCAL, names)


def field_lower_snake_case(descriptors: FileDescriptorSet) -> list[str]:
    return _unlike(LOWER_SNAKE, [field.name for field in _fields(descriptors)])


def no_repeated_scalar(descriptors: FileDescriptorSet) -> list[str]:
    """Check a rule of this project: arrays are packed bytes, since a repeated scalar costs one Python object per element."""
    return [
        field.name
        for field in _fields(descriptors)
        if field.label == field.LABEL_REPEATED and field.type != field.TYPE_MESSAGE
    ]


def oneof_lower_snake_case(descriptors: FileDescriptorSet) -> list[str]:
    # `optional` fields have a synthetic oneof, whose name begins with an underscore.
    found = []
    for file in descriptors.file:
        for _, message in messages(file):
            made_up = {field.oneof_index for field in message.field if field.proto3_optional}
            names = [oneof.name for index, oneof in enumerate(message.oneof_decl) if index not in made_up]
            found += _unlike(LOWER_SNAKE, names)
    return found


def enum_pascal_case(descriptors: FileDescriptorSet) -> list[str]:
    return _unlike(PASCAL, [enum.name for enum in _enums(descriptors)])


def enum_value_upper_snake_case(descriptors: FileDescriptorSet) -> list[str]:
    return _unlike(UPPER_SNAKE, [value.name for _, value in _values(descriptors)])


def enum_value_prefix(descriptors: FileDescriptorSet) -> list[str]:
    return [
        value.name for enum, value in _values(descriptors) if not value.name.startswith(f"{_upper_snake(enum.name)}_")
    ]


def enum_zero_value_suffix(descriptors: FileDescriptorSet) -> list[str]:
    zeros = [value.name for _, value in _values(descriptors) if value.number == 0]
    return [name for name in zeros if not name.endswith("_UNSPECIFIED")]


def enum_first_value_zero(descriptors: FileDescriptorSet) -> list[str]:
    return [enum.name for enum in _enums(descriptors) if enum.value[0].number != 0]


def service_pascal_case(descriptors: FileDescriptorSet) -> list[str]:
    return _unlike(PASCAL, [service.name for file in descriptors.file for service in file.service])


def service_suffix(descriptors: FileDescriptorSet) -> list[str]:
    return _unlike(".*Service", [service.name for file in descriptors.file for service in file.service])


def rpc_pascal_case(descriptors: FileDescriptorSet) -> list[str]:
    return _unlike(PASCAL, [method.name for _, method in _methods(descriptors)])


def rpc_request_standard_name(descriptors: FileDescriptorSet) -> list[str]:
    return [
        method.input_type
        for service, method in _methods(descriptors)
        if method.input_type.rpartition(".")[2] not in _standard_names(service, method.name, "Request")
    ]


def rpc_response_standard_name(descriptors: FileDescriptorSet) -> list[str]:
    return [
        method.output_type
        for service, method in _methods(descriptors)
        if method.output_type.rpartition(".")[2] not in _standard_names(service, method.name, "Response")
    ]


def rpc_request_response_unique(descriptors: FileDescriptorSet) -> list[str]:
    uses = Counter(name for _, method in _methods(descriptors) for name in (method.input_type, method.output_type))
    return [name for name, count in uses.items() if count > 1]


Rule = Callable[[FileDescriptorSet], list[str]]
RULES: dict[str, Rule] = {
    rule.__name__.upper(): rule
    for rule in (
        package_version_suffix,
        package_directory_match,
        package_lower_snake_case,
        file_lower_snake_case,
        syntax_specified,
        import_no_public,
        message_pascal_case,
        field_lower_snake_case,
        no_repeated_scalar,
        oneof_lower_snake_case,
        enum_pascal_case,
        enum_value_upper_snake_case,
        enum_value_prefix,
        enum_zero_value_suffix,
        enum_first_value_zero,
        service_pascal_case,
        service_suffix,
        rpc_pascal_case,
        rpc_request_standard_name,
        rpc_response_standard_name,
        rpc_request_response_unique,
    )
}

HEAD = 'syntax = "proto3";\npackage a.v1;\n'
GET = "message GetRequest {}\nmessage GetResponse {}\n"
# Path and text of the bad file of each rule.
BAD = {
    "PACKAGE_VERSION_SUFFIX": ("a/b/bad.proto", 'syntax = "proto3";\npackage a.b;\n'),
    "PACKAGE_DIRECTORY_MATCH": ("b/v1/bad.proto", HEAD),
    "PACKAGE_LOWER_SNAKE_CASE": ("aB/v1/bad.proto", 'syntax = "proto3";\npackage aB.v1;\n'),
    "FILE_LOWER_SNAKE_CASE": ("a/v1/badName.proto", HEAD),
    "SYNTAX_SPECIFIED": ("a/v1/bad.proto", "package a.v1;\n"),
    "IMPORT_NO_PUBLIC": (
        "a/v1/bad.proto",
        HEAD + 'import public "google/protobuf/empty.proto";\nmessage Row { google.protobuf.Empty nothing = 1; }\n',
    ),
    "MESSAGE_PASCAL_CASE": ("a/v1/bad.proto", HEAD + "message Row { message Inner_Row {} }\n"),
    "FIELD_LOWER_SNAKE_CASE": ("a/v1/bad.proto", HEAD + "message Row { uint32 topK = 1; }\n"),
    "NO_REPEATED_SCALAR": ("a/v1/bad.proto", HEAD + "message Row { repeated uint32 ids = 1; }\n"),
    "ONEOF_LOWER_SNAKE_CASE": ("a/v1/bad.proto", HEAD + "message Row { oneof theItem { uint32 id = 1; } }\n"),
    "ENUM_PASCAL_CASE": ("a/v1/bad.proto", HEAD + "enum row_kind { ROW_KIND_UNSPECIFIED = 0; }\n"),
    "ENUM_VALUE_UPPER_SNAKE_CASE": (
        "a/v1/bad.proto",
        HEAD + "message Row { enum Kind { KIND_UNSPECIFIED = 0; KIND_full = 1; } }\n",
    ),
    "ENUM_VALUE_PREFIX": ("a/v1/bad.proto", HEAD + "enum RowKind { ROW_KIND_UNSPECIFIED = 0; FULL = 1; }\n"),
    "ENUM_ZERO_VALUE_SUFFIX": ("a/v1/bad.proto", HEAD + "enum Kind { KIND_NONE = 0; }\n"),
    # protoc itself rejects it in proto3.
    "ENUM_FIRST_VALUE_ZERO": (
        "a/v1/bad.proto",
        'syntax = "proto2";\npackage a.v1;\nenum Kind { KIND_FULL = 1; KIND_UNSPECIFIED = 0; }\n',
    ),
    "SERVICE_PASCAL_CASE": (
        "a/v1/bad.proto",
        HEAD + GET + "service row_Service { rpc Get(GetRequest) returns (GetResponse); }\n",
    ),
    "SERVICE_SUFFIX": (
        "a/v1/bad.proto",
        HEAD + GET + "service Rows { rpc Get(GetRequest) returns (GetResponse); }\n",
    ),
    "RPC_PASCAL_CASE": (
        "a/v1/bad.proto",
        HEAD + GET + "service RowService { rpc get(GetRequest) returns (GetResponse); }\n",
    ),
    "RPC_REQUEST_STANDARD_NAME": (
        "a/v1/bad.proto",
        HEAD + "message Ask {}\nmessage GetResponse {}\nservice RowService { rpc Get(Ask) returns (GetResponse); }\n",
    ),
    "RPC_RESPONSE_STANDARD_NAME": (
        "a/v1/bad.proto",
        HEAD + "message GetRequest {}\nmessage Answer {}\n"
        "service RowService { rpc Get(GetRequest) returns (Answer); }\n",
    ),
    "RPC_REQUEST_RESPONSE_UNIQUE": (
        "a/v1/bad.proto",
        HEAD + GET + "message LogServiceGetResponse {}\n"
        "service RowService { rpc Get(GetRequest) returns (GetResponse); }\n"
        "service LogService { rpc Get(GetRequest) returns (LogServiceGetResponse); }\n",
    ),
}

GOOD = (
    HEAD
    + """
message HTTPRow2 {
  optional uint32 top_k = 1;
  map<string, uint32> counts = 2;
  repeated Sha256Sum sums = 3;
  oneof the_item { bytes e1f_2 = 4; }
  reserved 9;
}
message Sha256Sum { enum Sha256Kind { SHA256_KIND_UNSPECIFIED = 0; SHA256_KIND_4X = 1; } }
enum HTTPOutcome { HTTP_OUTCOME_UNSPECIFIED = 0; }
enum A1B2 { A1B2_UNSPECIFIED = 0; }
message RowServiceGetRequest {}
message GetResponse {}
service RowService { rpc Get(RowServiceGetRequest) returns (stream GetResponse); }
"""
)


@pytest.fixture(scope="module")
def project() -> FileDescriptorSet:
    return project_descriptors()


@pytest.mark.parametrize("rule", RULES)
def test_the_contract_keeps_the_rule(rule: str, project: FileDescriptorSet) -> None:
    assert RULES[rule](project) == []


@pytest.mark.parametrize("rule", RULES)
def test_the_rule_and_no_other_flags_its_bad_file(rule: str, tmp_path: Path) -> None:
    name, text = BAD[rule]
    bad = descriptors_of(text, tmp_path, name)
    assert [other for other in RULES if RULES[other](bad)] == [rule]


def test_no_rule_flags_the_unusual_but_good(tmp_path: Path) -> None:
    good = descriptors_of(GOOD, tmp_path, "a/v1/good.proto")
    assert {rule: found for rule in RULES if (found := RULES[rule](good))} == {}


def _unlike(pattern: str, names: list[str]) -> list[str]:
    return [name for name in names if not re.fullmatch(pattern, name)]


def _fields(descriptors: FileDescriptorSet) -> Iterator[FieldDescriptorProto]:
    for file in descriptors.file:
        for _, message in messages(file):
            yield from message.field


def _enums(descriptors: FileDescriptorSet) -> Iterator[EnumDescriptorProto]:
    for file in descriptors.file:
        for _, enum in enums(file):
            yield enum


def _values(descriptors: FileDescriptorSet) -> Iterator[tuple[EnumDescriptorProto, EnumValueDescriptorProto]]:
    for enum in _enums(descriptors):
        for value in enum.value:
            yield enum, value


def _methods(descriptors: FileDescriptorSet) -> Iterator[tuple[str, MethodDescriptorProto]]:
    for file in descriptors.file:
        for service in file.service:
            for method in service.method:
                yield service.name, method


def _upper_snake(name: str) -> str:
    """Convert a name to upper snake case. HTTPOutcome: HTTP_OUTCOME, Sha256Kind: SHA256_KIND, A1B2: A1B2; a small_one keeps its underscore."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z0-9])(?=[A-Z][a-z])", "_", name).upper()


def _standard_names(service: str, method: str, suffix: str) -> tuple[str, str]:
    method = "".join(part[:1].upper() + part[1:] for part in method.split("_"))
    return f"{method}{suffix}", f"{service}{method}{suffix}"
