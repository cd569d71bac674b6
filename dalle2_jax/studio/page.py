"""The studio's page: gathers a request, and shows the answer of `work.Studio`."""

import dataclasses
import functools
import queue
import secrets
import threading
import time

from dalle2_jax.edit.actions import PATHS
from dalle2_jax.generate.pictures import square_picture
from dalle2_jax.runtime.grid import png_bytes
from dalle2_jax.studio import controls, html
from dalle2_jax.studio.controls import CAPTIONS
from dalle2_jax.studio.html import Visit, cards, details, history, note
from dalle2_jax.studio.requests import ACTIONS, Refused, read_upload, too_large
from dalle2_jax.studio.subjects import welcome
from dalle2_jax.studio.work import Picture, Stopped, Studio

MAX_HISTORY = 48  # pictures that a visit keeps
PATIENCE = 1  # seconds without an event, after which the page looks whether programs are compiled
NAMES = {
    "text": "reading the caption",
    "prior": "imagining the picture",
    "decoder": "drawing it small",
    "inversion": "looking at the picture",
}


def _events(studio: Studio, running: list, action: str, request: dict):
    """The events of `Studio.draw`, and last ('done', what it returned), ('error', text) or ('stopped',).

    ('still',) comes after PATIENCE seconds without another event. running: gets a function that stops the
    work at its next event. Closing the generator does the same, as gradio does when the browser leaves.
    """
    events: queue.Queue = queue.Queue()
    gone = threading.Event()

    def tell(*event):
        if gone.is_set():
            raise Stopped
        events.put(event)

    def work():
        try:
            events.put(("done", studio.draw(action, request, tell)))
        except Refused as error:
            events.put(("error", str(error)))
        except Stopped:
            pass
        except Exception as error:  # the page shows it, and the server goes on
            events.put(("error", f"something went wrong: {type(error).__name__}"))
            raise

    def stop():
        gone.set()
        events.put(("stopped",))

    running.append(stop)
    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            try:
                event = events.get(timeout=PATIENCE)
            except queue.Empty:
                event = ("still",)
            yield event
            if event[0] in ("done", "error", "stopped"):
                return
    finally:
        gone.set()
        running.remove(stop)


def add(visit: Visit, pictures: list[Picture]) -> tuple[Visit, Visit]:
    """(visit with new pictures, these); a visit keeps MAX_HISTORY."""
    first = max(map(int, visit), default=0) + 1
    new = {f"{first + i}": picture for i, picture in enumerate(pictures)}
    return dict([*visit.items(), *new.items()][-MAX_HISTORY:]), new


def answer(studio: Studio, action: str, fields, running: list, visit: Visit, *values):
    """Yields dicts of changed outputs as an action goes on: status, seed, shown, history, ...

    fields, values: of a click's components; chosen pictures are ids of the visit. running: see `_events`.
    """
    request = dict(zip(fields, values, strict=True))
    ids = {name: request[name] for name in ("picture", "first", "second") if name in request}
    if not all(id in visit for id in ids.values()):
        yield {"status": note("first choose a picture: click on one", bad=True)}
        return
    if request.get("mask") == "":
        yield {"status": note("first paint over what shall be drawn anew", bad=True)}
        return
    caption = request.get("caption") or request.get("target")
    if not caption and ids:
        caption = visit[list(ids.values())[-1]].caption
    request |= {name: visit[id].png for name, id in ids.items()}
    if not request.pop("fixed", True):
        request["seed"] = secrets.randbelow(2**32)
    name = request.get("model") or next(iter(studio.models))
    began, notes, waiting, status = time.monotonic(), "", False, note("starting", stop=True)
    yield {"status": status, "seed": request["seed"]}
    for kind, *event in _events(studio, running, action, request):
        seconds = time.monotonic() - began
        if kind in ("waiting", "stage"):
            waiting = kind == "waiting"
            status = note(f"{event[0]} before you", stop=True) if waiting else _stage(*event)
            yield {"status": status}
        elif kind == "still":
            compiling = note(f"compiling (once for these settings): {seconds:.0f} s", stop=True)
            yield {"status": compiling if studio.compiling(name) and not waiting else status}
        elif kind == "pictures":
            yield {"shown": html.sketch(event[1])}
        elif kind == "note":
            notes += f". Note: {event[0]}"
        elif kind == "error":
            yield {"status": note(event[0], bad=True)}
        elif kind == "stopped":
            yield {"status": note("stopped")}
        elif action == "explain":
            yield {"status": note(f"explained in {seconds:.1f} s"), "shown": html.explained(event[0])}
        else:
            made = [dataclasses.replace(picture, caption=caption or "") for picture in event[0]]
            if action in PATHS:
                shares = [f"{100 * i / (len(made) - 1):.0f} % of the way" for i in range(len(made))]
                made = [
                    dataclasses.replace(each, label=text) for each, text in zip(made, shares, strict=True)
                ]
            visit, new = add(visit, made)
            id = [*new][-1 if action in PATHS else 0]
            shown = (html.way(made) if action in PATHS else "") + cards(new, id)
            done = f"done in {seconds:.1f} s: click on a picture to change it{notes}"
            yield {"status": note(done), "shown": shown} | _chosen(visit, id, keep=action == "inpaint")


