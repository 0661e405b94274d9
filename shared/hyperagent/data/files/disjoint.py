"""Check that no repository is in two splits: its code and issues would leak from one into the other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from hyperagent.data.files.tokens_file import HELD_OUT_TASKS, TRAIN
from hyperagent.errors import DataError

_MAY_SHARE = frozenset({TRAIN, HELD_OUT_TASKS})
"""Splits that share repositories by definition: unseen tasks of repositories that training sees."""


def require_disjoint(rows: Iterable[tuple[str, str]]) -> None:
    """Check that every repository is in one split, or in `TRAIN` and `HELD_OUT_TASKS`.

    Args:
        rows: (repository, split) of every trajectory, in any order.

    Raises:
        DataError: a repository is in two other splits; the message names the first of them and counts the rest.
    """
    splits_of: dict[str, set[str]] = defaultdict(set)
    for repo, split in rows:
        splits_of[repo].add(split)
    leaked = sorted(repo for repo, splits in splits_of.items() if len(splits) > 1 and not splits <= _MAY_SHARE)
    if leaked:
        others = f" (and {len(leaked) - 1} other repositories)" if len(leaked) > 1 else ""
        raise DataError(
            f"the repository {leaked[0]}{others} is in the splits {' and '.join(sorted(splits_of[leaked[0]]))}, so what "
            "is reported on unseen repositories would be wrong; tokenize the data again with `hyperagent data tokenize`"
        )
