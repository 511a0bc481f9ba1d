"""LocalEngine: bundle, device and batches inside this process."""

import asyncio
import ctypes.util
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import faiss
import structlog
import torch

from app.bundle import BundleError, current, open_bundle, scene_changes
from app.engine import Query, Slate, UnknownScene
from app.engine.batcher import Batcher
from app.engine.pipeline import Pipeline
from app.engine.recorded import replay
from app.scenes import Scene, SceneChange, SceneError, changed
from app.state.events import UserState
from app.state.link import StateUnavailable

log = structlog.get_logger()


class States(Protocol):
    """Where user states come from."""

    async def read(self, subjects: Sequence[tuple[str | None, str | None]]) -> Sequence[UserState]:
        """States of (user, session) pairs, in order. Raises `StateUnavailable`."""
        ...


@dataclass(frozen=True, slots=True)
class Timing:
    """What one batch took, in seconds."""

    size: int
    waited_s: float
    state_s: float
    compute_s: float


class LocalEngine:
    """Serves the current bundle of `root`, its scenes as operators changed them, and swaps to another as soon as
    `CURRENT` names it."""

    def __init__(
        self,
        root: Path,
        states: States,
        *,
        device: str = "auto",
        threads: int = 1,
        window: int = 256,
        max_batch: int = 32,
        max_waiting: int = 1024,
        poll_s: float = 1.0,
        observe: Callable[[Timing], None] = lambda timing: None,
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._root = root
        self._states = states
        self._device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        self._threads = threads
        self._window = window
        self._max_batch = max_batch
        self._poll_s = poll_s
        self._observe = observe
        self._clock_ms = clock_ms
        self._pipeline: Pipeline | None = None
        self._refused: str | None = None
        self._changes: Mapping[str, SceneChange] = {}
        self._unread: str | None = None
        self._waited_s = 0.0
        self._batcher = Batcher(self._answer, max_batch, max_waiting, self._note)
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def ready(self) -> bool:
        return self._pipeline is not None

    @property
    def bundle(self) -> str | None:
        """Version of the bundle that serves."""
        return self._pipeline.bundle.version if self._pipeline else None

    @property
    def scenes(self) -> Mapping[str, Scene]:
        return self._pipeline.scenes if self._pipeline else {}

    @property
    def bundled_scenes(self) -> Mapping[str, Scene]:
        return self._pipeline.bundle.manifest.scenes if self._pipeline else {}

    async def start(self) -> None:
        """Loads the current bundle; raises `BundleError` when there is none that may be served."""
        _keep_freed_memory()
        torch.set_num_threads(self._threads)
        faiss.omp_set_num_threads(self._threads)
        version = current(self._root)
        if version is None:
            raise BundleError(f"no bundle in {self._root}: train one, or activate one")
        self._pipeline = await asyncio.to_thread(self._load, version)
        self._read_changes()
        self._change_scenes()
        self._tasks = [asyncio.create_task(self._batcher.run()), asyncio.create_task(self._watch())]

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with suppress(asyncio.CancelledError):
                await task

    async def recommend(self, query: Query) -> Slate:
        return await self._batcher.submit(query)

    def _load(self, version: str) -> Pipeline:
        bundle = open_bundle(self._root / version)
        if bundle.manifest.window > self._window:
            raise BundleError(
                f"{version} was trained on the last {bundle.manifest.window} events of a user,"
                f" this service keeps {self._window}"
            )
        pipeline = Pipeline(bundle, self._device, self._max_batch)
        replay(pipeline)
        return pipeline

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._poll_s)
            version = None
            if self._read_changes():
                self._change_scenes()
            try:
                version = current(self._root)
                if version is None or version in (self.bundle, self._refused):
                    continue
                self._pipeline = await asyncio.to_thread(self._load, version)
                self._change_scenes()
            except Exception as error:
                self._refused = version
                log.error("bundle refused", version=version, reason=str(error), serving=self.bundle)
            else:
                log.info("bundle live", version=version)

    def _read_changes(self) -> bool:
        """Whether operators want other scenes than a moment ago."""
        try:
            changes, self._unread = scene_changes(self._root), None
        except BundleError as error:
            if str(error) != self._unread:
                self._unread = str(error)
                log.error("scene changes refused", reason=self._unread)
            return False
        before, self._changes = self._changes, changes
        return changes != before

    def _change_scenes(self) -> None:
        assert self._pipeline
        scenes = dict(self.bundled_scenes)
        for name in scenes.keys() & self._changes.keys():
            try:
                scenes[name] = changed(scenes[name], self._changes[name])
            except SceneError as error:
                # What another bundle allowed this one may not.
                log.error("scene change refused", scene=name, field=error.field, reason=str(error))
            else:
                log.info("scene changed", scene=name)
        self._pipeline.use(scenes)

    def _note(self, size: int, waited_s: float) -> None:
        self._waited_s = waited_s

    async def _answer(self, queries: Sequence[Query]) -> Sequence[Slate | Exception]:
        # One reference for the whole batch: a swap takes effect between batches, never inside one.
        pipeline = self._pipeline
        if pipeline is None:
            raise BundleError("no bundle is live")
        begun = time.monotonic()
        degraded = False
        try:
            states = await self._states.read([(query.user, query.session) for query in queries])
        except StateUnavailable as error:
            log.warning("state unavailable", reason=str(error))
            states, degraded = [UserState()] * len(queries), True
        read = time.monotonic()
        answers: list[Slate | Exception] = [UnknownScene(query.scene, tuple(self.scenes)) for query in queries]
        known = [index for index, query in enumerate(queries) if query.scene in pipeline.scenes]
        for late in (False, True):
            part = [index for index in known if (queries[index].deadline < read) is late]
            # On the event loop on purpose: there is one core to run on, and a compute thread would
            # fight the loop for the interpreter lock in the middle of every batch.
            slates = pipeline.run(
                [queries[index] for index in part], [states[index] for index in part], self._clock_ms(), late
            )
            for index, slate in zip(part, slates, strict=True):
                answers[index] = replace(slate, degraded=("state", *slate.degraded)) if degraded else slate
        self._observe(Timing(len(queries), self._waited_s, read - begun, time.monotonic() - read))
        return answers


def _keep_freed_memory() -> None:
    """Tells glibc to reuse the memory of large tensors instead of giving it back and asking anew for every one.

    Fresh pages are zeroed by the kernel one fault at a time: a third of the time of a batch of 32.
    """
    if sys.platform == "linux" and (libc := ctypes.util.find_library("c")):
        mallopt = getattr(ctypes.CDLL(libc), "mallopt", None)
        if mallopt:
            trim_threshold, mmap_threshold = -1, -3
            mallopt(mmap_threshold, 32 << 20)  # the most that glibc takes; above it, nothing is set
            mallopt(trim_threshold, 256 << 20)
