"""Explain: one plain sentence for an item of a slate, when the caller asks."""

from collections.abc import Mapping, Sequence

from app.catalog import Catalog
from app.engine.anchors import anchors
from app.engine.batch import Batch
from app.engine.recall import ListSource, NeighbourSource, Source
from app.state.events import EventType

_VERBS = {EventType.PURCHASE: "bought", EventType.ADD_TO_CART: "put in the cart", EventType.ADD_TO_WISHLIST: "saved"}


def reason(
    index: int,
    row: int,
    names: Sequence[str],
    sources: Mapping[str, Source],
    batch: Batch,
    catalog: Catalog,
    context: bool,
) -> str:
    """Why query `index` was given the item at `row`, from the most telling of the sources that proposed it."""
    mine = (batch.query == index) & (batch.row == row)
    if bool(mine.any()):
        return f"You {_VERBS.get(EventType(int(batch.kind[mine][-1])), 'looked at')} this before"
    for name in names:
        source = sources[name]
        if isinstance(source, NeighbourSource):
            query, anchor, weight = anchors([source.rule], batch, context)
            anchor, weight = anchor[query == index], weight[query == index]
            gain = ((source.table.rows[anchor] == row) * source.table.weights[anchor]).sum(1) * weight
            if len(gain) and float(gain.max()) > 0:
                title = catalog.attributes(int(anchor[gain.argmax()])).get("title")
                return f"Goes with {title}" if title else "Goes with what you looked at"
    known = bool((batch.query == index).any()) or bool((batch.anchor_query == index).any())
    if known and any(not isinstance(sources[name], ListSource) for name in names):
        return "Fits what you looked at lately"
    lists = [name for name in names if isinstance(sources[name], ListSource)]
    return f"In the list: {', '.join(lists)}" if lists else "Within your filters"
