"""Measure, without any model, how much of what the assistant writes only the hidden parts can explain.

A static adapter can learn what all repositories have in common, and the student reads what is in its own view. Left for
an adapter that depends on the prompt are words that stand in the hidden parts, that the student has not seen yet, and
that are rare in other repositories. The share of such words among all that the assistant writes is the potential.

Words are counted instead of tokens: a word is what is known or not, a tokenizer cuts rare ones into several tokens, and
the measure is the same for every student.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hyperagent.data.chat.messages import Dialogue, dialogue_of
from hyperagent.data.files.reader import read_rows_or_refusals
from hyperagent.data.pipeline.selection import NO_EXTRA_TEXT, RowFacts, Selection, select_rows
from hyperagent.data.pipeline.views import ViewSettings
from hyperagent.data.reports.hidden_words import HiddenWords, all_words, hidden_words
from hyperagent.errors import DataError, RowRefused
from hyperagent.progress import Progress, no_progress

RARE_SHARE = 0.3
"""A word is rare if it occurs in at most this share of the other repositories.

A rule with four equally frequent values, of which each repository states one, is something to distill; what a third of
the repositories write, a static adapter and the student's own training can supply."""
LEAST_POTENTIAL = 0.01
"""Share of words below which there is nothing to distill; docs/data.md has the measurements it is between."""
_MAX_EXAMPLES = 12


@dataclass(frozen=True)
class WordCounts:
    """Numbers of words that the assistant wrote, each a subset of the one before it."""

    supervised: int
    in_hidden: int
    """Words that the hidden parts contain."""
    unseen: int
    """Of these, words that the student's own view does not contain before them."""
    rare: int
    """Of these, words that are rare in other repositories."""

    @property
    def potential(self) -> float:
        """Share of the supervised words that only the hidden parts can explain, in [0, 1]."""
        return self.rare / max(1, self.supervised)


@dataclass(frozen=True)
class RepoPotential:
    """Words of one repository."""

    repo: str
    trajectories: int
    counts: WordCounts
    examples: Mapping[str, int]
    """The most frequent of the rare words, in lower case, with their numbers, the highest first."""


@dataclass(frozen=True)
class Potential:
    """Words of a sample of a data file."""

    trajectories: int
    left_out: Mapping[str, int]
    """Number of usable rows that were not measured, by reason."""
    refused: tuple[RowRefused, ...]
    """Refusals of rows that cannot be used."""
    total: WordCounts
    repos: tuple[RepoPotential, ...]
    """By potential, the highest first."""

    @property
    def verdict(self) -> str:
        """Whether there is anything to distill, and what to do."""
        share = f"{self.total.potential:.2%} of the assistant's words stand only in the hidden parts"
        if self.total.potential < LEAST_POTENTIAL:
            return (
                f"nothing to distill here: {share}, less than {LEAST_POTENTIAL:.0%}; choose a condition that says more "
                "about the repository (`hyperagent data extra`, a repository card), or a view that hides more of it "
                "(--internalize)"
            )
        return (
            f"there is something to distill: {share}; check that the teacher uses them with `hyperagent teacher-check`"
        )


def measure_potential(
    source: Path,
    views: ViewSettings,
    *,
    extra_of: Mapping[str, str],
    sample: int,
    seed: int = 0,
    reading: Progress = no_progress,
    counting: Progress = no_progress,
) -> Potential:
    """Count the words of a sample of rows that only the hidden parts can explain.

    Trajectories are taken whole: `views.max_tokens` is not applied. Memory holds the candidate words of the sample, and
    one trajectory at a time.

    Args:
        source: data file.
        extra_of: extra text by instance id; a row without one is left out if the condition contains it.
        sample: maximum number of rows, drawn by `seed`.
        reading: called with (rows read, rows of the file).
        counting: called with (rows done, rows to do); every row of the sample is read twice.

    Raises:
        DataError: the file is unusable, or the sample has fewer than two repositories.
    """
    selected = select_rows(source, Selection(sample=sample, seed=seed), progress=reading)
    needs_extra = "extra" in views.condition
    rows = {row.number: row for row in selected.rows if not needs_extra or extra_of.get(row.instance_id)}
    left_out = dict(selected.left_out)
    if missing := len(selected.rows) - len(rows):
        left_out[NO_EXTRA_TEXT] = missing
    if len({row.repo for row in rows.values()}) < 2:
        raise DataError(
            f"{len(rows)} rows of {source} are left, and they have fewer than two repositories, so no word is known to "
            "be rare elsewhere; use more repositories, or extra texts for more of them"
        )
    found: dict[int, HiddenWords] = {}
    for fact, dialogue in _dialogues(source, rows):
        found[fact.number] = hidden_words(dialogue, views, extra_of.get(fact.instance_id))
        counting(len(found), 2 * len(rows))
    repos_with = _repos_with(source, rows, {word for words in found.values() for word in words.unseen}, counting)
    return _potential(rows, found, repos_with, left_out=left_out, refused=selected.refused)


def _dialogues(source: Path, rows: Mapping[int, RowFacts]) -> Iterator[tuple[RowFacts, Dialogue]]:
    for number, row in enumerate(read_rows_or_refusals(source)):
        if number in rows:
            assert not isinstance(row, RowRefused)
            yield rows[number], dialogue_of(row)


def _repos_with(
    source: Path, rows: Mapping[int, RowFacts], wanted: set[str], counting: Progress
) -> dict[str, set[str]]:
    """Return the repositories in whose trajectories each of the wanted words occurs."""
    repos_with: dict[str, set[str]] = defaultdict(set)
    for done, (fact, dialogue) in enumerate(_dialogues(source, rows), start=1):
        for word in wanted & all_words(dialogue):
            repos_with[word].add(fact.repo)
        counting(len(rows) + done, 2 * len(rows))
    return repos_with


def _potential(
    rows: Mapping[int, RowFacts],
    found: Mapping[int, HiddenWords],
    repos_with: Mapping[str, set[str]],
    *,
    left_out: Mapping[str, int],
    refused: tuple[RowRefused, ...],
) -> Potential:
    by_repo: dict[str, list[HiddenWords]] = defaultdict(list)
    for number, words in found.items():
        by_repo[rows[number].repo].append(words)
    num_others = len(by_repo) - 1
    repos = []
    for repo, of_repo in by_repo.items():
        unseen: Counter[str] = Counter()
        for words in of_repo:
            unseen.update(words.unseen)
        rare = Counter(
            {
                word: count
                for word, count in unseen.items()
                if len(repos_with.get(word, set()) - {repo}) <= RARE_SHARE * num_others
            }
        )
        counts = WordCounts(
            supervised=sum(words.supervised for words in of_repo),
            in_hidden=sum(words.in_hidden for words in of_repo),
            unseen=unseen.total(),
            rare=rare.total(),
        )
        examples = dict(sorted(rare.items(), key=lambda item: (-item[1], item[0]))[:_MAX_EXAMPLES])
        repos.append(RepoPotential(repo, len(of_repo), counts, examples))
    names = ("supervised", "in_hidden", "unseen", "rare")
    total = WordCounts(*(sum(getattr(repo.counts, name) for repo in repos) for name in names))
    ordered = tuple(sorted(repos, key=lambda repo: (-repo.counts.potential, repo.repo)))
    return Potential(len(found), left_out, refused, total, ordered)
