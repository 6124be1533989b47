"""The application: routes, and what they share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from . import chat, completions, models, responses, web
from .driver import Driver
from .errors import ApiError
from .metrics import Metrics
from .prompt_logprobs import PromptScorer
from .safety import Safety
from .served import ServedModel
from .settings import Settings

ROUTERS = (models.router, completions.router, chat.router, responses.router, web.router)


def create_app(model: ServedModel, settings: Settings) -> FastAPI:
    """The server for one model, as an ASGI application.

    While its lifespan runs, a thread of its own steps the model's engine. `app.state` holds
    `served`, `settings`, `driver` and `metrics`.
    """
    metrics = Metrics(model.model.engine)
    driver = Driver(model.model.engine, settings, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        driver.start()
        yield
        await driver.stop()

    middleware = [Middleware(Safety, settings=settings, metrics=metrics)]
    if settings.allowed_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.allowed_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["authorization", "content-type"],
            )
        )
    # No generated documentation: its pages load scripts from elsewhere.
    app = FastAPI(
        title="gptoss",
        lifespan=lifespan,
        middleware=middleware,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            RequestValidationError: _validation_error,
        },
    )
    app.state.served = model
    app.state.settings = settings
    app.state.driver = driver
    app.state.metrics = metrics
    app.state.scorer = PromptScorer(model.model)
    for router in ROUTERS:
        app.include_router(router)
    return app


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(_: Request, error: Exception) -> Response:
    """No such route, or not with this method."""
    assert isinstance(error, HTTPException)
    message = "There is no such URL." if error.status_code == 404 else str(error.detail)
    headers = dict(error.headers) if error.headers else None
    return ApiError(error.status_code, message, headers=headers).response()


async def _validation_error(_: Request, __: Exception) -> Response:
    return ApiError(400, "The URL's parameters are not valid.").response()
