"""Events and the fold from events to user state.

A user's state is a function of the *set* of their events, never of the order in which they arrived:
the last `window` events by event time, every exclusion, the profile. `fold` says it in Python;
`fold.lua` does it inside Redis, and a property test holds the two together.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from hashlib import blake2b
from struct import Struct
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt


class EventType(IntEnum):
    """GA4's e-commerce events and the usual feedback; the numbers are stored and never change."""

    OTHER = 0
    VIEW_ITEM_LIST = 1
    SELECT_ITEM = 2
    VIEW_ITEM = 3
    ADD_TO_CART = 4
    REMOVE_FROM_CART = 5
    ADD_TO_WISHLIST = 6
    BEGIN_CHECKOUT = 7
    PURCHASE = 8
    REFUND = 9
    SEARCH = 10
    RATE = 11
    LIKE = 12
    DISLIKE = 13
    HIDE = 14


ALIASES: Mapping[str, EventType] = MappingProxyType(
    {kind.name.lower(): kind for kind in EventType if kind is not EventType.OTHER}
    | {
        "impression": EventType.VIEW_ITEM_LIST,
        "click": EventType.SELECT_ITEM,
        "view": EventType.VIEW_ITEM,
        "detail-page-view": EventType.VIEW_ITEM,
        "pv": EventType.VIEW_ITEM,
        "add-to-cart": EventType.ADD_TO_CART,
        "addtocart": EventType.ADD_TO_CART,
        "cart": EventType.ADD_TO_CART,
        "fav": EventType.ADD_TO_WISHLIST,
        "bookmark": EventType.ADD_TO_WISHLIST,
        "purchase-complete": EventType.PURCHASE,
        "buy": EventType.PURCHASE,
        "transaction": EventType.PURCHASE,
        "not_interested": EventType.HIDE,
    }
)

# An impression or a search says what the shop did or what was typed, not what the shopper thinks of
# an item; folding them in would push the real interactions out of the window.
FOLDED = frozenset(EventType) - {EventType.OTHER, EventType.VIEW_ITEM_LIST, EventType.SEARCH}

MS_PER_DAY = 86_400_000.0

EVENT = np.dtype(
    [
        ("ts", "<i8"),  # event time, UTC epoch milliseconds
        ("event", "<u8"),  # hash of the event id; breaks ties of ts, finds duplicates
        ("item", "<i8"),  # item_key of the shop's item id
        ("value", "<f4"),  # rating, or the price paid for one unit; NaN where unknown
        ("quantity", "<u2"),
        ("type", "u1"),
        ("unused", "u1"),
    ]
)
"""One interaction, 32 bytes, as stored in Redis."""

_EVENT = Struct("<qQqfHBB")
_ENCODER = json.JSONEncoder(separators=(",", ":"))

EXCLUSION = np.dtype([("item", "<i8"), ("kind", "u1")])
"""One thing not to be shown again, 9 bytes, as stored in Redis."""

HIDDEN, BOUGHT = 1, 2
EXCLUDES: Mapping[EventType, int] = MappingProxyType(
    {EventType.HIDE: HIDDEN, EventType.DISLIKE: HIDDEN, EventType.PURCHASE: BOUGHT}
)

Events = npt.NDArray[np.void]
Exclusions = npt.NDArray[np.void]


def item_key(item_id: str) -> int:
    """Stable signed 64-bit hash by which Redis, the wire and the log know an item."""
    return int.from_bytes(blake2b(item_id.encode(), digest_size=8).digest(), "little", signed=True)


def event_key(event_id: str, line: int = 0) -> int:
    """Stable unsigned 64-bit hash of an event id and of the line within a multi-item event."""
    name = event_id.encode() + line.to_bytes(4, "little")
    return int.from_bytes(blake2b(name, digest_size=8).digest(), "little")


