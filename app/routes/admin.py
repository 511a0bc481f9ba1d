"""What operators change while the service runs."""

from collections.abc import Mapping
from typing import Annotated

from fastapi import APIRouter, Path
from starlette.requests import Request

from app.bundle import BundleError, change_scene
from app.problems import FieldError, Problem
from app.routes import state_of
from app.scenes import Scene, SceneChange, SceneError, changed

router = APIRouter(prefix="/admin", tags=["admin"])

SceneName = Annotated[str, Path(description="The scene's name.")]


@router.get("/scenes", summary="The scenes as they are served")
async def scenes(request: Request) -> Mapping[str, Scene]:
    return state_of(request)["engine"].scenes


@router.put("/scenes/{scene}", summary="Changes fusion, weights and sizes of a scene")
def put_scene(scene: SceneName, body: SceneChange, request: Request) -> Scene:
    """Instead of what was changed before. Every worker follows within `MILLIREC_BUNDLE_POLL_S`; the change outlives
    restarts and bundles. Returns the scene as it will be served."""
    bundled = _bundled(request, scene)
    names = [source.name for source in bundled.sources]
    if unknown := sorted(body.sources.keys() - set(names)):
        message = f"Input should be one of: {', '.join(names)}"
        raise Problem.of_fields([FieldError(field=f"sources.{name}", message=message) for name in unknown])
    try:
        wanted = changed(bundled, body)
    except SceneError as error:
        raise Problem.of_fields([FieldError(field=error.field, message=str(error))]) from None
    _write(request, scene, body)
    return wanted


@router.delete("/scenes/{scene}", status_code=204, summary="Gives a scene back to the bundle")
def delete_scene(scene: SceneName, request: Request) -> None:
    _bundled(request, scene)
    _write(request, scene, None)


def _bundled(request: Request, name: str) -> Scene:
    bundled = state_of(request)["engine"].bundled_scenes
    if name not in bundled:
        raise Problem(404, f"There is no scene {name!r}; there are {', '.join(bundled)}.")
    return bundled[name]


def _write(request: Request, name: str, change: SceneChange | None) -> None:
    try:
        change_scene(state_of(request)["settings"].bundles, name, change)
    except BundleError as error:
        raise Problem(503, f"The change cannot be kept: {error}") from None
