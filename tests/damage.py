"""Copies of a bundle, and every way to damage one."""

import json
import shutil
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.bundle import MANIFEST, Bundle

Damage = Callable[[Path], None]


def copy(bundle: Bundle, folder: Path, version: str) -> Bundle:
    """The same bundle as another version; as the `write` of a publish it is a thousand times faster than training."""
    shutil.copytree(bundle.path, folder, dirs_exist_ok=True)
    manifest(folder, version=version)
    return Bundle(folder, bundle.manifest.model_copy(update={"version": version}))


def damaged(bundle: Bundle, root: Path, version: str, damage: Damage) -> Path:
    copy(bundle, root / version, version)
    damage(root / version)
    return root / version


def manifest(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(raw | changes))


def reseal(folder: Path, **changes: Any) -> None:
    """Makes every checksum right again."""
    files = {
        path.name: {"sha256": sha256(path.read_bytes()).hexdigest(), "size_bytes": path.stat().st_size}
        for path in folder.iterdir()
        if path.name != MANIFEST
    }
    manifest(folder, files=files, **changes)


def tensors(folder: Path, name: str, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor | None]]) -> None:
    """Replaces the tensors that `change` names, drops those it gives None for, and reseals."""
    found = load_file(folder / name)
    kept = {key: tensor for key, tensor in {**found, **change(found)}.items() if tensor is not None}
    (folder / name).unlink()  # or else a process that has it mapped would see the change
    save_file({key: tensor.contiguous() for key, tensor in kept.items()}, folder / name)
    reseal(folder)


