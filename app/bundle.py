"""The bundle: one immutable trained version in one folder, and the contract between models/ and app/.

A bundle root looks like this; `CURRENT` names the version to serve, `SCENES.json` has what operators changed of its
scenes, and both are replaced atomically:

    bundles/CURRENT
    bundles/SCENES.json
    bundles/20261122T101500-3fa94c1b/manifest.json, catalog.safetensors, ...
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from app.scenes import Scene, SceneChange

FORMAT = 1
MANIFEST = "manifest.json"
CURRENT = "CURRENT"
SCENES = "SCENES.json"


class BundleError(Exception):
    """A bundle that must not be served; the message says why."""


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileSpec(_Spec):
    sha256: str
    size_bytes: int


class Anchors(_Spec):
    """How a user's events become the weighted items that neighbours are looked up for.

    An event weighs `weights[type] * 2 ** (-age / half_life_days - later / half_life_events)`, `later` being how many
    events of the user came after it.
    """

    weights: Mapping[str, float]
    """By event type name, lowercase; a type not named weighs nothing."""
    half_life_days: Annotated[float, Field(gt=0)] = 30.0
    half_life_events: Annotated[float, Field(gt=0)] | None = None
    limit: Annotated[int, Field(ge=1)] = 50
    """Only the last so many events count."""


class VectorSpec(_Spec):
    """User and item vectors, score = dot product. A user's is what `encoder(history, kinds, ages_s, profile) -> [B, d]`
    says, or the sum of the `inputs` of the anchors by their weights, as a unit vector: one of the two is given.

    history [B, L, c] holds `inputs`, or where there are none the vectors, of the last L known items, most recent
    last; kinds [B, L] the event types, 0 for padding; profile [B, P] hashed attributes, 0 for padding.
    """

    kind: Literal["vectors"] = "vectors"
    name: str
    vectors: str
    """safetensors file with `vectors` float16 [n, d]."""
    index: str
    """FAISS file."""
    index_kind: Literal["flat", "ivf", "hnsw"]
    index_recall: float
    """Measured share of the exact top 100 that the index finds."""
    encoder: str | None = None
    """torch.export archive."""
    anchors: Anchors | None = None
    inputs: str | None = None
    """safetensors file with `vectors` float16 [n, c]."""
    history: int = 32
    profile: int = 8


class NeighbourSpec(_Spec):
    """Item -> weighted items; the score of an item is the sum over the user's anchors."""

    kind: Literal["neighbours"] = "neighbours"
    name: str
    table: str
    """safetensors file with `rows` int32 [n, K], best first, -1 for none, and `weights` float16 [n, K]."""
    anchors: Anchors


class BasketSpec(_Spec):
    """Neighbours in two steps: from the user's anchors to the baskets most like them, and on to what is in these.

    likeness(b) = sum of anchor's weight * of_weights[item, b]; score(j) = sum of likeness(b) * weights[b, j] over
    the `likest` baskets, of equals the first.
    """

    kind: Literal["baskets"] = "baskets"
    name: str
    table: str
    """safetensors file with `of_item` int32 and `of_weights` float16 [n, K1], from items to baskets, and `items` int32
    and `weights` float16 [m, K2], from baskets to items; padded with -1."""
    anchors: Anchors
    likest: Annotated[int, Field(ge=1)] = 200


class ListSpec(_Spec):
    """Items for everyone, best first, or for each segment of users."""

    kind: Literal["lists"] = "lists"
    name: str
    rows: str
    """safetensors file with `rows` int32 [K] and `scores` float32 [K]. Or, by segment, with `groups` int32 [G], `rows`
    [G, K] padded with -1 and `scores` [G, K]: a group is a hashed profile attribute, the first is -1, everyone; a
    user's list is the sum of the lists of their first eight attributes, or everyone's."""


SourceSpec = Annotated[VectorSpec | NeighbourSpec | BasketSpec | ListSpec, Field(discriminator="kind")]


