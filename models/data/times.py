"""Time as tables write it, read as UTC epoch milliseconds on any narwhals backend."""

from datetime import UTC, datetime
from typing import Any, TypeAlias

import narwhals as nw

DAY_MS = 86_400_000

Frame: TypeAlias = nw.DataFrame[Any] | nw.LazyFrame[Any]

_ISO = (
    r"^[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
    r"([T ]([01][0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9]([.,][0-9]{1,9})?)?( ?(Z|z|UTC|[+-][0-9]{2}:?[0-9]{2}))?)?$"
)
_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"


def instant_ms(text: str) -> int:
    """An RFC 3339 time or date as epoch milliseconds; without a zone it is UTC. Raises ValueError."""
    when = datetime.fromisoformat(text)
    return round((when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp() * 1000)


def number(column: nw.Expr, dtype: Any) -> nw.Expr:
    """The column as Float64; null where it is no finite number."""
    if dtype == nw.String:
        text = column.str.strip_chars()
        column = nw.when(text.str.contains(_NUMBER)).then(text)
    column = column.cast(nw.Float64)
    return nw.when(column.is_finite()).then(column)


def with_epoch_ms(frame: Frame, column: str) -> Frame:
    """`frame` with the column read as Int64 epoch milliseconds; null where it is no time.

    Understands dates and datetimes (UTC where they have no zone), RFC 3339 text, and numbers in
    seconds, milliseconds, microseconds or nanoseconds, told apart by size: a time between 1973 and
    5138 has only one reading.
    """
    dtype, cell = frame.collect_schema()[column], nw.col(column)
    if dtype == nw.String:
        return _text_ms(frame, column)
    if dtype == nw.Date:
        return frame.with_columns((_days(*_date(cell)) * DAY_MS).alias(column))
    if isinstance(dtype, nw.Datetime):
        if dtype.time_zone not in (None, "UTC"):
            cell = cell.dt.convert_time_zone("UTC")
        clock_s = _int(cell.dt.hour()) * 3600 + _int(cell.dt.minute()) * 60 + _int(cell.dt.second())
        ms = _days(*_date(cell)) * DAY_MS + clock_s * 1000 + _int(cell.dt.microsecond()) // 1000
        return frame.with_columns(ms.alias(column))
    return frame.with_columns(_numeric_ms(number(cell, dtype)).alias(column))


def _int(expression: nw.Expr) -> nw.Expr:
    return expression.cast(nw.Int64)


def _date(cell: nw.Expr) -> tuple[nw.Expr, nw.Expr, nw.Expr]:
    return _int(cell.dt.year()), _int(cell.dt.month()), _int(cell.dt.day())


def _numeric_ms(value: nw.Expr) -> nw.Expr:
    size = value.abs()
    fine = nw.when(size < 1e17).then(value / 1e3).otherwise(value / 1e6)
    coarse = nw.when(size < 1e11).then(value * 1e3).otherwise(value)
    ms = nw.when(size < 1e14).then(coarse).otherwise(fine)
    # Beyond 2**53 a float no longer holds every millisecond, and the cast may overflow.
    return _int(nw.when(ms.abs() < 2.0**53).then(ms).round())


def _days(year: nw.Expr, month: nw.Expr, day: nw.Expr) -> nw.Expr:
    """Days since 1970-01-01 in the Gregorian calendar, counting years from March (H. Hinnant, 2013)."""
    year = nw.when(month <= 2).then(year - 1).otherwise(year)
    leaps = year // 4 - year // 100 + year // 400
    return 365 * year + leaps + (153 * ((month + 9) % 12) + 2) // 5 + day - 719_469


def _text_ms(frame: Frame, column: str) -> Frame:
    """By arithmetic, not by a parser: a backend's parser fails the whole column for one 30th of February.

    In stages, so that no backend computes a part twice.
    """
    text, rest, zoned, zone = nw.col("__text"), nw.col("__rest"), nw.col("__zoned"), nw.col("__zone")
    year, month, day = nw.col("__year"), nw.col("__month"), nw.col("__day")
    stripped, columns = nw.col(column).str.strip_chars(), frame.collect_schema().names()
    frame = frame.with_columns(
        nw.when(stripped.str.contains(_ISO)).then(stripped).alias("__text"),
        _numeric_ms(number(stripped, nw.String)).alias("__number"),
    ).with_columns(
        _int(text.str.slice(0, 4)).alias("__year"),
        _int(text.str.slice(5, 2)).alias("__month"),
        _int(text.str.slice(8, 2)).alias("__day"),
        _part(text, 11).alias("__hour"),
        _part(text, 14).alias("__minute"),
        text.str.slice(16).alias("__rest"),
    )
    seconded = rest.str.starts_with(":")
    decimals = zoned.str.replace_all(r" ?(Z|z|UTC|[+-].*)$", "")
    frame = frame.with_columns(
        _part(nw.when(seconded).then(rest), 1).alias("__second"),
        nw.when(seconded).then(rest.str.slice(3)).otherwise(rest).alias("__zoned"),
    ).with_columns(
        nw.concat_str(nw.lit("0"), decimals.str.replace_all(",", ".", literal=True)).alias("__part"),
        zoned.str.replace_all(r"^[.,][0-9]+|[ :]", "").alias("__zone"),
    )
    leap = ((year % 4 == 0) & (year % 100 != 0)) | (year % 400 == 0)
    february = nw.when(leap).then(nw.lit(29)).otherwise(nw.lit(28))
    longest = nw.when(month.is_in([4, 6, 9, 11])).then(nw.lit(30)).otherwise(nw.lit(31))
    longest = nw.when(month == 2).then(february).otherwise(longest)
    ahead = nw.when(zone.str.contains("^[+-]")).then(zone)
    ahead_min = _part(ahead, 1) * 60 + _part(ahead, 3)
    ahead_min = nw.when(zone.str.starts_with("-")).then(-ahead_min).otherwise(ahead_min)
    clock_s = nw.col("__hour") * 3600 + (nw.col("__minute") - ahead_min) * 60 + nw.col("__second")
    # The small addition keeps .123 from becoming 122 in binary.
    fraction_ms = _int((nw.col("__part").cast(nw.Float64) * 1000 + 1e-6).floor())
    ms = nw.when(day <= longest).then(_days(year, month, day) * DAY_MS + clock_s * 1000 + fraction_ms)
    return frame.with_columns(nw.coalesce(nw.col("__number"), ms).alias(column)).select(columns)


def _part(text: nw.Expr, offset: int) -> nw.Expr:
    """Two digits, or 0 where the text ends before them."""
    part = text.str.slice(offset, 2)
    return _int(nw.when(part != "").then(part)).fill_null(0)
