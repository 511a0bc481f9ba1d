"""Everything an operator can set, by environment variables that begin with `MILLIREC_`."""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, StringConstraints
from pydantic_settings import BaseSettings, SettingsConfigDict


class Scope(StrEnum):
    """What an API key may do."""

    RECOMMEND = "recommend"
    EVENTS = "events"
    CATALOG = "catalog"
    USERS = "users"
    ADMIN = "admin"
    METRICS = "metrics"


AbsolutePath = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]
ApiKey = Annotated[str, StringConstraints(min_length=16, max_length=256, pattern=r"^[!-~]+$")]
ApiKeys = Annotated[Mapping[ApiKey, frozenset[Scope]], AfterValidator(lambda keys: MappingProxyType(dict(keys)))]


class Settings(BaseSettings):
    """Built once, passed as a value. Raises pydantic's `ValidationError` for a value that makes no sense."""

    model_config = SettingsConfigDict(env_prefix="MILLIREC_", env_ignore_empty=True, frozen=True)

    home: AbsolutePath = Field(
        default_factory=lambda: Path.home() / ".millirec",
        validate_default=True,
        description="Folder for everything the service keeps on disk.",
    )
    bundles: AbsolutePath = Field(
        default_factory=lambda data: data["home"] / "bundles",
        validate_default=True,
        description="Folder of published bundles. Default: `bundles` under the home folder.",
    )
    redis_url: str | None = Field(
        default=None,
        pattern=r"^(rediss?|unix)://",
        repr=False,
        description="Redis or Valkey with the user states and the event log. Unset: `serve` starts an embedded Valkey.",
    )
    redis_prefix: str = Field(default="millirec:", description="What every Redis key begins with.")
    redis_timeout_ms: int = Field(
        default=50, ge=1, description="How long one Redis call may take before it counts as failed."
    )
    state_window: int = Field(default=256, ge=1, le=4096, description="How many recent events of a user are kept.")
    dedupe_window_s: int = Field(
        default=86_400, ge=1, description="How long an event id is remembered to refuse a repeat."
    )
    spool_path: AbsolutePath = Field(
        default_factory=lambda data: data["home"] / "spool.sqlite",
        validate_default=True,
        description="File for events accepted while Redis is away. Default: `spool.sqlite` under the home folder.",
    )
    spool_max_bytes: int = Field(
        default=1 << 30, ge=1 << 16, description="Size of the spool at which events are refused."
    )
    events_max_bytes: int = Field(default=4 << 20, ge=1 << 10, description="Largest body of one `POST /events`.")
    deadline_ms: int = Field(
        default=200, ge=1, description="Time for one answer; later stages are left out when it is up."
    )
    max_batch: int = Field(default=64, ge=1, description="Most queries computed together.")
    max_waiting: int = Field(default=1024, ge=1, description="Most queries waiting; one more is answered 503.")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="Where the engine computes.")
    threads: int = Field(default=1, ge=1, description="Compute threads of one engine.")
    api_keys: ApiKeys = Field(
        default_factory=dict,
        validate_default=True,
        repr=False,
        description="JSON object from API key to its scopes: " + ", ".join(Scope) + ". Unset: loopback only, no keys.",
    )
    impressions_maxlen: int = Field(
        default=100_000, ge=0, description="How many answered slates the impression log keeps."
    )
    bundle_poll_s: float = Field(default=1.0, gt=0, description="How often a new bundle is looked for.")
