"""Lists that need no history: what is popular, with everyone, in a category or in a segment of users, and what is new.

Popularity decays with age. A segment's is estimated with everyone's as its prior, since few people buy few of the
items (empirical Bayes; Efron & Morris, JASA 1975).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from app.engine.batch import PROFILE_BUCKETS, profile_codes
from app.state.events import EventType
from models.data.times import DAY_MS
from models.recall import STRENGTH, Interactions

EVERYONE = -1
PRIOR = 1_000.0
"""Strength of everyone's wishes in each segment's."""
FEWEST_USERS = 30
"""Segments of fewer users have no list: their attribute is a name or a date rather than a trait."""

_WANTED = STRENGTH.astype(np.float64)
# Many look, few want: views are left to break ties.
_WANTED[[EventType.SELECT_ITEM, EventType.VIEW_ITEM]] /= 10


class Lists(NamedTuple):
    """A list for everyone and one for each group that has any."""

    groups: npt.NDArray[np.int32]
    """[G]: the category or profile code that a list is of, ascending; the first is -1, everyone."""
    rows: npt.NDArray[np.int32]
    """[G, K]: items, best first, padded with -1."""
    scores: npt.NDArray[np.float32]
    """[G, K]: positive, padded with 0."""


def popular(past: Interactions, *, now_ms: int, half_life_days: float = 365.0, k: int = 300) -> Lists:
    """By the decayed strengths of the last event of each user, item and type."""
    wanted = _wanted(past, now_ms, half_life_days, _users(past))
    return _lists([(EVERYONE, np.arange(past.n_items), _total(wanted))], k)


def new(created_ms: npt.NDArray[np.int64], *, k: int = 300) -> Lists:
    """By the day since 1970 on which each item [n] came."""
    return _lists([(EVERYONE, np.arange(len(created_ms)), created_ms / DAY_MS)], k)


def by_category(
    past: Interactions, category: npt.NDArray[np.int32], *, now_ms: int, half_life_days: float = 365.0, k: int = 100
) -> Lists:
    """`popular` among the items of each category; `category` [n, depth] has the codes of an item's, -1 for none."""
    popularity = _total(_wanted(past, now_ms, half_life_days, _users(past)))
    items = np.arange(past.n_items)
    # A path that runs in a circle has a category twice.
    group, item = np.unique(np.stack([category.T.ravel(), np.tile(items, category.shape[1])]), axis=1)
    codes, starts = np.unique(group, return_index=True)
    members = np.split(item, starts[1:])
    named = [(code, of, popularity[of]) for code, of in zip(codes.tolist(), members, strict=True) if code >= 0]
    return _lists([(EVERYONE, items, popularity), *named], k)


def by_segment(
    past: Interactions,
    profiles: Sequence[Mapping[str, str]],
    *,
    now_ms: int,
    half_life_days: float = 30.0,
    k: int = 100,
    width: int = 8,
) -> Lists:
    """What the users with each profile code want more than others do; `profiles` are of the users by number.

    With p the share of an item in what everyone wants, counted as `popular` does, and q its share in what the
    segment wants and `PRIOR` times p, the score is q * q / p, and everyone's is p. The lists of a user's first
    `width` attributes are to be added.
    """
    if _users(past) > len(profiles):
        raise ValueError(f"an event is of user {_users(past) - 1}, and there are {len(profiles)} profiles")
    wanted = _wanted(past, now_ms, half_life_days, len(profiles))
    total = _total(wanted)
    share = total / max(total.sum(), 1e-300)
    codes = np.array([profile_codes(profile, width) for profile in profiles], np.int64).reshape(-1, width)
    user, place = np.nonzero(codes)
    member = sp.csr_matrix((np.ones(len(user)), (codes[user, place], user)), shape=(PROFILE_BUCKETS, len(profiles)))
    # Two attributes of a user may have the same code.
    member.data[:] = 1.0
    segments = np.flatnonzero(np.diff(member.indptr) >= FEWEST_USERS)
    items = np.arange(past.n_items)
    lists = [(EVERYONE, items, share)]
    for code, wants in zip(segments.tolist(), (member[segments] @ wanted).tocsr(), strict=True):
        own = (wants.toarray().ravel() + PRIOR * share) / (wants.sum() + PRIOR)
        lists.append((code, items, np.divide(own * own, share, out=np.zeros_like(share), where=share > 0)))
    return _lists(lists, k)


def _users(past: Interactions) -> int:
    return int(past.user.max(initial=-1)) + 1


def _wanted(past: Interactions, now_ms: int, half_life_days: float, users: int) -> sp.csr_matrix:
    """[users, n]; each user counts once an item and type, when it was last."""
    user, row, ts_ms, kind, n_items = past
    event = (user.astype(np.int64) * n_items + row) * 256 + kind
    # The first of the reversed is the last.
    _, first = np.unique(event[::-1], return_index=True)
    last = len(user) - 1 - first
    weight = _WANTED[kind[last]] * np.exp2((ts_ms[last] - now_ms) / DAY_MS / half_life_days)
    return sp.csr_matrix((weight, (user[last], row[last])), shape=(users, n_items))


def _total(wanted: sp.csr_matrix) -> npt.NDArray[np.float64]:
    total: npt.NDArray[np.float64] = np.asarray(wanted.sum(0)).ravel()
    return total


def _lists(lists: Sequence[tuple[int, npt.NDArray[np.int64], npt.NDArray[np.float64]]], k: int) -> Lists:
    """Of group, items and scores, the best `k` positive ones each."""
    made = Lists(
        np.array([group for group, _, _ in lists], np.int32),
        np.full((len(lists), k), -1, np.int32),
        np.zeros((len(lists), k), np.float32),
    )
    for number, (_, items, scores) in enumerate(lists):
        best = np.argsort(-scores, kind="stable")[:k]
        best = best[scores[best] > 0]
        made.rows[number, : len(best)], made.scores[number, : len(best)] = items[best], scores[best]
    return made