def _flip(folder: Path) -> None:
    data = bytearray((folder / "towers.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "towers.safetensors").write_bytes(data)


def _truncate(folder: Path) -> None:
    data = (folder / "towers.faiss").read_bytes()
    (folder / "towers.faiss").write_bytes(data[:-1])


def _folder_for_file(folder: Path) -> None:
    (folder / "sum.pt2").unlink()
    (folder / "sum.pt2").mkdir()


def _write(data: bytes) -> Damage:
    return lambda folder: _ignore((folder / MANIFEST).write_bytes(data))


def _ignore(_: object) -> None:
    pass


def _half_a_manifest(folder: Path) -> None:
    data = (folder / MANIFEST).read_bytes()
    (folder / MANIFEST).write_bytes(data[: len(data) // 2])


def _set(**changes: Any) -> Damage:
    return lambda folder: manifest(folder, **changes)


def _without(name: str) -> Damage:
    def damage(folder: Path) -> None:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        manifest(folder, files={file: spec for file, spec in files.items() if file != name})

    return damage


def _elsewhere(name: str) -> Damage:
    """A manifest that lists, with its right checksum, a file by a name that leads out of or down from the folder."""

    def damage(folder: Path) -> None:
        file = folder / name.replace("ABSOLUTE", str(folder))
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"x")
        files = json.loads((folder / MANIFEST).read_text())["files"]
        files[name.replace("ABSOLUTE", str(folder))] = {"sha256": sha256(b"x").hexdigest(), "size_bytes": 1}
        manifest(folder, files=files)

    return damage


def _scene(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        scenes = json.loads((folder / MANIFEST).read_text())["scenes"]
        manifest(folder, scenes=scenes | {"home": scenes["home"] | changes})

    return damage


def _part(parts_of: str, name: str, **changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        parts = json.loads((folder / MANIFEST).read_text())[parts_of]
        manifest(folder, **{parts_of: [part | changes if part["name"] == name else part for part in parts]})

    return damage


def _tensors(name: str, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor | None]]) -> Damage:
    return lambda folder: tensors(folder, name, change)


def _file(name: str, data: bytes) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(data)
        reseal(folder)

    return damage


def _index(items: int, width: int) -> Damage:
    def damage(folder: Path) -> None:
        index = faiss.IndexFlatIP(width)
        index.add(np.ones((items, width), np.float32))
        faiss.write_index(index, str(folder / "towers.faiss"))
        reseal(folder)

    return damage


ON_DISK: Mapping[str, tuple[Damage, str]] = {
    "flipped byte": (_flip, r"towers\.safetensors does not match its SHA-256"),
    "truncated file": (_truncate, r"towers\.faiss has \d+ bytes, the manifest says \d+"),
    "missing file": (lambda folder: (folder / "sum.pt2").unlink(), r"sum\.pt2 is missing"),
    "folder for a file": (_folder_for_file, r"sum\.pt2 is missing"),
    "newer format": (_set(format=2), "format version 2, this service reads 1"),
    "no format": (_set(format=None), "format version None"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), r"cannot read manifest\.json"),
    "empty manifest": (_write(b""), r"cannot read manifest\.json"),
    "not JSON": (_write(b"format: 1"), r"cannot read manifest\.json"),
    "not UTF-8": (_write(b'{"format": "\xff"}'), r"cannot read manifest\.json"),
    "nested": (_write(b"[" * 100_000), r"cannot read manifest\.json"),
    "truncated manifest": (_half_a_manifest, r"cannot read manifest\.json"),
    "a list": (_write(b"[1]"), "format version None"),
    "a number of items in words": (_set(items="many"), "manifest: items: "),
    "files as a list": (_set(files=[]), "manifest: files: "),
    "unknown field": (_set(extra=1), "manifest: extra: "),
    "another version's": (_set(version="20200101T000000-00000000"), "manifest says version '20200101T000000-00000000'"),
    "unknown kind of source": (_part("sources", "towers", kind="oracle"), "manifest: sources.2: .*'oracle'"),
    "unknown source": (_scene(sources=[{"name": "oracle"}]), "scene 'home' names the unknown source 'oracle'"),
    "no source": (_scene(sources=[]), "manifest: scenes.home.sources: "),
    "unknown ranker": (_scene(ranker="oracle"), "scene 'home' names the unknown ranker 'oracle'"),
    "learned without a ranker": (_scene(ranker=None), "scene 'home' names the unknown ranker None"),
    "unchecked catalog": (_without("catalog.safetensors"), r"catalog\.safetensors has no checksum"),
    "unchecked index": (_without("towers.faiss"), r"towers\.faiss has no checksum"),
    "unchecked ranker": (_without("sum.pt2"), r"sum\.pt2 has no checksum"),
    "unchecked recorded queries": (_without("recorded.json"), r"recorded\.json has no checksum"),
    "path out of the folder": (_elsewhere("../beside"), "'../beside' is not a plain file name"),
    "path into a folder": (_elsewhere("below/file"), "'below/file' is not a plain file name"),
    "absolute path": (_elsewhere("ABSOLUTE/file"), "file' is not a plain file name"),
    "the folder above": (_set(files={"..": {"sha256": "", "size_bytes": 0}}), "no checksum|'..' is not a plain"),
}
"""What `open_bundle` refuses: the damage, and what its message says."""

INSIDE: Mapping[str, tuple[Damage, str]] = {
    "short catalog column": (
        _tensors("catalog.safetensors", lambda found: {"price": found["price"][1:]}),
        "catalog column price has 39 rows, not 40",
    ),
    "ids of fewer items": (
        _tensors("catalog.safetensors", lambda found: {"id_ends": found["id_ends"][:7]}),
        "catalog column id_ends has 7 rows, not 40",
    ),
    "ids that end beyond their bytes": (
        _tensors("catalog.safetensors", lambda found: {"id_ends": found["id_ends"] + 1}),
        r"catalog column id_ends does not fit the \d+ bytes of id_bytes",
    ),
    "category beyond the last": (
        _tensors("catalog.safetensors", lambda found: {"category": found["category"] + 9}),
        "catalog column category has codes beyond the 4 of the manifest",
    ),
    "another number of items": (_set(items=41), "catalog column key has 40 rows, not 41"),
    "no statistics": (
        _tensors("catalog.safetensors", lambda found: {"statistics": None}),
        "has no column 'statistics'",
    ),
    "one statistic of two": (
        _tensors("catalog.safetensors", lambda found: {"statistics": found["statistics"][:, :1]}),
        "catalog column statistics is 1 wide, the manifest names 2",
    ),
    "catalog keys out of order": (
        _tensors("catalog.safetensors", lambda found: {"key": found["key"].flip(0)}),
        "catalog keys are not ascending",
    ),
    "catalog of another format": (_file("catalog.safetensors", b"PK\x03\x04"), r"catalog\.safetensors: "),
    "vectors of fewer items": (
        _tensors("towers.safetensors", lambda found: {"vectors": found["vectors"][:-1]}),
        r"towers\.safetensors has 39 vectors for 40 items",
    ),
    "no vectors": (_tensors("towers.safetensors", lambda found: {"vectors": None}), "'towers' has no 'vectors'"),
    "index of fewer items": (_index(39, 8), r"towers\.faiss is \[39, 8\]"),
    "index of another width": (_index(40, 16), r"towers\.faiss is \[40, 16\]"),
    "no index": (_file("towers.faiss", b"not an index"), "FAISS index"),
    "neighbours of fewer items": (
        _tensors("item_cf.safetensors", lambda found: {key: found[key][:-1] for key in ("rows", "weights")}),
        r"item_cf\.safetensors is \[39, 10\] for 40 items",
    ),
    "neighbours beyond the catalog": (
        _tensors("item_cf.safetensors", lambda found: {"rows": found["rows"] + 40}),
        r"item_cf\.safetensors names rows beyond the 40 items",
    ),
    "neighbours without weights": (
        _tensors("item_cf.safetensors", lambda found: {"weights": None}),
        "'item_cf' has no 'weights'",
    ),
    "anchors of an unknown type": (
        _part("sources", "item_cf", anchors={"weights": {"gaze": 1.0}}),
        "'item_cf' has no 'GAZE'",
    ),
    "list of unknown items": (
        _tensors("popular.safetensors", lambda found: {"rows": found["rows"] + 1}),
        r"popular\.safetensors names rows beyond the 40 items",
    ),
    "list with too few scores": (
        _tensors("popular.safetensors", lambda found: {"scores": found["scores"][:-1]}),
        r"popular\.safetensors has 40 rows and 39 scores",
    ),
    "ranker of other features": (
        _part("rankers", "sum", features=["item_cf.score", "item.sweetness"]),
        "ranker 'sum' does not fit scene 'home': .*differ",
    ),
    "ranker of garbage": (_file("sum.pt2", b"PK\x05\x06" + bytes(18)), r"sum\.pt2: "),
    "vectors without users": (
        _part("sources", "sums", anchors=None),
        "source 'sums' has neither an encoder nor anchors",
    ),
    "encoder of garbage": (_file("towers.pt2", b"\x80\x04."), r"towers\.pt2: "),
    "no recorded queries in the file": (_file("recorded.json", b"{}"), r"recorded\.json cannot be replayed"),
}
"""What is refused on loading although every checksum is right."""
