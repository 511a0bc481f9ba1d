import json
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.bundle import (
    CURRENT,
    MANIFEST,
    Bundle,
    BundleError,
    activate,
    change_scene,
    current,
    open_bundle,
    publish,
    scene_changes,
    versions,
)
from app.engine.pipeline import Pipeline
from app.engine.recorded import replay
from app.scenes import SceneChange
from tests.damage import INSIDE, ON_DISK, copy, damaged
from tests.live import ROOT


def written(tiny: Bundle) -> Callable[[Path, str], Bundle]:
    return lambda folder, version: copy(tiny, folder, version)


def left(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def test_a_published_bundle_is_whole_current_and_readable_by_others(tiny: Bundle, tmp_path: Path) -> None:
    root = tmp_path / "not" / "yet" / "there"
    bundle = publish(root, written(tiny))
    assert bundle.path == root / bundle.version
    assert bundle.manifest == open_bundle(bundle.path).manifest
    assert current(root) == bundle.version
    assert versions(root) == [bundle.version]
    assert left(root) == {bundle.version, CURRENT}
    assert all(path.stat().st_mode & stat.S_IROTH for path in (bundle.path, *bundle.path.iterdir()))
    assert set(bundle.manifest.files) == left(bundle.path) - {MANIFEST}


def test_publishing_without_activating(tiny: Bundle, tmp_path: Path) -> None:
    first = publish(tmp_path, written(tiny))
    second = publish(tmp_path, written(tiny), activate_it=False)
    assert current(tmp_path) == first.version
    assert set(versions(tmp_path)) == {first.version, second.version}


def test_activating(tiny: Bundle, tmp_path: Path) -> None:
    assert current(tmp_path) is None
    for version in ("20260102T000000-00000000", "20260101T000000-00000000"):
        copy(tiny, tmp_path / version, version)
    (tmp_path / ".staging-x").mkdir()
    shutil.copy(tiny.path / MANIFEST, tmp_path / ".staging-x")
    (tmp_path / "no-manifest").mkdir()
    assert versions(tmp_path) == ["20260101T000000-00000000", "20260102T000000-00000000"]
    for version in (*versions(tmp_path), versions(tmp_path)[0]):
        activate(tmp_path, version)
        assert current(tmp_path) == version
    for version in ("20260103T000000-00000000", "no-manifest", ".staging-x", "", ".", f"../{tmp_path.name}"):
        with pytest.raises(BundleError, match="no bundle"):
            activate(tmp_path, version)
    assert current(tmp_path) == versions(tmp_path)[0]
    (tmp_path / CURRENT).write_text("\n")
    assert current(tmp_path) is None


@pytest.mark.parametrize("name", ON_DISK)
def test_a_damaged_bundle_is_refused_with_the_reason(tiny: Bundle, tmp_path: Path, name: str) -> None:
    damage, reason = ON_DISK[name]
    with pytest.raises(BundleError, match=reason):
        open_bundle(damaged(tiny, tmp_path, "20260101T000000-00000000", damage))


@pytest.mark.parametrize("name", INSIDE)
def test_a_bundle_that_does_not_fit_itself_is_refused_with_the_reason(tiny: Bundle, tmp_path: Path, name: str) -> None:
    damage, reason = INSIDE[name]
    bundle = open_bundle(damaged(tiny, tmp_path, "20260101T000000-00000000", damage))
    with pytest.raises(BundleError, match=reason):
        replay(Pipeline(bundle, torch.device("cpu"), 32))


def test_the_undamaged_copy_is_not_refused(tiny: Bundle, tmp_path: Path) -> None:
    bundle = open_bundle(damaged(tiny, tmp_path, "20260101T000000-00000000", lambda folder: None))
    replay(Pipeline(bundle, torch.device("cpu"), 32))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_change_of_any_file_is_refused(tiny: Bundle, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(tiny.manifest.files)))
    with tempfile.TemporaryDirectory() as root:
        folder = copy(tiny, Path(root) / "v", "v").path
        content = bytearray((folder / name).read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        (folder / name).write_bytes(content)
        with pytest.raises(BundleError, match=name):
            open_bundle(folder)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_manifest_cut_anywhere_is_refused(tiny: Bundle, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as root:
        folder = copy(tiny, Path(root) / "v", "v").path
        content = (folder / MANIFEST).read_bytes()
        (folder / MANIFEST).write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        with pytest.raises(BundleError, match="cannot read"):
            open_bundle(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_manifest_with_anything_anywhere_raises_nothing_but_bundle_errors(tiny: Bundle, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as root:
        folder = copy(tiny, Path(root) / "v", "v").path
        raw = json.loads((folder / MANIFEST).read_text())
        place: Any = {"root": raw}
        key: Any = "root"
        while isinstance(place[key], dict | list) and place[key] and data.draw(st.sampled_from([True, True, False])):
            place = place[key]
            key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else list(range(len(place)))))
        place[key] = data.draw(JSON)
        (folder / MANIFEST).write_text(json.dumps(raw))
        try:
            open_bundle(folder)
        except BundleError as error:
            assert str(error)


class Interrupted(BaseException):
    pass


def test_a_publish_that_fails_changes_nothing(tiny: Bundle, tmp_path: Path) -> None:
    good = publish(tmp_path, written(tiny))

    def interrupted(folder: Path, version: str) -> Bundle:
        copy(tiny, folder, version)
        raise Interrupted

    def unsealed(folder: Path, version: str) -> Bundle:
        (folder / "catalog.safetensors").write_bytes(b"")
        return tiny

    def changed_after_sealing(folder: Path, version: str) -> Bundle:
        bundle = copy(tiny, folder, version)
        (folder / "sum.pt2").write_bytes(b"")
        return bundle

    def of_another_version(folder: Path, version: str) -> Bundle:
        return copy(tiny, folder, "another")

    with pytest.raises(Interrupted):
        publish(tmp_path, interrupted)
    for write, reason in (
        (unsealed, "cannot read manifest"),
        (changed_after_sealing, r"sum\.pt2 has 0 bytes"),
        (of_another_version, "says version 'another'"),
    ):
        with pytest.raises(BundleError, match=reason):
            publish(tmp_path, write)
    assert left(tmp_path) == {good.version, CURRENT}
    assert current(tmp_path) == good.version


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from typing import Any
from app.bundle import publish
def write(folder, version):
    shutil.copytree(sys.argv[2], folder, dirs_exist_ok=True)
    os.kill(os.getpid(), signal.SIGKILL)
publish(Path(sys.argv[1]), write)
"""


def test_a_process_killed_while_publishing_leaves_nothing_to_serve(tiny: Bundle, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(tiny.path)]
    assert subprocess.run(command, cwd=ROOT, timeout=60, check=False).returncode == -signal.SIGKILL
    assert any(path.name == MANIFEST for path in tmp_path.rglob("*")), "it was killed before it had written anything"
    assert versions(tmp_path) == []
    assert current(tmp_path) is None
    bundle = publish(tmp_path, written(tiny))
    assert versions(tmp_path) == [bundle.version] == [current(tmp_path)]


def test_readers_never_see_half_of_what_two_writers_publish(tiny: Bundle, tmp_path: Path) -> None:
    published: list[str] = []
    looks = 0

    def writer() -> None:
        for _ in range(6):
            published.append(publish(tmp_path, written(tiny)).version)

    writers = [threading.Thread(target=writer) for _ in range(2)]
    for thread in writers:
        thread.start()
    while any(thread.is_alive() for thread in writers):
        found = versions(tmp_path)
        named = current(tmp_path)
        assert named is None or named in versions(tmp_path)
        for version in found[-2:]:
            open_bundle(tmp_path / version)
            looks += 1
    for thread in writers:
        thread.join()
    assert looks
    assert len(published) == 12
    assert versions(tmp_path) == sorted(published)
    assert current(tmp_path) in published
    assert left(tmp_path) == {*published, CURRENT}


def test_changes_of_many_at_once_are_all_kept(tmp_path: Path) -> None:
    names = [f"scene {number}" for number in range(20)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: change_scene(tmp_path, name, SceneChange(fusion="voting")), names))
    assert sorted(scene_changes(tmp_path)) == sorted(names)
    assert versions(tmp_path) == []
