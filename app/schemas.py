"""The HTTP contract: what comes in and what goes out."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from app.parameters import Parameters

ID_MAX_BYTES = 256


def _fits(text: str) -> str:
    # A character has at most four bytes: most ids need no encoding to be known to fit.
    if len(text) * 4 > ID_MAX_BYTES and len(text.encode()) > ID_MAX_BYTES:
        raise PydanticCustomError("id_too_long", "Id should have at most {limit} bytes", {"limit": ID_MAX_BYTES})
    return text


Id = Annotated[str, Field(min_length=1, max_length=ID_MAX_BYTES), AfterValidator(_fits)]
"""The shop's own id of a user, session or item: any text of 1..256 bytes in UTF-8."""
Name = Annotated[str, Field(min_length=1, max_length=64)]
Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=-1e15, le=1e15, allow_inf_nan=False)]
"""Money or a rating; states keep it in 32 bits."""


class RecommendParameters(Parameters):
    user_id: Id | None = Field(default=None, description="The shopper; one never seen before is welcome.")
    session_id: Id | None = Field(default=None, description="The session, with or without a user.")
    scene: Name = Field(default="home", description="The page or slot to fill.")
    limit: int = Field(default=20, ge=1, le=200, description="How many items at most.")
    item_id: tuple[Id, ...] = Field(
        default=(), max_length=200, description="Items on the page: the product shown, the lines of the cart."
    )
    category: tuple[Id, ...] = Field(default=(), max_length=100, description="Only items of these categories.")
    brand: tuple[Id, ...] = Field(default=(), max_length=100, description="Only items of these brands.")
    price_min: Price | None = Field(default=None, description="Only items that cost at least this.")
    price_max: Price | None = Field(
        default=None, description="Only items that cost at most this; not below `price_min`."
    )
    in_stock: bool = Field(default=False, description="Only items in stock.")
    exclude: tuple[Id, ...] = Field(default=(), max_length=1000, description="Items not to return.")
    fields: tuple[Name, ...] = Field(
        default=(),
        max_length=50,
        description="Attributes to return with each item; commas separate several in one value.",
    )
    explain: bool = Field(default=False, description="Whether to say why each item is there.")

    @field_validator("price_max")
    @classmethod
    def _not_below_price_min(cls, price_max: float | None, earlier: ValidationInfo) -> float | None:
        price_min = earlier.data.get("price_min")
        if price_max is not None and price_min is not None and price_max < price_min:
            raise PydanticCustomError("price_range", "Input should not be below price_min")
        return price_max

    @field_validator("fields", mode="before")
    @classmethod
    def _split_at_commas(cls, fields: Sequence[str]) -> list[str]:
        return [name for field in fields for name in field.split(",")]


class UserAttributes(BaseModel):
    """What the shop knows of a user, for models that learned from it; a name they do not know changes nothing."""

    model_config = ConfigDict(extra="forbid")

    attributes: Annotated[dict[Name, Annotated[str, Field(max_length=256)]], Field(max_length=100)] = Field(
        examples=[{"country": "France", "age": "25-34"}]
    )


class RecommendedItem(BaseModel):
    item_id: str
    score: float = Field(
        description="The probability that the item is wanted, where the ranker is calibrated; else comparable inside"
        " one answer only."
    )
    position: int = Field(ge=1, description="1 is the first.")
    sources: list[str] = Field(description="What proposed the item.")
    reason: str | None = Field(default=None, description="Why it is there; only with `explain`.")
    attributes: dict[str, Any] | None = Field(default=None, description="What `fields` asked for.")


class Recommendation(BaseModel):
    """The list for one shopper, best first. Send its `request_id` with the events that it causes."""

    request_id: str
    scene: str
    items: list[RecommendedItem]
    bundle: str = Field(description="Version of the models that every item and score came from.")
    variant: str | None = Field(description="The arm of a running experiment.")
    degraded: list[str] = Field(description="Stages left out because they were late or broken.")
    took_ms: float


class EventLine(BaseModel):
    model_config = ConfigDict(coerce_numbers_to_str=True)

    item_id: Id
    quantity: int = Field(default=1, ge=0, le=2**31 - 1)
    price: Amount | None = Field(default=None, description="Of one unit.")


class Event(BaseModel):
    """One thing a shopper did, or that was shown to them."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    type: Name = Field(
        description="GA4's name or a common alias; any other type is counted and logged, and trains nothing.",
        examples=["view_item"],
    )
    event_id: Id | None = Field(
        default=None, description="Unique to the event: a second one with the same id counts as a duplicate."
    )
    user_id: Id | None = Field(default=None, description="Who did it. This or `session_id` is required.")
    session_id: Id | None = Field(default=None, description="Where a visitor without `user_id` is remembered.")
    item_id: Id | None = Field(default=None, description="What it was done to, unless `items` says so.")
    items: list[EventLine] | None = Field(default=None, max_length=1000)
    timestamp: AwareDatetime | None = Field(
        default=None,
        description="RFC 3339 with offset, or a number since 1970: of seconds up to 20,000,000,000, of milliseconds "
        "above. Not before 1990, not 5 minutes from now. Default: now.",
    )
    value: Amount | None = Field(default=None, description="The rating of a `rate`; the price or total of others.")
    currency: str | None = Field(default=None, max_length=16)
    request_id: Id | None = Field(default=None, description="Of the answer that led to the event.")
    position: int | None = Field(default=None, ge=0, le=2**31 - 1, description="Of the item in that answer.")
    scene: Name | None = None
    query: str | None = Field(default=None, max_length=1024, description="What was typed into the search box.")
    context: dict[str, Any] | None = Field(default=None, description="Anything else; logged as it is.")


class RejectedEvent(BaseModel):
    index: int = Field(description="Of the event in the call, from 0.")
    field: str
    error: str


class EventsAnswer(BaseModel):
    """What became of the events of one call. Those accepted are safe; a rejected one would be rejected again."""

    accepted: int
    duplicates: int = Field(description="Known from before by their id or, without one, by their content.")
    rejected: list[RejectedEvent]
    spooled: int = Field(description="How many of the accepted wait on local disk until the store is back.")
