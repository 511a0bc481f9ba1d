"""The stages between a user's state and the ranker as compiled loops: what a CPU runs.

On a GPU these stages are tensor operations (recall.py, merge.py, features.py); there, launching an
operation costs as much as doing it for a thousand queries. On a CPU the same operations move every
intermediate result through memory and cost microseconds each: one query took 600 of them. Here a query's
candidates stay in the first-level cache from the first neighbour to the last feature. `tests/test_kernels.py`
holds both forms to each other.

Signatures are explicit, so that everything is compiled when the module is first imported, and kept on disk
(`NUMBA_CACHE_DIR`, by default beside this file); nothing is compiled while a request waits. They share a file, for what
is kept of one is renewed only when its own file changes, not when that of one it calls does. Half-precision
floats come as their bits, uint16: numba has no such type on a CPU.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

Longs = npt.NDArray[np.int64]
Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.uint16]
Shorts = npt.NDArray[np.int16]
Flags = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]
Keys = npt.NDArray[np.uint64]
Words = npt.NDArray[np.uint32]

BUCKETS = 4096
"""Of the first pass of a selection: sign, exponent and three bits of the mantissa."""
COUNTED = 1024
"""Keys up to which counting is the faster sort."""
ABSENT = np.float32(10_000.0)
"""The rank of an item in a source that does not propose it."""
NEVER_DAYS = np.float32(1000.0)
"""Stands for 'never' where a feature is how long ago something was."""
MINUTES = np.float32(1440.0)
"""Of a day: how long ago is counted in them, for the order of clicks within a session says much."""
GROUPS = 3
"""Leaf category, department, brand."""
OWN = 3
"""Ways in which a user can have met an item: viewed, put in the cart, bought."""
AHEAD = 32
"""Candidates between asking for an item's columns and reading them."""
TILE = 64
"""Candidates whose features are computed together."""
SPARE = 16
"""Blocks of scores that are looked into beside as many as are wanted and an eighth more."""
BLOCK = 16
"""Scores that are passed over together, at most."""
HALVES = 1 << 15
"""Bit patterns of a positive float of half precision."""
LOWEST = -HALVES
"""Not above any."""
REORDERED = {"reassoc", "contract"}
"""What a compiler may do to a sum for it to be several at a time."""
LANES = 128
"""Rows that go through a forest together: their features stay in the first-level cache."""


@intrinsic
def _single(typing: Any, bits: Any) -> Any:
    """The float32 value of a float16 given by its bits: one instruction."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def _prefetch(typing: Any, table: Any, position: Any) -> Any:
    """Asks for the cache line of a contiguous table's entry, so that later reads do not wait one after the other."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        address = builder.bitcast(builder.gep(array.data, [arguments[1]]), byte)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [address, word(0), word(3), word(1)])
        return context.get_dummy_value()

    return types.none(table, types.int64), generate


