"""House rules of a repository: nine choices that only its system prompt states.

Every repository draws each rule by itself, and no two repositories have the same combination. So the combination of a
repository that training has not seen is new, while each single value occurs in about a quarter of the others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random
from types import MappingProxyType

KINDS = ("add", "remove", "check", "label")
"""Kinds of work; each has a verb of its own in every repository."""

# The words that a value belongs to stand right before it, within the three neighbors that the hypernetwork binds to a word.
_SENTENCES: Mapping[str, tuple[str, tuple[str, ...]]] = MappingProxyType(
    {
        "script": ("Use only the script {}.", ("./depot", "./ledger", "./store", "./shelf")),
        "add": ("The verb to add is {}.", ("append", "insert", "enter", "receive")),
        "remove": ("The verb to remove is {}.", ("erase", "discard", "strike", "release")),
        "check": ("The verb to check is {}.", ("tally", "verify", "reckon", "inspect")),
        "label": ("The verb to label is {}.", ("mark", "stamp", "brand", "tag")),
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

    def script(self) -> str:
        """Return the source of the repository's own script, which refuses everything that is not by the rules."""
        rule = self.values
        pattern = _record_pattern(rule["record"])
        name, number = ("1", "2") if rule["record"].startswith("name") else ("2", "1")
        # Only commands that bash has built in: starting any other takes longer than all the rest of the script.
        return f"""#!/bin/bash
fail() {{ echo "$1"; exit 1; }}
[[ $# -eq 4 && $3 == {rule["reason"]} ]] || fail "no reason"
[[ $2 =~ ^{pattern}$ ]] || fail "no record: $2"
name=${{BASH_REMATCH[{name}]}} number=${{BASH_REMATCH[{number}]}}
mapfile -t lines < stock.txt
for place in "${{!lines[@]}}"; do
    if [[ ${{lines[place]}} == "$name "* ]]; then held=${{lines[place]#* }}; break; fi
done
[[ -n $held ]] || fail "no $name here"
case $1 in
{rule["add"]}) left=$((held + number)) ;;
{rule["remove"]}) left=$((held - number)) ;;
{rule["check"]}) [[ $held -eq $number ]] || fail "there are $held"; echo "right: $held"; exit ;;
{rule["label"]}) echo "[$name $number]"; exit ;;
*) fail "no verb: $1" ;;
esac
[[ $left -ge 0 ]] || fail "only $held"
lines[place]="$name $left"
printf '%s\\n' "${{lines[@]}}" > stock.txt
echo "left: $left"
"""


def draw_repositories(seed: int, count: int) -> Iterator[tuple[HouseRules, Random]]:
    """Yield each repository's rules, no two alike, and the generator that draws whatever else is its own.

    A repository depends on the seed and on those before it, but not on `count`.
    """
    taken: set[str] = set()
    for index in range(count):
        random = Random(f"{seed}/rules/{index}")
        rules = HouseRules.draw(random)
        while rules.system_prompt() in taken:
            rules = HouseRules.draw(random)
        taken.add(rules.system_prompt())
        yield rules, random


def followed(text: str, rules: HouseRules) -> dict[str, bool]:
    """Return whether `text`, such as a command that was generated, follows each rule that it shows.

    A rule that the text neither follows nor breaks, because none of the rule's values is in it, is left out.
    """
    shown = {}
    for name, (_, values) in _SENTENCES.items():
        patterns = {value: _record_pattern(value) if name == "record" else re.escape(value) for value in values}
        found = {value for value in values if re.search(rf"(?<![\w-]){patterns[value]}(?![\w-])", text)}
        if found:
            shown[name] = found == {rules.values[name]}
    return shown


def _record_pattern(form: str) -> str:
    """Return a regular expression, also for bash, whose groups are a record's name and number as the form orders them."""
    return re.sub("number|name", lambda word: {"number": "([0-9]+)", "name": "([a-z]+)"}[word[0]], form)
