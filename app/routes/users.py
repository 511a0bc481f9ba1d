"""What the shop tells about a user, and forgetting a user."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

from fastapi import APIRouter, Path
from starlette.requests import Request

from app.problems import Problem
from app.routes import state_of
from app.schemas import Id, UserAttributes
from app.state.link import StateUnavailable

router = APIRouter(tags=["users"])

UserId = Annotated[Id, Path(description="The shop's own id of the user.")]


@router.put("/users/{user_id}", status_code=204, summary="Replaces the attributes of a user")
async def put_user(user_id: UserId, body: UserAttributes, request: Request) -> None:
    with _store_needed():
        await state_of(request)["store"].put_profile(user_id, body.attributes)


@router.delete("/users/{user_id}", status_code=204, summary="Erases a user")
async def delete_user(user_id: UserId, request: Request) -> None:
    with _store_needed():
        await state_of(request)["store"].forget(user_id)


@contextmanager
def _store_needed() -> Iterator[None]:
    try:
        yield
    except StateUnavailable:
        raise Problem(503, "The store cannot be reached.", headers={"Retry-After": "1"}) from None