@intrinsic
def _bits(typing: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
def _float(typing: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@njit("u4(f4)", inline="always")
def _descending(score: np.float32) -> np.uint32:
    """Ascends as the scores descend."""
    bits = _bits(score + np.float32(0.0))  # makes -0.0 equal 0.0
    if bits >> np.uint32(31):
        return bits
    return np.uint32(0x7FFFFFFF) - bits


@njit("f4(u4)", inline="always")
def _score(descending: np.uint32) -> np.float32:
    """What `_descending` was given."""
    if descending >> np.uint32(31):
        return _float(descending)
    return _float(np.uint32(0x7FFFFFFF) - descending)


@njit("f4(f4)", inline="always")
def _log(x: np.float32) -> np.float32:
    """The natural logarithm of a positive number to 3e-7 of it, in a form that a loop does several of at a time."""
    # x = 2^e (1 + f) with f from -1/3 to 1/3, where the series of log(1 + f) is fitted from the third term on.
    bits = np.int32(_bits(x))
    exponent = (bits - np.int32(0x3F2AAAAB)) >> np.int32(23)
    f = _float(np.uint32(bits - (exponent << np.int32(23)))) - np.float32(1)
    rest = np.float32(0.16992516) - f * np.float32(0.1492299)
    rest = np.float32(-0.16505291) + f * rest
    rest = np.float32(0.19817737) + f * rest
    rest = np.float32(-0.25002968) + f * rest
    rest = np.float32(0.33336759) + f * rest
    return f + f * f * (f * rest - np.float32(0.5)) + np.float32(exponent) * np.float32(0.6931472)


@njit("i8[::1](i8[::1], i8)", cache=True, nogil=True)
def starts(query: Longs, size: int) -> Longs:
    """[size + 1]: where each query's entries begin, and the end; `query` ascends."""
    found = np.zeros(size + 1, np.int64)
    for one in query:
        found[one + 1] += 1
    for one in range(size):
        found[one + 1] += found[one]
    return found


@njit("UniTuple(i8[::1], 2)(i8[::1], i8)", cache=True, nogil=True)
def grouped(query: Longs, size: int) -> tuple[Longs, Longs]:
    """The `starts` of entries in any order, and the positions of the entries query by query."""
    begin = starts(query, size)
    place, order = begin.copy(), np.empty(len(query), np.int64)
    for position in range(len(query)):
        one = query[position]
        order[place[one]] = position
        place[one] += 1
    return begin, order


@njit("i8[::1](i8[::1], i4[::1], i8, i8[::1])", cache=True, nogil=True)
def find(keys: Longs, first: Ints, shift: int, wanted: Longs) -> Longs:
    """Position of each wanted key among the ascending `keys`, -1 where it is none.

    `first` says where the keys with given leading bits (all but `shift`) begin. Keys that are hashes make every such
    run a handful long, so that each is found with two looks at memory; other keys only take longer.
    """
    found = np.full(len(wanted), -1, np.int64)
    sign = np.uint64(1) << np.uint64(63)
    for one in range(len(wanted)):
        _prefetch(first, np.int64((np.uint64(wanted[one]) ^ sign) >> np.uint64(shift)))
    for one in range(len(wanted)):
        _prefetch(keys, np.int64(first[np.int64((np.uint64(wanted[one]) ^ sign) >> np.uint64(shift))]))
    for one in range(len(wanted)):
        run = np.int64((np.uint64(wanted[one]) ^ sign) >> np.uint64(shift))
        low, high = np.int64(first[run]), np.int64(first[run + 1])
        while low < high:
            middle = (low + high) >> 1
            if keys[middle] < wanted[one]:
                low = middle + 1
            else:
                high = middle
        if low < first[run + 1] and keys[low] == wanted[one]:
            found[one] = low
    return found


@njit("Tuple((u1[::1], i8[::1]))(u1[::1], i8[::1], i8[::1])", cache=True, nogil=True)
def strings(data: Bytes, ends: Longs, row: Longs) -> tuple[Bytes, Longs]:
    """The bytes of the strings of `row` one after the other, and where each ends."""
    for one in row:
        _prefetch(ends, one)
        _prefetch(ends, max(one - 1, 0))
    found_ends = np.empty(len(row), np.int64)
    total = 0
    for one in range(len(row)):
        begin = ends[row[one] - 1] if row[one] else 0
        _prefetch(data, begin)
        total += ends[row[one]] - begin
        found_ends[one] = total
    found = np.empty(total, np.uint8)
    place = 0
    for one in row:
        for position in range(ends[one - 1] if one else 0, ends[one]):
            found[place] = data[position]
            place += 1
    return found, found_ends


@njit("i8(u8[::1], i8, i8, i4[::1])", cache=True, nogil=True)
def _select(keys: Keys, count: int, wanted: int, histogram: Ints) -> int:
    """Moves the `wanted` smallest of the first `count` keys, and some more, to the front; returns how many."""
    if count <= wanted:
        return count
    low, high = BUCKETS, 0
    for i in range(count):
        bucket = np.int64(keys[i] >> np.uint64(52))
        histogram[bucket] += 1
        low, high = min(low, bucket), max(high, bucket)
    total, last = 0, low
    while total < wanted:
        total += histogram[last]
        last += 1
    histogram[low : high + 1] = 0
    kept = 0
    for i in range(count):
        keys[kept] = keys[i]
        kept += np.int64(keys[i] >> np.uint64(52)) < last
    return kept


@njit("u8[::1](u8[::1], i8, i8, i4[::1])", cache=True, nogil=True)
def _best(keys: Keys, count: int, wanted: int, histogram: Ints) -> Keys:
    """The `wanted` smallest of the first `count` distinct keys, ascending; leaves the keys in another order."""
    count = _select(keys, count, wanted, histogram)
    if count > COUNTED:
        return np.sort(keys[:count])[:wanted]
    # By counting how many are smaller: work that grows with the square, but no branch and eight at a time;
    # several times as fast as any sort of the two hundred that are usually at hand.
    ascending = np.empty(count, np.uint64)
    for i in range(count):
        key, smaller = keys[i], 0
        for j in range(count):
            smaller += keys[j] < key
        ascending[smaller] = key
    return ascending[:wanted]


@njit(
    "i8(i8, i8[::1], i8[::1], f4[::1], i8[::1], i8[::1], i8[::1], f4[::1], f4, f4, i8, b1, f4[::1], i8[::1], f4[::1])",
    cache=True,
    nogil=True,
)
def _anchors(
    query: int,
    begin: Longs,
    row: Longs,
    age_days: Floats,
    kind: Longs,
    page_begin: Longs,
    page_row: Longs,
    by_kind: Floats,
    decay: np.float32,
    step: np.float32,
    limit: int,
    context: bool,
    total: Floats,
    anchor: Longs,
    weight: Floats,
) -> int:
    """Puts the distinct items that count for a query into `anchor` and what they weigh into `weight`; returns how many.

    See `neighbours` for the rest. `total` [n] is all zero, before and after.
    """
    count = 0
    if context and page_begin[query + 1] > page_begin[query]:
        for event in range(page_begin[query], page_begin[query + 1]):
            anchor[count] = page_row[event]
            count += total[page_row[event]] == 0
            total[page_row[event]] += np.float32(1)
    else:
        for event in range(max(begin[query], begin[query + 1] - limit), begin[query + 1]):
            strength = by_kind[kind[event]]
            if strength > 0:
                # Viewed, put in the cart, bought: one item to look up, not three.
                anchor[count] = row[event]
                count += total[row[event]] == 0
                later = np.float32(begin[query + 1] - 1 - event)
                total[row[event]] += strength * np.exp(age_days[event] * decay + later * step)
    for one in range(count):
        weight[one] = total[anchor[one]]
        total[anchor[one]] = 0
    return count


@njit("i8(i8[::1], i8[::1], i8)", cache=True, nogil=True)
def _longest(begin: Longs, page_begin: Longs, limit: int) -> int:
    """The most anchors that a query can have."""
    longest = 0
    for query in range(len(begin) - 1):
        longest = max(longest, min(limit, begin[query + 1] - begin[query]), page_begin[query + 1] - page_begin[query])
    return longest


@njit(
    "Tuple((i8[::1], i8[::1], f4[::1], i8[::1]))"
    "(i4[:, ::1], u2[:, ::1], i8[::1], i8[::1], f4[::1], i8[::1], i8[::1], i8[::1], f4[::1], f4, f4, i8, b1, i8,"
    " f4[::1])",
    cache=True,
    nogil=True,
)
def neighbours(
    rows: Ints,
    weights: Halves,
    begin: Longs,
    row: Longs,
    age_days: Floats,
    kind: Longs,
    page_begin: Longs,
    page_row: Longs,
    by_kind: Floats,
    decay: np.float32,
    step: np.float32,
    limit: int,
    context: bool,
    depth: int,
    total: Floats,
) -> tuple[Longs, Longs, Floats, Longs]:
    """The `depth` best neighbours of every query's anchors: query, row, score and rank, flat.

    `rows` and `weights` [n, K] are the table, `begin` [B + 1] with `row`, `age_days` and `kind` [E] the users'
    events, `page_begin` and `page_row` the items on the page, which with `context` take the events' place.
    `total` has a cell for every row of the table and for every row that it names, all zero, before and after.
    """
    size, width = len(begin) - 1, rows.shape[1]
    table, shares = rows.reshape(-1), weights.reshape(-1)
    of_query, of_row = np.empty(size * depth, np.int64), np.empty(size * depth, np.int64)
    of_score, of_rank = np.empty(size * depth, np.float32), np.empty(size * depth, np.int64)
    histogram = np.zeros(BUCKETS, np.int32)
    longest = _longest(begin, page_begin, limit)
    anchor, weight = np.empty(longest + 1, np.int64), np.empty(longest + 1, np.float32)
    touched, keys = np.empty(longest * width + 1, np.int64), np.empty(longest * width + 1, np.uint64)
    count = 0
    for query in range(size):
        # Sums are kept in `total`; an item is noted when it finds zero there, without a branch that could not be
        # foretold. One whose sum comes back to zero on the way is noted twice and then read as zero once.
        anchors = _anchors(
            query,
            begin,
            row,
            age_days,
            kind,
            page_begin,
            page_row,
            by_kind,
            decay,
            step,
            limit,
            context,
            total,
            anchor,
            weight,
        )
        for one in range(anchors):
            at = anchor[one] * width
            for line in range(at, at + width, 16):
                _prefetch(table, line)
            for line in range(at, at + width, 32):
                _prefetch(shares, line)
            # A file's tables begin anywhere, and so a row may end in a line of its own.
            _prefetch(table, at + width - 1)
            _prefetch(shares, at + width - 1)
        pairs = 0
        for one in range(anchors):
            # Locals, or the compiler reads them again for every neighbour: it cannot know that what is written
            # lies elsewhere.
            at, said = anchor[one] * width, weight[one]
            for pair in range(at, at + width):
                item = table[pair]
                if item < 0:
                    break
                before = total[item]
                touched[pairs] = item
                pairs += before == 0
                total[item] = before + _single(shares[pair]) * said
        found = 0
        for one in range(pairs):
            item = touched[one]
            score = total[item]
            keys[found] = (np.uint64(_descending(score)) << np.uint64(32)) | np.uint64(item)
            found += score != 0
            total[item] = 0
        best = _best(keys, found, depth, histogram)
        for rank in range(len(best)):
            key = best[rank]
            of_query[count], of_row[count], of_rank[count] = query, np.int64(key & np.uint64(0xFFFFFFFF)), rank
            of_score[count] = _score(np.uint32(key >> np.uint64(32)))
            count += 1
    return of_query[:count], of_row[:count], of_score[:count], of_rank[:count]


@njit(
    "Tuple((i8[::1], i8[::1], f4[:, ::1], f4[:, ::1], f4[:, ::1]))"
    "(i8[::1], i8[::1], f4[::1], i8[::1], i8[::1], i8[::1], i8, b1[::1],"
    " i8[::1], i8[::1], b1[:, ::1], i8[::1], i4[::1])",
    cache=True,
    nogil=True,
)
def merge(
    query: Longs,
    row: Longs,
    score: Floats,
    rank: Longs,
    source: Longs,
    ks: Longs,
    size: int,
    available: Flags,
    excluded_query: Longs,
    excluded_row: Longs,
    eligible: Flags,
    eligible_of: Longs,
    index: Ints,
) -> tuple[Longs, Longs, Floats, Floats, Floats]:
    """`Candidates` of the [E] items that sources say something of, in any order: query, row, score, rank, best.

    `eligible` [W, n] are the filters that requests ask for, `eligible_of` [B] which of them a query has, or -1.
    `index` [n] is all -1, before and after.
    """
    free, forbidden, seen = np.int32(-1), np.int32(-2), np.int32(-3)
    sources = len(ks)
    begin, order = grouped(query, size)
    excluded_begin, excluded_order = grouped(excluded_query, size)
    of_query, of_row = np.empty(len(query), np.int64), np.empty(len(query), np.int64)
    place, union = np.empty(len(query), np.int64), np.empty(len(query) + 1, np.int64)
    best = np.zeros((sources, size), np.float32)
    count = 0
    for one in range(size):
        for position in range(excluded_begin[one], excluded_begin[one + 1]):
            index[excluded_row[excluded_order[position]]] = forbidden
        width = 0
        for position in range(begin[one], begin[one + 1]):
            entry = order[position]
            if rank[entry] == 0:
                best[source[entry], one] = score[entry]
            item = row[entry]
            new = (rank[entry] < ks[source[entry]]) & (index[item] == free)
            union[width] = item
            index[item] = seen if new else index[item]
            width += new
        for candidate in range(width):
            item = union[candidate]
            kept = available[item]
            if eligible_of[one] >= 0:
                kept &= eligible[eligible_of[one], item]
            of_query[count], of_row[count] = one, item
            index[item] = count if kept else free
            count += kept
        for position in range(begin[one], begin[one + 1]):
            place[order[position]] = index[row[order[position]]]
        for candidate in range(width):
            index[union[candidate]] = free
        for position in range(excluded_begin[one], excluded_begin[one + 1]):
            index[excluded_row[excluded_order[position]]] = free
    scores = np.zeros((sources, count), np.float32)
    ranks = np.full((sources, count), ABSENT, np.float32)
    for entry in range(len(query)):
        if place[entry] >= 0:
            scores[source[entry], place[entry]] = score[entry]
            if rank[entry] < ks[source[entry]]:
                ranks[source[entry], place[entry]] = rank[entry]
    return of_query[:count].copy(), of_row[:count].copy(), scores, ranks, best


@njit("void(i2[::1], i2[::1], i8)", cache=True, nogil=True)
def _highest(score: Shorts, found: Shorts, block: int) -> None:
    """Into `found` [m] the greatest of score[i], score[i + m], ..., `block` of them, or 0 where all are lower."""
    found[:] = 0
    columns = len(found)
    for place in range(block):
        line = score[place * columns : (place + 1) * columns]
        for column in range(columns):
            found[column] = max(found[column], line[column])


@njit("i8(i2[:, ::1], i8, i8, i4[::1])", cache=True, nogil=True)
def _bound(highest: Shorts, one: int, wanted: int, histogram: Ints) -> int:
    """The `wanted`-th greatest of a column, or what all are above where there are not so many above 0.

    `histogram` is all zero, before and after.
    """
    bound = 0
    for block in range(len(highest)):
        histogram[highest[block, one]] += 1
        bound = max(bound, np.int64(highest[block, one]))
    total = histogram[bound]
    while total < wanted and bound > 0:
        bound -= 1
        total += histogram[bound]
    for block in range(len(highest)):
        histogram[highest[block, one]] = 0
    return bound if bound > 0 else LOWEST


@njit("i8[::1](i2[:, ::1], i8, i4[:, ::1])", cache=True, nogil=True)
def _near(score: Shorts, wanted: int, rows: Ints) -> Longs:
    """Fills each of `rows` [B, n + 1] with where the column of the bfloat16 scores [n, B] is as high as the best of
    `wanted` blocks; returns how many these are.
    """
    items, size = score.shape
    # The more are wanted, the fewer may share a block: where most blocks hold one of the best, none is passed over.
    length = BLOCK
    while length > 1 and items < 4 * wanted * length:
        length //= 2
    blocks = items // length
    highest = np.empty((blocks, size), np.int16)
    # The bits of positive numbers ascend with them, and so does what they are as integers.
    _highest(score.reshape(-1), highest.reshape(-1), length)
    histogram, bounds = np.zeros(HALVES, np.int32), np.empty(size, np.int16)
    for one in range(size):
        bounds[one] = _bound(highest, one, wanted, histogram)
    # Block by block, for all queries: what one reads of a block lies beside what the others do. Which they are is
    # noted first, without a branch that could not be foretold.
    count, within = np.zeros(size, np.int64), np.empty(size + 1, np.int64)
    for block in range(blocks):
        queries = 0
        for one in range(size):
            within[queries] = one
            queries += highest[block, one] >= bounds[one]
        for one in within[:queries]:
            bound, place = bounds[one], count[one]
            for row in range(block, blocks * length, blocks):
                rows[one, place] = row
                place += score[row, one] >= bound
            count[one] = place
    for row in range(blocks * length, items):
        for one in range(size):
            rows[one, count[one]] = row
            count[one] += score[row, one] >= bounds[one]
    return count


@njit(
    "Tuple((i8[:, ::1], f4[:, ::1]))(u2[:, ::1], f4[:, ::1], u2[:, ::1], i8)",
    cache=True,
    nogil=True,
    fastmath=REORDERED,
)
def nearest(rough: Halves, users: Floats, vectors: Halves, k: int) -> tuple[Longs, Floats]:
    """The rows [B, k] of the `vectors` [n, d] with the greatest dot products with each of `users` [B, d], and these.

    Rows of -1 for a user of zeros, to whom nothing is near. `rough` [n, B] are the products in bfloat16. The best of
    each block of them are compared first; most blocks are then passed over, and exact is the product of what is as
    high as the best of `k` blocks, an eighth of that and `SPARE` more: rounding moves a score by far less than what
    lies between these ranks. k <= n.
    """
    items, size = rough.shape
    width = vectors.shape[1]
    found, best = np.empty((size, k), np.int64), np.empty((size, k), np.float32)
    histogram, keys = np.zeros(BUCKETS, np.int32), np.empty(items, np.uint64)
    rows = np.empty((size, items + 1), np.int32)
    count = _near(rough.view(np.int16), k + k // 8 + SPARE, rows)
    for one in range(size):
        if not users[one].any():
            found[one], best[one] = -1, 0
            continue
        for place in range(count[one]):
            if place + AHEAD < count[one]:
                at = np.int64(rows[one, place + AHEAD]) * width
                for line in range(at, at + width, 32):
                    _prefetch(vectors, line)
                _prefetch(vectors, at + width - 1)
            row = np.int64(rows[one, place])
            total = np.float32(0)
            for column in range(width):
                total += users[one, column] * _single(vectors[row, column])
            keys[place] = (np.uint64(_descending(total)) << np.uint64(32)) | np.uint64(row)
        ascending = _best(keys, count[one], k, histogram)
        for rank in range(k):
            found[one, rank] = np.int64(ascending[rank] & np.uint64(0xFFFFFFFF))
            best[one, rank] = _score(np.uint32(ascending[rank] >> np.uint64(32)))
    return found, best


@njit("void(f4[:, ::1], u2[:, ::1], i8[::1], i8[::1], f4[::1])", cache=True, nogil=True, fastmath=True)
def dots(users: Floats, vectors: Halves, query: Longs, row: Longs, score: Floats) -> None:
    """Into `score` [M] the dot product of each pair's user [B, d] and item vector [n, d]."""
    width = vectors.shape[1]
    for one in range(len(query)):
        if one + AHEAD < len(query):
            at = row[one + AHEAD] * width
            for line in range(at, at + width, 32):
                _prefetch(vectors, line)
            _prefetch(vectors, at + width - 1)
        total = np.float32(0)
        for column in range(width):
            total += users[query[one], column] * _single(vectors[row[one], column])
        score[one] = total


@njit(
    "f4[:, ::1](i8[::1], i8[::1], f4[:, ::1], f4[:, ::1], f4[:, ::1],"
    " f4[:, ::1], i8[::1], i8,"
    " f8, i8[::1], i8[::1], i8[::1], f4[::1], f4[::1], f4[::1], i8[::1], f4, i8, i4[::1])",
    cache=True,
    nogil=True,
    error_model="numpy",
)
def features(
    query: Longs,
    row: Longs,
    score: Floats,
    rank: Floats,
    best: Floats,
    records: Floats,
    no_group: Longs,
    group_count: int,
    now_days: float,
    begin: Longs,
    event_row: Longs,
    kind: Longs,
    age_days: Floats,
    quantity: Floats,
    interest_of: Floats,
    own_of: Longs,
    decay: np.float32,
    purchase: int,
    index: Ints,
) -> Floats:
    """What `features.compute` describes, float32 [M, F]. `index` [n] is all -1, before and after."""
    width = records.shape[1]
    sources, size, kinds = len(score), len(begin) - 1, width - 2 - GROUPS
    item, user = 3 * sources + 1, 3 * sources + 3 + kinds
    own, cross = user + 5, user + 12
    found = np.empty((len(query), cross + 5), np.float32)
    candidates = starts(query, size)
    longest = 0
    for one in range(size):
        longest = max(longest, begin[one + 1] - begin[one])
    counts, recency = np.empty((longest, OWN + 1), np.float32), np.empty((longest, OWN + 1), np.float32)
    bought = np.empty(longest, np.float32)
    sizes, shares = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    places, agreement = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    in_group = np.zeros(group_count, np.float32)
    never = _log(np.float32(1) + MINUTES * NEVER_DAYS)
    for one in range(size):
        events = begin[one + 1] - begin[one]
        purchases, weight, priced, prices = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        latest, items = NEVER_DAYS, 0
        for event in range(begin[one], begin[one + 1]):
            of = event_row[event]
            price = records[of, kinds]
            interest = interest_of[kind[event]] * np.exp(age_days[event] * decay)
            weight += interest
            if price > 0:
                priced += interest
                prices += interest * price
            latest = min(latest, age_days[event])
            for group in range(GROUPS):
                in_group[np.int64(records[of, kinds + 2 + group])] += interest
            if index[of] < 0:
                index[of] = items
                counts[items], recency[items], bought[items] = 0, NEVER_DAYS, 0
                items += 1
            mine, part = index[of], own_of[kind[event]]
            counts[mine, part] += 1
            recency[mine, part] = min(recency[mine, part], age_days[event])
            if kind[event] == purchase:
                purchases += np.float32(1)
            if part == OWN - 1:
                bought[mine] += quantity[event]
        for group in range(GROUPS):
            in_group[no_group[group]] = 0
        mean_price = prices / max(priced, np.float32(1e-9))
        shared = max(weight, np.float32(1e-9))
        of_user = (
            _log(np.float32(1 + events)),
            _log(np.float32(1) + purchases),
            _log(np.float32(1) + weight),
            _log(np.float32(1) + MINUTES * latest),
            mean_price,
        )
        # Some candidates at a time, whose features stay in the first-level cache until all are there.
        for first in range(candidates[one], candidates[one + 1], TILE):
            count = min(TILE, candidates[one + 1] - first)
            found[first : first + count] = 0
            agreement[:] = 0
            for source in range(sources):
                # No branch, and what is found is put in its place by a loop of its own: several at a time.
                top = max(best[source, one], np.float32(1e-9))
                for at in range(count):
                    value, place = score[source, first + at], rank[source, first + at]
                    size_of = _log(np.float32(1) + np.float32(100) * abs(value))
                    sizes[at] = size_of if value > 0 else -size_of
                    shares[at] = max(np.float32(-1), min(np.float32(1), value / top))
                    places[at] = np.float32(10) / (np.float32(10) + place)
                    agreement[at] += np.float32(1) if place < ABSENT else np.float32(0)
                for at in range(count):
                    out = found[first + at]
                    out[3 * source], out[3 * source + 1], out[3 * source + 2] = sizes[at], shares[at], places[at]
            for candidate in range(first, first + count):
                of = row[candidate]
                if candidate + AHEAD < len(row):
                    at = row[candidate + AHEAD] * width
                    for line in range(at, at + width, 16):
                        _prefetch(records, line)
                    _prefetch(records, at + width - 1)
                out = found[candidate]
                out[item - 1] = agreement[candidate - first]
                for column in range(kinds):
                    out[item + column] = records[of, column]
                price = records[of, kinds]
                age = max(np.float32(now_days) - records[of, kinds + 1], np.float32(0))
                out[item + kinds] = _log(np.float32(1) + age)
                out[item + kinds + 1] = price
                for column in range(5):
                    out[user + column] = of_user[column]
                mine = index[of]
                if mine >= 0:
                    for part in range(OWN):
                        out[own + 2 * part] = _log(np.float32(1) + counts[mine, part])
                        out[own + 2 * part + 1] = _log(np.float32(1) + MINUTES * recency[mine, part])
                    out[own + 2 * OWN] = _log(np.float32(1) + bought[mine])
                else:
                    for part in range(OWN):
                        out[own + 2 * part + 1] = never
                for group in range(GROUPS):
                    out[cross + group] = in_group[np.int64(records[of, kinds + 2 + group])] / shared
                if price > 0 and mean_price > 0:
                    out[cross + GROUPS] = abs(price - mean_price)
                    out[cross + GROUPS + 1] = min(np.float32(0), price - mean_price)
        for event in range(begin[one], begin[one + 1]):
            index[event_row[event]] = -1
            for group in range(GROUPS):
                in_group[np.int64(records[event_row[event], kinds + 2 + group])] = 0
    return found


@njit("u2[:, ::1](f4[:, ::1], f4[::1], f4[::1], f4[::1], i8)", cache=True, nogil=True)
def standardised(features: Floats, mean: Floats, scale: Floats, clip: Floats, rows: int) -> Halves:
    """The bits of bfloat16 [rows, F]: (features [M, F] - mean) * scale, cut to -clip..clip, then rows of zeros."""
    found = np.zeros((rows, features.shape[1]), np.uint16)
    for one in range(len(features)):
        for column in range(features.shape[1]):
            value = (features[one, column] - mean[column]) * scale[column]
            value = max(-clip[column], min(clip[column], value))
            bits = _bits(value)
            # To the nearest, ties to even, as torch rounds.
            found[one, column] = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return found


@njit(
    "Tuple((f4[:, :, ::1], i8[:, ::1], f4[:, ::1]))"
    "(u2[:, ::1], i8[::1], i8[::1], i8[::1], f4[::1], i8[::1], i8[::1], i8, b1, i8)",
    cache=True,
    nogil=True,
)
def history(
    vectors: Halves,
    begin: Longs,
    row: Longs,
    kind: Longs,
    age_days: Floats,
    page_begin: Longs,
    page_row: Longs,
    page_kind: int,
    context: bool,
    length: int,
) -> tuple[Floats, Longs, Floats]:
    """What an encoder reads: vectors [B, L, c], kinds [B, L] and ages in seconds [B, L], the latest event last.

    What is on the page follows the user's events as an event of now; with `context` it takes their place.
    """
    size, width = len(begin) - 1, vectors.shape[1]
    found = np.zeros((size, length, width), np.float32)
    kinds, ages_s = np.zeros((size, length), np.int64), np.zeros((size, length), np.float32)
    for query in range(size):
        place = length
        for item in range(page_begin[query + 1] - 1, page_begin[query] - 1, -1):
            if place == 0:
                break
            place -= 1
            kinds[query, place] = page_kind
            # A local, or the compiler reads it again for every column: it may lie where it writes.
            own = page_row[item]
            for column in range(width):
                found[query, place, column] = _single(vectors[own, column])
        if context and place < length:
            continue
        first = max(begin[query], begin[query + 1] - place)
        for event in range(first, begin[query + 1]):
            at = row[event] * width
            for line in range(at, at + width, 32):
                _prefetch(vectors, line)
            _prefetch(vectors, at + width - 1)
        for event in range(begin[query + 1] - 1, first - 1, -1):
            place -= 1
            kinds[query, place], ages_s[query, place] = kind[event], age_days[event] * np.float32(86_400)
            own = row[event]
            for column in range(width):
                found[query, place, column] = _single(vectors[own, column])
    return found, kinds, ages_s


@njit(
    "f4[:, ::1](u2[:, ::1], i8[::1], i8[::1], f4[::1], i8[::1], i8[::1], i8[::1], f4[::1], f4, f4, i8, b1, f4[::1])",
    cache=True,
    nogil=True,
)
def pooled(
    vectors: Halves,
    begin: Longs,
    row: Longs,
    age_days: Floats,
    kind: Longs,
    page_begin: Longs,
    page_row: Longs,
    by_kind: Floats,
    decay: np.float32,
    step: np.float32,
    limit: int,
    context: bool,
    total: Floats,
) -> Floats:
    """[B, c]: the weighted sum of the `vectors` of every query's anchors, as a unit vector, or 0; see `neighbours`."""
    size, width = len(begin) - 1, vectors.shape[1]
    found = np.zeros((size, width), np.float32)
    longest = _longest(begin, page_begin, limit)
    anchor, weight = np.empty(longest + 1, np.int64), np.empty(longest + 1, np.float32)
    for query in range(size):
        anchors = _anchors(
            query,
            begin,
            row,
            age_days,
            kind,
            page_begin,
            page_row,
            by_kind,
            decay,
            step,
            limit,
            context,
            total,
            anchor,
            weight,
        )
        for one in range(anchors):
            if one + AHEAD < anchors:
                at = anchor[one + AHEAD] * width
                for line in range(at, at + width, 32):
                    _prefetch(vectors, line)
            own, said = anchor[one], weight[one]
            for column in range(width):
                found[query, column] += _single(vectors[own, column]) * said
        squared = np.float32(0)
        for column in range(width):
            squared += found[query, column] * found[query, column]
        if squared > 0:
            scale = np.float32(1) / np.sqrt(squared)
            for column in range(width):
                found[query, column] *= scale
    return found


@njit("Tuple((i8[:, ::1], f4[:, ::1]))(i8[::1], f4[::1], i8, i8)", cache=True, nogil=True)
def best_first(query: Longs, score: Floats, size: int, k: int) -> tuple[Longs, Floats]:
    """Positions [B, <=k] of each query's best, -1 where there is none, and their scores; `query` ascends."""
    begin = starts(query, size)
    widest = 0
    for one in range(size):
        widest = max(widest, begin[one + 1] - begin[one])
    width = min(k, widest)
    positions, scores = np.full((size, width), -1, np.int64), np.full((size, width), -np.inf, np.float32)
    histogram, keys = np.zeros(BUCKETS, np.int32), np.empty(widest, np.uint64)
    for one in range(size):
        for position in range(begin[one], begin[one + 1]):
            descending = np.uint64(_descending(score[position])) << np.uint64(32)
            keys[position - begin[one]] = descending | np.uint64(position - begin[one])
        best = _best(keys, begin[one + 1] - begin[one], width, histogram)
        for place in range(len(best)):
            position = begin[one] + np.int64(best[place] & np.uint64(0xFFFFFFFF))
            positions[one, place], scores[one, place] = position, score[position]
    return positions, scores


@intrinsic
def _first_bit(typing: Any, bits: Any) -> Any:
    """The position of the lowest bit that is set, 32 where none is."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.uint32(types.uint32), generate


@njit("f4[::1](f4[:, ::1], i4[:, ::1], f4[:, ::1], u4[:, ::1], f4[:, ::1])", cache=True, nogil=True)
def forest(features: Floats, feature: Ints, threshold: Floats, kept: Words, value: Floats) -> Floats:
    """[M]: the sum over trees of the value of the leaf that each row [M, F] ends in; NaN counts as 0.

    No tree is walked. All conditions of a tree are tested, and one that fails (x > threshold) strikes out the leaves to
    its left, all but those in `kept`; of the leaves that remain the first is the right one (QuickScorer: Lucchese et
    al., SIGIR 2015). Without jumps, many rows go through a condition at a time.
    """
    rows, columns = features.shape
    trees, nodes = feature.shape
    found = np.zeros(rows, np.float32)
    block = np.empty((columns, LANES), np.float32)
    left = np.empty(LANES, np.uint32)
    total = np.empty(LANES, np.float64)
    for begin in range(0, rows, LANES):
        size = min(LANES, rows - begin)
        for row in range(size):
            for column in range(columns):
                x = features[begin + row, column]
                block[column, row] = x if x == x else np.float32(0)
        for row in range(size, LANES):
            for column in range(columns):
                block[column, row] = np.float32(0)
        total[:] = 0
        for tree in range(trees):
            left[:] = np.uint32(0xFFFFFFFF)
            for node in range(nodes):
                x, limit, keep = block[feature[tree, node]], threshold[tree, node], kept[tree, node]
                for row in range(LANES):
                    left[row] &= keep if x[row] > limit else np.uint32(0xFFFFFFFF)
            of_leaf = value[tree]
            for row in range(LANES):
                total[row] += of_leaf[np.uint64(_first_bit(left[row]))]
        for row in range(size):
            found[begin + row] = total[row]
    return found