class RankerSpec(_Spec):
    """A program, a forest, or the sum of both."""

    name: str
    program: str | None = None
    """torch.export archive: features float32 [M, F] -> scores float32 [M]."""
    standard: str | None = None
    """safetensors file with `mean`, `scale` and `clip` float32 [F], `clip` > 0. With it the program takes, in
    bfloat16, (features - mean) * scale cut to -clip..clip: half the bytes, and prepared in one pass."""
    forest: str | None = None
    """safetensors file with T trees of up to N + 1 <= 31 leaves, numbered from the left: `feature` int32 [T, N] and
    `threshold` float32 [T, N] of their conditions x <= threshold in any order, `kept` int32 [T, N], the bits of the
    leaves that remain where it fails (all but those to its left), and `value` float32 [T, N + 1]. A condition at
    infinity stands for none. The score is the sum of the values of the first leaf that remains in each tree."""
    calibrated: bool = False
    """Whether a score is the log-odds of being wanted, by somebody who wants anything."""
    features: tuple[str, ...]
    """The columns it was trained on, in order; the engine refuses to serve it with others."""

    @model_validator(mode="after")
    def _some_form(self) -> Self:
        if self.program is None and self.forest is None:
            raise ValueError("a ranker is a program, a forest or both")
        if self.standard is not None and self.program is None:
            raise ValueError("only a program takes standardised features")
        return self


class Manifest(_Spec):
    format: int
    version: str
    created_at: str
    items: int
    window: int
    """Events of a user's state that training used; the service must keep at least as many."""
    statistics: tuple[str, ...]
    """Names of the columns of the catalog's `statistics`."""
    categories: tuple[str, ...]
    brands: tuple[str, ...]
    sources: tuple[SourceSpec, ...]
    rankers: tuple[RankerSpec, ...]
    scenes: Mapping[str, Scene]
    recorded: str | None
    """JSON file of recorded queries with their answers."""
    metrics: Mapping[str, Any] = {}
    provenance: Mapping[str, Any] = {}
    """Fingerprint of the training data, code version, parameters, training seconds."""
    files: Mapping[str, FileSpec]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Bundle:
    """A verified bundle on disk."""

    path: Path
    manifest: Manifest

    @cached_property
    def version(self) -> str:
        return self.manifest.version

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a safetensors file, memory-mapped: workers on one machine share its pages."""
        try:
            with safe_open(self.path / name, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError) as error:
            raise BundleError(f"{name}: {error}") from error


def open_bundle(path: Path) -> Bundle:
    """Reads and verifies the bundle at `path`.

    Raises `BundleError` with the reason when anything is missing, changed, truncated, of another
    format version, or not consistent with itself.
    """
    try:
        raw = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path.name}: cannot read {MANIFEST}: {error}") from error
    found = raw.get("format") if isinstance(raw, dict) else None
    if found != FORMAT:
        raise BundleError(f"{path.name}: format version {found!r}, this service reads {FORMAT}")
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BundleError(f"{path.name}: manifest: {where}: {first['msg']}") from error
    if manifest.version != path.name:
        raise BundleError(f"{path.name}: manifest says version {manifest.version!r}")
    _check_references(manifest)
    with ThreadPoolExecutor(max_workers=2) as pool:
        for problem in pool.map(lambda entry: _check_file(path, *entry), manifest.files.items()):
            if problem:
                raise BundleError(f"{path.name}: {problem}")
    return Bundle(path, manifest)


def _check_file(path: Path, name: str, spec: FileSpec) -> str | None:
    if name != Path(name).name:
        return f"{name!r} is not a plain file name"
    file = path / name
    if not file.is_file():
        return f"{name} is missing"
    if (size := file.stat().st_size) != spec.size_bytes:
        return f"{name} has {size} bytes, the manifest says {spec.size_bytes}"
    if _sha256(file) != spec.sha256:
        return f"{name} does not match its SHA-256"
    return None


def _check_references(manifest: Manifest) -> None:
    sources = {source.name for source in manifest.sources}
    rankers = {ranker.name for ranker in manifest.rankers}
    for name, scene in manifest.scenes.items():
        for source in scene.sources:
            if source.name not in sources:
                raise BundleError(f"{manifest.version}: scene {name!r} names the unknown source {source.name!r}")
        if (scene.fusion == "learned" or scene.ranker) and scene.ranker not in rankers:
            raise BundleError(f"{manifest.version}: scene {name!r} names the unknown ranker {scene.ranker!r}")
    named = [value for spec in (*manifest.sources, *manifest.rankers) for value in _files_of(spec)]
    for file in [*named, "catalog.safetensors", *filter(None, [manifest.recorded])]:
        if file not in manifest.files:
            raise BundleError(f"{manifest.version}: {file} has no checksum in the manifest")


def _files_of(spec: SourceSpec | RankerSpec) -> tuple[str, ...]:
    match spec:
        case VectorSpec():
            return tuple(filter(None, (spec.vectors, spec.index, spec.encoder, spec.inputs)))
        case NeighbourSpec() | BasketSpec():
            return (spec.table,)
        case ListSpec():
            return (spec.rows,)
        case RankerSpec():
            return tuple(filter(None, (spec.program, spec.standard, spec.forest)))


@dataclass(slots=True)
class Draft:
    """A bundle being written: files go to `path`, the rest is the manifest's."""

    path: Path
    items: int
    window: int
    statistics: tuple[str, ...]
    categories: tuple[str, ...]
    brands: tuple[str, ...]
    sources: list[SourceSpec]
    rankers: list[RankerSpec]
    scenes: dict[str, Scene]
    recorded: str | None = None
    metrics: Mapping[str, Any] | None = None
    provenance: Mapping[str, Any] | None = None

    def save(self, name: str, tensors: Mapping[str, torch.Tensor]) -> str:
        """Writes a safetensors file and returns its name."""
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, self.path / name)
        return name


