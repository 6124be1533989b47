"""Routes about the server and its model: /v1/models, /health, /metrics, /tokenize, /detokenize."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from . import metrics
from .body import read_request
from .schemas import DetokenizeRequest, TokenizeRequest
from .served import ServedModel

router = APIRouter()


def _model_object(served: ServedModel) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "gptoss",
        "max_model_len": served.model.max_context,
    }


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """The one model there is."""
    return JSONResponse({"object": "list", "data": [_model_object(request.app.state.served)]})


@router.get("/v1/models/{name:path}")
async def get_model(request: Request, name: str) -> Response:
    """That model by its name."""
    served = request.app.state.served
    served.check_name(name)
    return JSONResponse(_model_object(served))


@router.get("/health")
async def health(request: Request) -> Response:
    """200 while requests are answered; 503 while the server stops or the engine fails."""
    driver = request.app.state.driver
    status = "failing" if not driver.healthy else "draining" if driver.draining else "ok"
    return JSONResponse({"status": status}, 200 if status == "ok" else 503)


@router.get("/metrics")
async def prometheus(request: Request) -> Response:
    """Everything Prometheus may want to know."""
    return Response(
        request.app.state.metrics.text(), headers={"content-type": metrics.CONTENT_TYPE}
    )


@router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    """Token ids of a plain text: no text becomes a special token."""
    body = await read_request(request, TokenizeRequest)
    served: ServedModel = request.app.state.served
    tokens = await asyncio.to_thread(served.tokenizer.encode, body.prompt)
    return JSONResponse(
        {"tokens": tokens, "count": len(tokens), "max_model_len": served.model.max_context}
    )


@router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    """Text of token ids; special tokens appear by name."""
    body = await read_request(request, DetokenizeRequest)
    served: ServedModel = request.app.state.served
    text = await asyncio.to_thread(served.tokenizer.decode, body.tokens)
    return JSONResponse({"prompt": text})