def content_id(
    kind: str,
    user: str | None,
    session: str | None,
    ts_ms: int | None,
    lines: Sequence[tuple[str, int, float | None]],
    extra: str = "",
) -> str:
    """The id of an event that was given none: 24 hex digits that depend on its content alone.

    `kind` is the type as stored (a lowercase `EventType` name, or the unknown type as it came);
    `lines` are (item id, quantity, unit price or rating). The same content has the same id in
    POST /events and in a table read offline, so a retry or a replay never counts twice.
    """
    parts = [(item_id, int(quantity), None if value is None else float(value)) for item_id, quantity, value in lines]
    content = _ENCODER.encode([kind, user, session, ts_ms, parts, extra])
    return blake2b(content.encode(), digest_size=12).hexdigest()


def packed(event_id: str, kind: EventType, ts_ms: int, lines: Sequence[tuple[str, int, float | None]]) -> bytes:
    """One EVENT per line (item id, quantity, unit price or rating) of an event, in the lines' order, as stored."""
    return b"".join(
        _EVENT.pack(
            ts_ms,
            event_key(event_id, i),
            item_key(item_id),
            math.nan if value is None else value,
            min(max(quantity, 0), 65_535),
            kind,
            0,
        )
        for i, (item_id, quantity, value) in enumerate(lines)
    )


def records(event_id: str, kind: EventType, ts_ms: int, lines: Sequence[tuple[str, int, float | None]]) -> Events:
    """`packed`, as an array."""
    return np.frombuffer(packed(event_id, kind, ts_ms, lines), EVENT)


@dataclass(frozen=True, slots=True)
class UserState:
    """Everything the engine knows of a user."""

    events: Events = field(default_factory=lambda: np.empty(0, EVENT))
    """The last `window` folded events, ascending by (ts, event)."""
    exclusions: Exclusions = field(default_factory=lambda: np.empty(0, EXCLUSION))
    """Distinct (item, kind), in no particular order."""
    profile: Mapping[str, str] = field(default_factory=dict)


def exclusions_of(events: Events) -> Exclusions:
    """The distinct exclusions that these events cause."""
    kinds = np.zeros(256, "u1")
    for kind, exclusion in EXCLUDES.items():
        kinds[kind] = exclusion
    caused = np.empty(len(events), EXCLUSION)
    caused["item"], caused["kind"] = events["item"], kinds[events["type"]]
    return np.unique(caused[caused["kind"] > 0])


def fold(state: UserState, events: Events, window: int) -> UserState:
    """`state` after `events`, whichever order they come in; an event already in the window takes no second place.

    Recognising a duplicate that has left the window is the caller's part: such an event is older
    than the whole window and so changes nothing here.
    """
    folded = events[np.isin(events["type"], np.fromiter(FOLDED, "u1"))]
    both = np.concatenate([state.events, folded])
    _, first = np.unique(both["event"], return_index=True)
    both = both[np.sort(first)]
    both = both[np.lexsort((both["event"], both["ts"]))][-window:]
    excluded = np.unique(np.concatenate([state.exclusions, exclusions_of(folded)]))
    return UserState(both, excluded, state.profile)


def join(states: Iterable[UserState], window: int) -> UserState:
    """One state from several of the same person (a user and the session in hand); the first profile wins by key."""
    states = (UserState(), *states)
    # As plain bytes: numpy copies and compares records a field at a time, ten times slower.
    events = np.concatenate([state.events.view("V32") for state in states]).view(EVENT)
    events = events.take(np.lexsort((events["event"], events["ts"])))
    events = events.take(_first(events["event"]))
    # S9 cuts zeros off the end, where the kind is, which is never zero.
    excluded = np.unique(np.concatenate([state.exclusions.view("S9") for state in states])).view(EXCLUSION)
    profile = {key: value for state in reversed(states) for key, value in state.profile.items()}
    return UserState(events[-window:], excluded, profile)


def _first(ordered: npt.NDArray[Any]) -> npt.NDArray[np.intp]:
    """Where each run of equal neighbours begins; copies of an event are neighbours because they agree on ts."""
    begins = np.ones(len(ordered), bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    return np.flatnonzero(begins)