def seal(draft: Draft, version: str) -> Bundle:
    """Writes the manifest over whatever is in the draft's folder and checks the result."""
    names = sorted(path.name for path in draft.path.iterdir() if path.name != MANIFEST)
    files = {name: FileSpec(sha256=_sha256(p := draft.path / name), size_bytes=p.stat().st_size) for name in names}
    manifest = Manifest(
        format=FORMAT,
        version=version,
        created_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        items=draft.items,
        window=draft.window,
        statistics=draft.statistics,
        categories=draft.categories,
        brands=draft.brands,
        sources=tuple(draft.sources),
        rankers=tuple(draft.rankers),
        scenes=draft.scenes,
        recorded=draft.recorded,
        metrics=draft.metrics or {},
        provenance=draft.provenance or {},
        files=files,
    )
    _check_references(manifest)
    (draft.path / MANIFEST).write_text(manifest.model_dump_json(indent=1))
    return Bundle(draft.path, manifest)


def publish(root: Path, write: Callable[[Path, str], Bundle], *, activate_it: bool = True) -> Bundle:
    """Lets `write(folder, version)` fill and seal a folder, then makes it a version of `root` in one step.

    A reader sees the whole bundle or none of it, also when this process or the machine dies midway.
    Raises `BundleError` when what was written cannot be served; then nothing has changed.
    """
    root.mkdir(parents=True, exist_ok=True)
    version = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{os.urandom(4).hex()}"
    staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=root))
    folder = staging / version
    try:
        folder.mkdir()
        write(folder, version)
        # Whoever serves it may be another user than the one who trains.
        folder.chmod(0o755)
        for file in folder.iterdir():
            file.chmod(0o644)
            _sync(file)
        _sync(folder)
        manifest = open_bundle(folder).manifest
        folder.rename(root / version)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    _sync(root)
    if activate_it:
        activate(root, version)
    return Bundle(root / version, manifest)


def activate(root: Path, version: str) -> None:
    """Names `version` as the one to serve; running services pick it up at their next look."""
    if version not in versions(root):
        raise BundleError(f"no bundle {version!r} in {root}")
    _replace(root / CURRENT, f"{version}\n".encode())


def current(root: Path) -> str | None:
    """The version to serve, if any has been activated."""
    try:
        return (root / CURRENT).read_text().strip() or None
    except FileNotFoundError:
        return None


_CHANGES = TypeAdapter(dict[str, SceneChange])


def scene_changes(root: Path) -> dict[str, SceneChange]:
    """What operators changed, by scene. Raises `BundleError` where the file says something else."""
    try:
        return _CHANGES.validate_json((root / SCENES).read_bytes())
    except FileNotFoundError:
        return {}
    except ValidationError as error:
        first = error.errors()[0]
        raise BundleError(f"{SCENES}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except OSError as error:
        raise BundleError(f"{SCENES}: {error.strerror}") from error


def change_scene(root: Path, name: str, change: SceneChange | None) -> None:
    """Sets the change of a scene, or takes it back; running services follow at their next look.

    Raises `BundleError` where the file cannot be read or written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (root / f".{SCENES}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            changes = {other: one for other, one in scene_changes(root).items() if other != name}
            if change is not None:
                changes[name] = change
            _replace(root / SCENES, _CHANGES.dump_json(changes, indent=1, exclude_none=True, exclude_defaults=True))
    except OSError as error:
        raise BundleError(f"{root / SCENES}: {error.strerror}") from error


def versions(root: Path) -> list[str]:
    """All versions in `root`, oldest first."""
    return sorted(path.parent.name for path in root.glob(f"[!.]*/{MANIFEST}"))


def _replace(path: Path, content: bytes) -> None:
    new = path.with_name(f".{path.name}-{os.urandom(4).hex()}")
    new.write_bytes(content)
    _sync(new)
    new.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
