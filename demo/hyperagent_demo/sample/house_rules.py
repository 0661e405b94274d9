"""House rules of a repository: nine choices that only its system prompt states.

Every repository draws each rule by itself, so that the combination of a repository that training has not seen is new, while
each single value occurs in about a quarter of the others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from types import MappingProxyType

KINDS = ("add", "remove", "check", "label")
"""Kinds of work; each has a verb of its own in every repository."""

_SENTENCES: Mapping[str, tuple[str, tuple[str, ...]]] = MappingProxyType(
    {
        "script": ("Use only the script {}.", ("./depot", "./ledger", "./store", "./shelf")),
        "add": ("To add goods, its verb is {}.", ("append", "insert", "enter", "receive")),
        "remove": ("To remove goods, its verb is {}.", ("erase", "discard", "strike", "release")),
        "check": ("To check goods, its verb is {}.", ("tally", "verify", "reckon", "inspect")),
        "label": ("To label goods, its verb is {}.", ("mark", "stamp", "brand", "tag")),
        "record": ("Write goods as {}.", ("name=number", "name:number", "number/name", "number@name")),
        "reason": ("Give the reason after {}.", ("--note", "--why", "--memo", "--cause")),
        "closing": ("Say that the work is {}.", ("finished", "complete", "settled", "accomplished")),
        "signature": ("Sign with {}.", ("maple", "birch", "cedar", "willow")),
    }
)
RULES = tuple(_SENTENCES)
"""Names of the rules."""


@dataclass(frozen=True)
class HouseRules:
    """The rules of one repository."""

    values: Mapping[str, str]
    """The chosen value of every rule."""

    @classmethod
    def draw(cls, random: Random) -> HouseRules:
        """Draw every rule by itself."""
        return cls({name: random.choice(values) for name, (_, values) in _SENTENCES.items()})

    @classmethod
    def read(cls, system_prompt: str) -> HouseRules | None:
        """Return the rules that a system prompt states; None if it is not a prompt of this sample."""
        found = {}
        for name, (sentence, values) in _SENTENCES.items():
            stated = [value for value in values if sentence.format(value) in system_prompt]
            if len(stated) != 1:
                return None
            found[name] = stated[0]
        return cls(found)

    def system_prompt(self) -> str:
        """Return the only text that states the rules."""
        return " ".join(["House rules.", *(_SENTENCES[name][0].format(value) for name, value in self.values.items())])

    def record(self, good: str, number: int) -> str:
        """Return how this repository writes a number of goods."""
        return re.sub("number|name", lambda word: {"number": str(number), "name": good}[word[0]], self.values["record"])

    def command(self, kind: str, good: str, number: int, reason: str) -> str:
        """Return the command that does the work by the rules."""
        rule = self.values
        return f"{rule['script']} {rule[kind]} {self.record(good, number)} {rule['reason']} {reason}"

    def message(self) -> str:
        """Return the message that ends the work."""
        return f"The work is {self.values['closing']}. {self.values['signature']}"

    def visible_in(self, text: str) -> list[str]:
        """Return the words of the rules that occur in `text`, such as a command that was generated."""
        shown = [value for name, value in self.values.items() if name != "record"]
        return [value for value in shown if re.search(rf"(?<![\w-]){re.escape(value)}(?![\w-])", text)]

    def script(self) -> str:
        """Return the source of the repository's own script, which refuses everything that is not by the rules."""
        rule = self.values
        pattern = re.sub(
            "number|name", lambda word: {"number": "([0-9]+)", "name": "([a-z]+)"}[word[0]], rule["record"]
        )
        name, number = ("1", "2") if rule["record"].startswith("name") else ("2", "1")
        return f"""#!/bin/bash
stock=stock.txt
fail() {{ echo "$1"; exit 1; }}
[[ $# -eq 4 && $3 == {rule["reason"]} ]] || fail "no reason"
[[ $2 =~ ^{pattern}$ ]] || fail "no record: $2"
name=${{BASH_REMATCH[{name}]}} number=${{BASH_REMATCH[{number}]}}
read -r _ held < <(grep "^$name " $stock) || fail "no $name here"
case $1 in
{rule["add"]}) left=$((held + number)) ;;
{rule["remove"]}) left=$((held - number)) ;;
{rule["check"]}) [[ $held -eq $number ]] || fail "there are $held"; echo "right: $held"; exit ;;
{rule["label"]}) echo "[$name $number]"; exit ;;
*) fail "no verb: $1" ;;
esac
[[ $left -ge 0 ]] || fail "only $held"
sed -i "s/^$name .*/$name $left/" $stock
echo "left: $left"
"""
