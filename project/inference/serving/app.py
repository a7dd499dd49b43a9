"""The HTTP endpoints of the command ``serve``."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import re
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, Field, create_model
from starlette.exceptions import HTTPException

from project.inference.serving.connections import TimedConnection
from project.inference.serving.limits import RefusedError, unavailable
from project.inference.serving.metrics import MeasuredRequests
from project.inference.serving.service import Service
from project.inference.serving.uploads import FORM, read_upload

PATHS = ("/predict", "/health", "/metrics", "/openapi.json", "/")
#: Header Host of the loopback interface. Others are refused without a token: a web page could use a name of its own
#: that resolves to this interface.
LOOPBACK = re.compile(r"(127(\.\d+){3}|localhost|\[::1\])(:\d+)?")
CHALLENGE = {"WWW-Authenticate": "Bearer"}
BEARER = HTTPBearer(auto_error=False, description="Needed if the server was started with a token.")
IMAGE = {"type": "string", "format": "binary"}
BODY = {
    "required": True,
    "content": {
        FORM: {"schema": {"type": "object", "properties": {"image": IMAGE}, "required": ["image"]}},
        "image/*": {"schema": IMAGE},
        "application/octet-stream": {"schema": IMAGE},
    },
}


class Problem(BaseModel):
    """Why a request is refused."""

    error: str


class ClassProbability(BaseModel):
    """A class and its probability."""

    name: str = Field(alias="class")
    probability: float


class Prediction(BaseModel):
    """The answer for an image. The last four exist if the server was started with a limit of the answers."""

    name: str = Field(alias="class", description="The most probable class.")
    probability: float = Field(description="Its probability.")
    top: list[ClassProbability] = Field(description="The three most probable classes.")
    calibrated_probability: float | None = Field(None, description="Its probability, scaled by the temperature.")
    known: bool | None = Field(None, description="Whether the image resembles the training images.")
    set: list[str] | None = Field(None, description="Classes that contain the right one with the stated coverage.")
    answered: bool | None = Field(None, description="Whether the prediction is certain enough for the stated error.")


def make_app(
    service: Service,
    names: Sequence[str],
    version: str,
    token: str | None = None,
    on_started: Callable[[], None] | None = None,
) -> FastAPI:
    """Create the application.

    Args:
        service: Answers the requests; the application starts and closes it.
        names: Names of the tasks.
        version: Version of this project.
        token: What clients must send as ``Authorization: Bearer TOKEN``; ``None`` accepts all clients that address the
            loopback interface by its usual names.
        on_started: Called when the service has loaded its model, or has failed to.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async def start() -> None:
            await service.start()
            if on_started is not None:
                on_started()

        starting = asyncio.create_task(start())
        try:
            yield
        finally:
            await starting
            service.close()

    async def check_access(
        request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)]
    ) -> None:
        if token is None and not LOOPBACK.fullmatch(request.headers.get("host", "")):
            raise RefusedError(403, "Without a token, the server answers requests to 127.0.0.1 and localhost only.")
        if token is not None and not (given and hmac.compare_digest(given.credentials.encode(), token.encode())):
            raise RefusedError(401, "The token is missing or wrong; send Authorization: Bearer TOKEN.", CHALLENGE)

    app = FastAPI(
        title="Image classifier",
        version=version,
        description=f"Tasks: {', '.join(names)}",
        lifespan=lifespan,
        openapi_url=None,  # replaced by a route that needs the token
    )
    guarded: Any = {"dependencies": [Depends(check_access)]}
    fields: Any = dict.fromkeys(names, Prediction)
    answer_model = Prediction if len(names) == 1 else create_model("Predictions", **fields)
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"model": Problem} for status in (400, 401, 403, 408, 413, 415, 422, 503)
    }

    @app.post(
        "/predict",
        **guarded,
        summary="Classify an image",
        responses={**refusals, 200: {"model": answer_model}},
        openapi_extra={"requestBody": BODY},
    )
    async def predict(request: Request) -> Response:
        with service.place():
            content = await read_upload(request, service.limits)
            answers = await service.answer(content, _disconnected(request))
        return JSONResponse(answers if len(names) > 1 else answers[names[0]])

    @app.get("/health", summary="Whether the model is loaded", responses={503: {"model": Problem}})
    async def health() -> Response:
        if service.model is None:
            raise unavailable("The model is being loaded.")
        return JSONResponse({"status": "ok"})

    @app.get("/", **guarded, summary="Version, and classes and SHA-256 of each task")
    async def describe() -> Response:
        if service.model is None:
            raise unavailable("The model is being loaded.")
        return JSONResponse({"version": version, "tasks": service.model.description})

    @app.get("/metrics", **guarded, summary="Metrics for Prometheus")
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/openapi.json", **guarded, include_in_schema=False)
    async def openapi() -> Response:
        return JSONResponse(app.openapi())

    @app.exception_handler(RefusedError)
    async def refuse(_: Request, refusal: RefusedError) -> Response:
        return JSONResponse({"error": refusal.reason}, refusal.status, dict(refusal.headers))

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> Response:
        reason = f"{request.method} {request.url.path}: {error.detail}. Available: {', '.join(PATHS)}."
        return JSONResponse({"error": reason}, error.status_code, error.headers)

    @app.exception_handler(Exception)  # the server logs it with its traceback
    async def fail(_: Request, error: Exception) -> Response:
        return JSONResponse({"error": "Internal error; the log of the server has the details."}, 500)

    service.metrics.info.info({"version": version, "tasks": ",".join(names)})
    app.add_middleware(MeasuredRequests, metrics=service.metrics, paths=frozenset(PATHS))
    return app


def make_server(app: FastAPI, seconds: float) -> uvicorn.Server:
    """Create the server of an application.

    h11 parses the requests, because uvicorn's faster parser, httptools, does not limit the size of the headers.

    Args:
        app: The application.
        seconds: Longest time in which a client must send the headers of a request.
    """
    quiet: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False}
    protocol: Any = functools.partial(TimedConnection, seconds)
    return uvicorn.Server(uvicorn.Config(app, http=protocol, ws="none", lifespan="on", proxy_headers=False, **quiet))


async def _disconnected(request: Request) -> None:
    """Wait until the client closes its connection. The body must have been read."""
    message = await request.receive()
    while message["type"] != "http.disconnect":
        message = await request.receive()
