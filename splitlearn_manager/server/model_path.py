"""The model that a path names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException

from splitlearn_manager.errors import ModelLoadingError, ModelNotFoundError
from splitlearn_manager.server.model_metadata import MODEL_VERSION
from splitlearn_manager.server.model_state import reason_of

if TYPE_CHECKING:
    from collections.abc import Container

    from starlette.requests import Request

    from splitlearn_manager.core.async_model_manager import AsyncModelManager
    from splitlearn_manager.core.entries import AsyncManagedModel


def named_model(request: Request) -> str:
    """Return the model that a path names; there is one version of each.

    Raises:
        HTTPException: 404: it names another version.
    """
    wanted = request.path_params.get("version", MODEL_VERSION)
    model_id: str = request.path_params["model"]
    if wanted != MODEL_VERSION:
        raise HTTPException(
            404, f"model {model_id!r} has no version {wanted}, only {MODEL_VERSION}"
        )
    return model_id


async def ready_model(
    manager: AsyncModelManager, model_id: str, awaited: Container[str] = ()
) -> AsyncManagedModel:
    """Return a model that can be used; nobody counts that as a use.

    Args:
        manager: Whose models are served.
        model_id: Its id.
        awaited: Ids of models that will be loaded, whether or not it has begun: who asks a server
            that has just started is not to be told that there is no such model.

    Raises:
        ModelLoadingError: It is being loaded, or will be; says how far that is.
        ManagerError: What `AsyncModelManager.get_model` raises.
    """
    try:
        managed = await manager.get_model(model_id)
    except ModelNotFoundError:
        if model_id not in awaited:
            raise
        raise ModelLoadingError(f"model {model_id!r} is waiting to be loaded") from None
    if managed is None:
        raise ModelLoadingError(reason_of(await manager.get_model_info(model_id)))
    return managed