def _stage(step: str, done: int, total: int, share: float | None, left: float | None) -> str:
    """The status after a part of a step."""
    text = f"{NAMES.get(step, 'enlarging')}: {done} of {total}"
    return note(text if left is None else f"{text}, about {left:.0f} s left", share=share, stop=True)


def _chosen(visit: Visit, id: str, keep: bool = False) -> dict:
    """The outputs when a visit has new pictures, one of them chosen."""
    return {"visit": visit, "history": history(visit, id)} | next(choose_one(visit, id, keep))


def choose_one(visit: Visit, id, keep: bool = False):
    """Yields the outputs when the picture `id` is chosen; `keep`: the brush's strokes stay."""
    id = id if isinstance(id, str) and id in visit else ""
    brush, about = details(visit, id, keep)
    captions = dict.fromkeys(CAPTIONS, visit[id].caption) if id and visit[id].caption else {}
    yield {"chosen": id, "brush": brush, "about": about} | captions


def take_one(size: int, visit: Visit, data):
    """Yields the outputs of an upload, made square of a side."""
    try:
        if data == "unreadable":
            raise Refused("the browser cannot read this file: choose it again")
        large, _, length = str(data).partition(" ")
        if large == "large" and length.isdecimal():
            raise Refused(too_large(int(length)))
        square = square_picture(read_upload(data), size)
    except Refused as error:
        yield {"status": note(str(error), bad=True)}
        return
    visit, new = add(visit, [Picture(png_bytes(square), "uploaded", {}, "")])
    status, id = note("uploaded and chosen: change it below"), next(iter(new))
    yield {"status": status, "shown": cards(new, id)} | _chosen(visit, id)


def keep_one(visit: Visit, id):
    """Yields the outputs when a picture is kept as the first of a mix."""
    if id in visit:
        yield {"second": id, "kept": html.img(visit[id], "width=96")}
    else:
        yield {"second": "", "kept": note("first choose a picture: click on one", bad=True)}


def stop_all(running: list) -> None:
    """Stops all work of a visit."""
    for stop in list(running):
        stop()


def zip_all(visit: Visit):
    """Yields a link to the archive of a visit."""
    yield {"link": html.archive(visit)}


