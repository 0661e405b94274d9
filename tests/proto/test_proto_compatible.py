"""Test that the contract evolves without breaking changes in the sense of `buf breaking`: contract.json stays valid."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import pytest
from contract import Contract, breaking_changes, contract_text, extract
from descriptors import PROTO, descriptors_of, project_descriptors
from record_contract import record

# The contracts that each kind of change produces, one per element that can change, and the start of the report.
Changes = Iterator[tuple[Contract, str]]


@pytest.fixture(scope="module")
def current() -> Contract:
    return extract(project_descriptors())


@pytest.fixture(scope="module")
def recorded() -> Contract:
    found: Contract = json.loads((PROTO / "contract.json").read_text())
    return found


def test_nothing_promised_is_broken(recorded: Contract, current: Contract) -> None:
    assert breaking_changes(recorded, current) == []


def test_the_recorded_contract_is_up_to_date() -> None:
    assert (PROTO / "contract.json").read_text() == contract_text(PROTO), "contract.json is stale: run `make proto`"


def _removed(kind: str) -> Callable[[Contract], Changes]:
    def changes(contract: Contract) -> Changes:
        for name in contract[kind]:
            changed = deepcopy(contract)
            del changed[kind][name]
            yield changed, f"{kind[:-1]} {name} was removed"

    return changes


def _renamed(kind: str) -> Callable[[Contract], Changes]:
    def changes(contract: Contract) -> Changes:
        for name in contract[kind]:
            changed = deepcopy(contract)
            changed[kind][f"{name}Renamed"] = changed[kind].pop(name)
            yield changed, f"{kind[:-1]} {name} was removed"

    return changes


def _part(kind: str, parts: str, change: Callable[[Contract, str], None]) -> Callable[[Contract], Changes]:
    """Return a function that applies `change` to each field of a message, value of an enum or method of a service."""

    def changes(contract: Contract) -> Changes:
        for owner, held in contract[kind].items():
            for key in held[parts]:
                changed = deepcopy(contract)
                change(changed[kind][owner][parts], key)
                name = held[parts][key]["name"] if parts == "fields" else key
                yield changed, f"{kind[:-1]} {owner}: {parts[:-1]} {name} "

    return changes


def _remove(parts: Contract, key: str) -> None:
    del parts[key]


def _rename(parts: Contract, key: str) -> None:
    parts[f"{key}_renamed"] = parts.pop(key)


def _rename_field(fields: Contract, number: str) -> None:
    fields[number]["name"] += "_renamed"


def _renumber_field(fields: Contract, number: str) -> None:
    fields["1000"] = fields.pop(number)


def _renumber_value(values: Contract, name: str) -> None:
    values[name] += 1000


def _replace_fact(fact: str) -> Callable[[Contract, str], None]:
    """Return a change that replaces one fact of a field or a method."""

    def change(parts: Contract, key: str) -> None:
        parts[key][fact] = f"not {parts[key].get(fact)}"

    return change


def _flip(fact: str) -> Callable[[Contract, str], None]:
    def change(methods: Contract, name: str) -> None:
        methods[name][fact] = not methods[name][fact]

    return change


BREAKING = {
    "message removed": _removed("messages"),
    "message renamed": _renamed("messages"),
    "enum removed": _removed("enums"),
    "enum renamed": _renamed("enums"),
    "service removed": _removed("services"),
    "service renamed": _renamed("services"),
    "field removed": _part("messages", "fields", _remove),
    "field renamed": _part("messages", "fields", _rename_field),
    "field renumbered": _part("messages", "fields", _renumber_field),
    **{f"field's {fact}": _part("messages", "fields", _replace_fact(fact)) for fact in ("type", "type_name", "label")},
    "field's oneof": _part("messages", "fields", _replace_fact("oneof")),
    "value removed": _part("enums", "values", _remove),
    "value renamed": _part("enums", "values", _rename),
    "value renumbered": _part("enums", "values", _renumber_value),
    "method removed": _part("services", "methods", _remove),
    "method renamed": _part("services", "methods", _rename),
    **{f"method's {fact}": _part("services", "methods", _replace_fact(fact)) for fact in ("request", "response")},
    "client streaming": _part("services", "methods", _flip("client_streaming")),
    "server streaming": _part("services", "methods", _flip("server_streaming")),
}


@pytest.mark.parametrize("kind", BREAKING)
def test_a_breaking_change_is_reported_in_one_sentence_that_names_it(kind: str, current: Contract) -> None:
    changes = list(BREAKING[kind](current))
    assert changes
    for changed, beginning in changes:
        found = breaking_changes(current, changed)
        assert len(found) == 1
        assert found[0].startswith(beginning)


SAMPLE = """
syntax = "proto3";
package a.v1;
service RowService { rpc Get(GetRequest) returns (stream GetResponse); }
message GetRequest {
  reserved 7 to 9;
  reserved "old";
  uint32 first = 1;
  optional uint32 last = 2;
  map<string, Row> rows = 3;
  oneof item {
    Row row = 4;
    bytes packed = 5;
  }
}
message GetResponse { Outcome outcome = 1; }
message Row {}
enum Outcome { OUTCOME_UNSPECIFIED = 0; OUTCOME_WRITTEN = 1; }
"""
REQUEST = "message a.v1.GetRequest: "
# The text in the .proto file, its replacement, and the start of the report.
BREAKING_EDITS = [
    ("uint32 first = 1", "uint32 begin = 1", f"{REQUEST}field first = 1 was renamed to begin"),
    ("uint32 first = 1", "uint32 first = 6", f"{REQUEST}field first changed its number from 1 to 6"),
    ("uint32 first = 1", "uint64 first = 1", f"{REQUEST}field first = 1 changed its type from uint32 to uint64"),
    ("uint32 first = 1", "repeated uint32 first = 1", f"{REQUEST}field first = 1 changed its label from singular to"),
    ("optional uint32", "uint32", f"{REQUEST}field last = 2 changed its label from optional to singular"),
    ("<string, Row>", "<string, Outcome>", f"{REQUEST}field rows = 3 changed its type from map<string, a.v1.Row> to"),
    ("Row row = 4", "GetResponse row = 4", f"{REQUEST}field row = 4 changed its type_name from a.v1.Row to"),
    (
        "oneof item {\n    Row row = 4;",
        "Row row = 4; oneof item {",
        f"{REQUEST}field row = 4 changed its oneof from item to None",
    ),
    ("uint32 first = 1;", "", f"{REQUEST}field first = 1 was removed, and its number and name are not both reserved"),
    ("uint32 first = 1;", "reserved 1;", f"{REQUEST}field first = 1 was removed, and its number and name are"),
    ("uint32 first = 1;", 'reserved "first";', f"{REQUEST}field first = 1 was removed, and its number and name are"),
    ("reserved 7 to 9;", "reserved 7, 9;", f"{REQUEST}the numbers 7 to 9 were reserved and no longer are"),
    ("reserved 7 to 9;", "string new = 8;", f"{REQUEST}the numbers 7 to 9 were reserved and no longer are"),
    ('reserved "old";', "", f"{REQUEST}the name old was reserved and no longer is"),
    ("OUTCOME_WRITTEN = 1", "OUTCOME_WRITTEN = 2", "enum a.v1.Outcome: value OUTCOME_WRITTEN changed its number from"),
    ("OUTCOME_WRITTEN = 1", "OUTCOME_DONE = 1", "enum a.v1.Outcome: value OUTCOME_WRITTEN = 1 was removed or renamed"),
    ("(stream", "(", "service a.v1.RowService: method Get changed its server_streaming from True to False"),
    ("Get(", "Get(stream ", "service a.v1.RowService: method Get changed its client_streaming from False to True"),
    ("Get(GetRequest)", "Get(Row)", "service a.v1.RowService: method Get changed its request from a.v1.GetRequest to"),
    ("stream GetResponse", "stream Row", "service a.v1.RowService: method Get changed its response from"),
]
COMPATIBLE_EDITS = [
    ("uint32 first = 1;", "uint32 first = 1; Row new = 6;"),
    ("bytes packed = 5;", "bytes packed = 5; string new = 6;"),
    ("uint32 first = 1;", "uint32 first = 1; oneof new { string a = 10; string b = 11; }"),
    ("uint32 first = 1;", 'reserved 1; reserved "first";'),
    ("reserved 7 to 9;", "reserved 7, 8 to 20;"),
    ("uint32 first = 1;\n  optional uint32 last = 2;", "optional uint32 last = 2;\n  uint32 first = 1;  // moved"),
    ("OUTCOME_WRITTEN = 1;", "OUTCOME_WRITTEN = 1; OUTCOME_NEW = 2; reserved 5;"),
    ("message Row {}", "message Row { message New { enum Kind { NEW = 0; } } }"),
    ("GetResponse);", "GetResponse); rpc New(Row) returns (Row);"),
    ("message Row {}", "message Row {} service NewService {}"),
]


@pytest.mark.parametrize(("written", "instead", "beginning"), BREAKING_EDITS)
def test_a_breaking_edit_is_reported(written: str, instead: str, beginning: str, tmp_path: Path) -> None:
    found = breaking_changes(_sample(tmp_path), _sample(tmp_path, written, instead))
    assert len(found) == 1
    assert found[0].startswith(beginning)


@pytest.mark.parametrize(("written", "instead"), COMPATIBLE_EDITS)
def test_an_addition_breaks_nothing(written: str, instead: str, tmp_path: Path) -> None:
    assert breaking_changes(_sample(tmp_path), _sample(tmp_path, written, instead)) == []


def test_an_addition_is_recorded_and_a_breaking_change_is_not(tmp_path: Path) -> None:
    contract = tmp_path / "contract.json"
    _sample(tmp_path)
    with pytest.raises(ValueError, match="run `make proto`"):
        record(tmp_path, check=True)
    assert not contract.exists()
    record(tmp_path, check=False)
    record(tmp_path, check=True)

    _sample(tmp_path, "message Row {}", "message Row { uint32 new = 1; }")
    with pytest.raises(ValueError, match="run `make proto`"):
        record(tmp_path, check=True)
    record(tmp_path, check=False)
    kept = contract.read_text()
    assert '"1": {"name": "new", "type": "uint32", "label": "singular"}' in kept

    _sample(tmp_path)
    for check in (True, False):
        with pytest.raises(ValueError, match=r"message a\.v1\.Row: field new = 1 was removed"):
            record(tmp_path, check=check)
    assert contract.read_text() == kept


def _sample(folder: Path, written: str = "", instead: str = "") -> Contract:
    """Return the sample's contract after replacing the text `written` with `instead`."""
    assert not written or SAMPLE.count(written) == 1
    return extract(descriptors_of(SAMPLE.replace(written, instead, 1), folder, "a/v1/sample.proto"))
