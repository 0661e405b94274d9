"""Location of the data set and exact Arrow schema of its rows.

Two facts are easily missed. `properties` is one Arrow struct with a field for every parameter of every tool, and a tool
holds null in the fields that are not its own. The fields of every struct are in alphabetical order. The data set's card
lists other columns; this schema follows the file.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

DATASET = "nebius/SWE-rebench-openhands-trajectories"
DATASET_REVISION = "35455389ab51bf5e2306bfd436ef72d0f98bf882"
DATASET_FILE = "trajectories.parquet"
DATASET_BYTES = 2_079_503_354


def _struct(**fields: pa.DataType) -> pa.DataType:
    return pa.struct(list(fields.items()))


_PARAMETER = _struct(description=pa.string(), type=pa.string())
_CHOICE = _struct(description=pa.string(), enum=pa.list_(pa.string()), type=pa.string())
_TASK = _struct(
    additionalProperties=pa.bool_(),
    properties=_struct(id=_PARAMETER, notes=_PARAMETER, status=_CHOICE, title=_PARAMETER),
    required=pa.list_(pa.string()),
    type=pa.string(),
)
_PROPERTIES = _struct(
    command=_CHOICE,
    file_text=_PARAMETER,
    insert_line=_PARAMETER,
    is_input=_CHOICE,
    message=_PARAMETER,
    new_str=_PARAMETER,
    old_str=_PARAMETER,
    path=_PARAMETER,
    task_list=_struct(description=pa.string(), items=_TASK, type=pa.string()),
    thought=_PARAMETER,
    timeout=_PARAMETER,
    view_range=_struct(description=pa.string(), items=_struct(type=pa.string()), type=pa.string()),
)
PARAMETER_NAMES = tuple(field.name for field in _PROPERTIES)
"""Names of all parameters of all tools; Arrow pads each tool's `properties` to all of them."""

_PARAMETERS = _struct(
    additionalProperties=pa.bool_(),
    properties=_PROPERTIES,
    required=pa.list_(pa.string()),
    type=pa.string(),
)
_TOOL_CALL = _struct(function=_struct(arguments=pa.string(), name=pa.string()), id=pa.string(), type=pa.string())
_MESSAGE = _struct(
    content=pa.string(),
    name=pa.string(),
    role=pa.string(),
    tool_call_id=pa.string(),
    tool_calls=pa.list_(_TOOL_CALL),
)
_TOOL = _struct(
    function=_struct(description=pa.string(), name=pa.string(), parameters=_PARAMETERS),
    type=pa.string(),
)

TRAJECTORY_SCHEMA = pa.schema(
    [
        ("trajectory_id", pa.string()),
        ("instance_id", pa.string()),
        ("repo", pa.string()),
        ("trajectory", pa.list_(_MESSAGE)),
        ("tools", pa.list_(_TOOL)),
        ("model_patch", pa.string()),
        ("exit_status", pa.string()),
        ("resolved", pa.int64()),
        ("gen_tests_correct", pa.float64()),
        ("pred_passes_gen_tests", pa.float64()),
    ]
)
"""The schema lock: the ten columns of `DATASET` at `DATASET_REVISION`."""

# A tool's parameters are its own JSON Schema, so their contents are not locked.
_OPEN = "tools.function.parameters"


def schema_differences(found: pa.Schema) -> list[str]:
    """Return the differences of a file's schema from `TRAJECTORY_SCHEMA`, one line each.

    The parameters that tools declare may differ. Widths are ignored: some writers give strings 64-bit offsets and store
    0 or 1 in 8 bits.
    """
    return list(_in_fields("", pa.struct(list(TRAJECTORY_SCHEMA)), pa.struct(list(found))))


def _in_fields(path: str, locked: pa.StructType, found: pa.StructType) -> Iterator[str]:
    names = [field.name for field in found]
    for field in locked:
        where = f"{path}{field.name}"
        if field.name not in names:
            yield f"{where} ({_kind(field.type)}) is missing"
        elif where != _OPEN:
            yield from _in_type(where, field.type, found.field(field.name).type)
    for name in names:
        if name not in [field.name for field in locked]:
            yield f"{path}{name} is not in the schema"


def _in_type(where: str, locked: pa.DataType, found: pa.DataType) -> Iterator[str]:
    if pa.types.is_null(found):
        # A column that holds only nulls has no type.
        return
    if _kind(locked) != _kind(found):
        yield f"{where} is {_kind(found)}, not {_kind(locked)}"
    elif pa.types.is_struct(locked):
        yield from _in_fields(f"{where}.", locked, found)
    elif _kind(locked) == "list":
        yield from _in_type(where, locked.value_type, found.value_type)


def _kind(kind: pa.DataType) -> str:
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "string"
    if pa.types.is_integer(kind):
        return "integer"
    if pa.types.is_floating(kind):
        return "float"
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return "list"
    return "struct" if pa.types.is_struct(kind) else str(kind)