def build(studio: Studio):
    """(gradio Blocks of the page, keywords of how it looks)."""
    import gradio as gr

    model = next(iter(studio.models.values()))
    with gr.Blocks(title="dalle2_jax studio", analytics_enabled=False, fill_width=True) as blocks:
        visit, chosen, second, running = gr.State({}), gr.State(""), gr.State(""), gr.State([])
        gr.Markdown(welcome(studio.models))
        with gr.Row():
            with gr.Column(scale=2):
                fields, buttons = controls.create(gr, studio)
            with gr.Column(scale=3):
                ready = "Ready. The first pictures take longer: their programs are compiled once."
                status = gr.HTML(note(ready), elem_id="status")
                shown = gr.HTML("", elem_id="shown")
        gr.Markdown("## Change a picture")
        passed = gr.Textbox(visible="hidden")
        with gr.Row():
            with gr.Column(scale=2):
                brush = gr.HTML(details({}, "")[0], elem_id="chosen")
                about = gr.HTML("", elem_id="about")
            with gr.Column(scale=3), gr.Tabs():
                edits, keep = controls.edits(gr, studio, chosen, second, passed)
        gr.Markdown("## This visit")
        zipped = gr.Button("All pictures as one archive", elem_id="zip", size="sm")
        link, past = gr.HTML("", elem_id="archive"), gr.HTML("", elem_id="history")
        with gr.Row(elem_classes="hidden", visible="hidden"):
            choose = gr.Button(elem_id="choose", visible="hidden")
            take = gr.Button(elem_id="take", visible="hidden")
            stop = gr.Button(elem_id="stop", visible="hidden")
        gr.HTML("<a class=link href='/api'>The actions and their fields, for programs (JSON)</a>")

        outputs = dict(status=status, shown=shown, history=past, visit=visit, chosen=chosen, link=link)
        outputs |= dict(brush=brush, about=about, second=second, seed=fields["seed"])
        boxes = [box for _, of_tab in edits.values() for box in of_tab.values()]
        outputs |= {"kept": keep[1]} if keep else {}
        outputs |= {box.elem_id: box for box in boxes if box.elem_id in CAPTIONS}
        how = dict(concurrency_limit=None, api_visibility="private", show_progress="hidden")
        picking = f"chosen brush about {' '.join(CAPTIONS)}"

        def on(button, function, inputs, changes: str, js=None, boxes=()):
            """Run function(*inputs) on a click, or Enter in `boxes`; it yields dicts of `changes`."""
            names = [name for name in changes.split() if name in outputs]

            def changed(*values):
                for made in function(*values):
                    yield {outputs[name]: value for name, value in made.items() if name in names}

            triggers = [button.click, *(box.submit for box in boxes)]
            gr.on(triggers, changed, inputs, [outputs[name] for name in names], js=js, **how)

        def on_action(button, action: str, fields, js=None):
            function = functools.partial(answer, studio, action, fields)
            entered = () if action == "explain" else ("caption", "source", "target")
            boxes = [fields[name] for name in entered if name in fields]
            changes = f"status seed shown history visit {picking}"
            on(button, function, [running, visit, *fields.values()], changes, js, boxes)

        # Explaining takes the seed of the last pictures.
        of_explain = {k: v for k, v in fields.items() if k not in ("n", "fixed")}
        on_action(buttons["create"], "create", fields)
        on_action(buttons["explain"], "explain", of_explain)
        common = {"seed": fields["seed"], "num_steps": fields["decoder_steps"], "n": fields["n"]}
        for action, (button, of_tab) in edits.items():
            taken = {k: v for k, v in common.items() if k in ACTIONS[action]}
            # The script replaces the last value by the strokes of the brush.
            js = "(...all) => { all[all.length - 1] = window.studio.mask(); return all; }"
            taken |= {"fixed": fields["fixed"], "model": fields["model"]} | of_tab
            on_action(button, action, taken, js if "mask" in of_tab else None)
        stop.click(stop_all, running, None, **how)
        on(choose, choose_one, [visit, passed], picking, "(v, p) => [v, studio.chosen]")
        changes, js = f"status shown history visit {picking}", "(v, p) => [v, studio.upload]"
        on(take, functools.partial(take_one, model.image_size), [visit, passed], changes, js)
        if keep:
            on(keep[0], keep_one, [visit, chosen], "second kept")
        on(zipped, zip_all, [visit], "link")
    blocks.queue(default_concurrency_limit=None, max_size=64)
    return blocks, dict(css=html.CSS, head=html.HEAD, show_error=False)
