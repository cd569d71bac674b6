"""The studio's HTTP server: the page at /, the API at /api/ACTION; see docs/studio.md."""

import base64
import io
import json

import numpy as np

from dalle2_jax.runtime.grid import png_bytes
from dalle2_jax.studio import page
from dalle2_jax.studio.requests import ACTIONS, MAX_UPLOAD, Refused
from dalle2_jax.studio.work import Full, Studio

MAX_BODY = 3 * MAX_UPLOAD  # two pictures as base64
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def _plain(made, notes: list[str]) -> dict:
    """The result of `Studio.draw` and its notes, as JSON values."""

    def text(png: bytes) -> str:
        return base64.b64encode(png).decode()

    if isinstance(made, dict):
        arrays = {name: np.asarray(made[name], float) for name in ("text_embed", "candidates", "cosines")}
        return made | {
            **{name: array.round(5).tolist() for name, array in arrays.items()},
            "path": [text(png_bytes(image)) for image in made["path"]],
            "stages": {name: text(png_bytes(image)) for name, image in made["stages"].items()},
        }
    pictures = [{"png": text(each.png), "settings": each.settings, "command": each.command} for each in made]
    return {"pictures": pictures, "notes": notes}


def app(studio: Studio, host: str = ""):
    """The ASGI application; `host`: the address that serves it."""
    import gradio
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse
    from starlette.concurrency import run_in_threadpool

    served = FastAPI(title="dalle2_jax studio", docs_url=None, redoc_url=None, openapi_url=None)

    def refuse(status: int, why: str):
        return JSONResponse({"error": why}, status)

    async def body_of(request) -> bytes:
        data = io.BytesIO()
        async for part in request.stream():
            if data.tell() + len(part) > MAX_BODY:
                raise Refused(f"the request is larger than {MAX_BODY >> 20} MiB: send smaller pictures")
            data.write(part)
        return data.getvalue()

    async def guard(request: Request, call_next):
        # Pictures come inside requests: no file is left here, or read by its name.
        closed = tuple(f"/gradio_api/{name}" for name in ("upload", "file", "stream", "proxy"))
        if request.url.path.startswith(closed):
            return refuse(403, "the studio keeps no files: send pictures inside requests, see /api")
        if host in LOOPBACK and request.url.hostname not in LOOPBACK:
            return refuse(403, f"this studio serves its own machine alone: open it as http://{host}")
        origin = request.headers.get("origin")
        if request.method == "POST" and origin and origin.partition("//")[2] != request.headers.get("host"):
            return refuse(403, "requests from pages of other sites are refused")
        return await call_next(request)

    served.middleware("http")(guard)

    @served.get("/api")
    def describe():
        fields = {
            action: {name: vars(field) for name, field in fields.items()}
            for action, fields in ACTIONS.items()
        }
        sizes = {name: model.image_size for name, model in studio.models.items()}
        return {"models": sizes, "actions": fields}

    @served.post("/api/{action}")
    async def act(action: str, request: Request):
        notes = []

        def tell(kind, *event):
            if kind == "note":
                notes.append(event[0])

        try:
            fields = json.loads(await body_of(request))
            made = await run_in_threadpool(studio.draw, action, fields, tell)
        except Full as error:
            return refuse(503, str(error))
        except Refused as error:
            return refuse(400, str(error))
        except (ValueError, RecursionError):
            return refuse(400, "the request is no JSON")
        return JSONResponse(_plain(made, notes))

    blocks, look = page.build(studio)
    return gradio.mount_gradio_app(served, blocks, "/", ssr_mode=False, footer_links=[], **look)


def serve(studio: Studio, host: str, port: int):
    """A uvicorn server of the studio; `run()` serves until it stops."""
    import uvicorn

    return uvicorn.Server(uvicorn.Config(app(studio, host), host=host, port=port, log_level="warning"))
