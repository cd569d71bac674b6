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
    """What `Studio.draw` returned and told, as JSON values."""
    if isinstance(made, dict):
        encode = base64.b64encode
        return made | {
            **{
                name: np.asarray(made[name], float).round(5).tolist()
                for name in ("text_embed", "candidates", "cosines")
            },
            "path": [encode(png_bytes(image)).decode() for image in made["path"]],
            "stages": {name: encode(png_bytes(image)).decode() for name, image in made["stages"].items()},
        }
    return {
        "pictures": [
            {"png": base64.b64encode(each.png).decode(), "settings": each.settings, "command": each.command}
            for each in made
        ],
        "notes": notes,
    }


def app(studio: Studio, host: str = ""):
    """The ASGI application; `host` is the address it is served at."""
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
        # Pictures come inside requests: nobody leaves files here, or asks for any by name.
        path = request.url.path
        if path.startswith(
            ("/gradio_api/upload", "/gradio_api/file", "/gradio_api/stream", "/gradio_api/proxy")
        ):
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
            action: {name: {k: v for k, v in vars(field).items()} for name, field in fields.items()}
            for action, fields in ACTIONS.items()
        }
        sizes = {name: model.image_size for name, model in studio.models.items()}
        return {"models": sizes, "actions": fields}

    @served.post("/api/{action}")
    async def act(action: str, request: Request):
        notes = []

        def tell(kind, *said):
            if kind == "note":
                notes.append(said[0])

        try:
            data = await body_of(request)
            asked = json.loads(data)
            made = await run_in_threadpool(studio.draw, action, asked, tell)
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
    """A uvicorn server of the studio; `run()` serves until it is stopped."""
    import uvicorn

    return uvicorn.Server(uvicorn.Config(app(studio, host), host=host, port=port, log_level="warning"))
