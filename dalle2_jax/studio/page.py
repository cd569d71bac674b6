"""The studio's page: gathers a request, and shows the answer of `work.Studio`."""

import queue
import threading
import time

from dalle2_jax.generate import pictures
from dalle2_jax.generate.settings import defaults
from dalle2_jax.runtime.grid import png_bytes
from dalle2_jax.studio import html
from dalle2_jax.studio.html import cards, details, note
from dalle2_jax.studio.requests import ACTIONS, MAX_PICTURES, SAMPLING, Refused, read_upload, too_large
from dalle2_jax.studio.work import Picture, Stopped, Studio, as_url

MAX_HISTORY = 48  # pictures that a visit keeps
NAMES = {
    "text": "reading",
    "prior": "imagining",
    "decoder": "sketching",
    "inversion": "looking at the picture",
}


def _events(studio: Studio, action: str, request: dict):
    """What `Studio.draw` tells, as it tells it, and last ('done', what it returned) or ('error', text)."""
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
        except Exception as error:  # shown to who asked, and the server goes on
            events.put(("error", f"something went wrong: {type(error).__name__}"))
            raise

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            event = events.get()
            yield event
            if event[0] in ("done", "error"):
                return
    finally:
        gone.set()


def time_left(
    studio: Studio, name: str, at: tuple[str, int, int], spent: float
) -> tuple[float | None, float | None]:
    """(share that is done, seconds that are left) of drawing with a model, None if unknown.

    By the seconds that steps took before, if they ran; else by the share. at: (step, pictures done, in all).
    """
    stage, done, total = at
    stages = [step.name for step in studio.models[name].steps("draw")]
    if stage not in stages:
        return None, None
    place, known = stages.index(stage), studio.seconds
    share = (place + done / total) / len(stages)
    after = stages[place + 1 :]
    if all((name, later) in known for later in after):
        left = known[name, stage] * (total - done) + sum(known[name, later] * total for later in after)
    else:
        left = spent / share * (1 - share)
    return share, left


def next_id(visit: list) -> int:
    """The number of the next picture of a visit."""
    return int(visit[-1][0]) + 1 if visit else 1


def draw(studio: Studio, action: str, visit: list, request: dict):
    """Yields (status, pictures, history, visit) as an action goes on; None for what stays as it is."""
    kept, began, notes = list(visit), time.monotonic(), ""
    yield note("starting"), None, None, None
    for kind, *said in _events(studio, action, request):
        if kind == "waiting":
            yield note(f"{said[0]} before you"), None, None, None
        elif kind == "stage":
            name = request.get("model") or next(iter(studio.models))
            share, left = time_left(studio, name, tuple(said[:3]), time.monotonic() - began)
            left = "" if left is None else f", about {left:.0f} s left"
            text = f"{NAMES.get(said[0], 'sharpening')}: {said[1]} of {said[2]}{left}"
            yield note(text, share=share), None, None, None
        elif kind == "pictures":
            yield None, html.sketch(said[1]), None, None
        elif kind == "note":
            notes += f". Note: {said[0]}"
        elif kind == "error":
            yield note(said[0], bad=True), None, None, None
        elif action == "explain":
            text = note(f"explained in {time.monotonic() - began:.1f} s")
            yield text, html.explained(said[0]), None, None
        else:
            new = [(f"{next_id(kept) + i}", each) for i, each in enumerate(said[0])]
            kept = [*kept, *new][-MAX_HISTORY:]
            shown = cards(new)
            if action in ("textdiff", "interpolate"):
                shown = html.way(said[0]) + shown
            done = f"done in {time.monotonic() - began:.1f} s: click on a picture to change it{notes}"
            yield note(done), shown, cards(kept[::-1], small=True), kept


def answer(studio: Studio, action: str, fields, visit: list, values):
    """`draw` with the values of a click's components, in which chosen pictures are ids of the visit."""
    request, by_id = dict(zip(fields, values, strict=True)), dict(visit)
    for name in ("picture", "first", "second"):
        if name in request:
            if request[name] not in by_id:
                yield note("first choose a picture: click on one", bad=True), None, None, None
                return
            request[name] = by_id[request[name]].png
    if request.get("mask") == "":
        yield note("first paint over what shall be drawn anew", bad=True), None, None, None
        return
    yield from draw(studio, action, visit, request)


def _settings(gr, studio: Studio) -> dict:
    """Components of what a request of `create` has besides its caption: field -> component."""
    model = next(iter(studio.models.values()))
    made = {"n": gr.Slider(1, MAX_PICTURES, 4, step=1, label="How many pictures", elem_id="n")}
    made["seed"] = gr.Number(0, label="Seed: the same one gives the same pictures", precision=0)
    own = defaults(model.engine, model.steps("draw"))
    scale = own.pop("guidance_scale", 1)
    label = "Guidance: how closely to follow the words"
    made["guidance_scale"] = gr.Slider(0, 20, scale, step=0.5, label=label)
    for name in [name for name in own if name in SAMPLING]:
        field = SAMPLING[name]
        label = f"{field.help.removesuffix('.')} (empty: the model's)"
        if field.kind == "choice":
            made[name] = gr.Dropdown([("the model's", ""), *field.choices], value="", label=label)
        else:  # a gr.Number without a value becomes 0 as soon as it is shown; a text stays empty
            made[name] = gr.Textbox("", label=label, placeholder="the model's", max_lines=1)
    return made


def _create(gr, studio: Studio) -> tuple[dict, dict]:
    """(field -> component of a request, name -> button) of the column that draws captions."""
    names = list(studio.models)
    example = "a red star above a blue ring" if studio.folders[names[0]] is None else ""
    fields = {"caption": gr.Textbox(example, label="What shall be drawn?", lines=2, elem_id="caption")}
    buttons = {"create": gr.Button("Draw", variant="primary", elem_id="draw")}
    label = "Model (and its kind of prior)"
    fields["model"] = gr.Dropdown(names, value=names[0], label=label, visible=len(names) > 1)
    with gr.Accordion("Settings", open=False):
        fields |= _settings(gr, studio)
    buttons["explain"] = gr.Button("Explain how it is drawn", elem_id="explain")
    gr.HTML(
        "<label class=link>Upload a picture of your own"
        "<input id=file type=file accept='image/png,image/jpeg,image/webp' style='display:none' "
        "onchange='studio.file(this)'></label>"
    )
    return fields, buttons


def _edits(gr, chosen, second, painted) -> tuple[dict[str, tuple], tuple]:
    """(action -> (button, field -> component) of the tabs that change a picture, (keep, its picture))."""

    def button(text, id):
        return gr.Button(text, variant="primary", elem_id=id)

    made, picture = {}, {"picture": chosen}
    with gr.Tab("More like it"):
        eta = gr.Slider(0, 1, 1, step=0.05, label="How much is left to chance")
        far = gr.Slider(0.05, 1, 1, step=0.05, label="How far from the picture (1: all is new)")
        made["variations"] = button("Vary", "vary"), picture | {"eta": eta, "strength": far}
    with gr.Tab("Brush"):
        gr.Markdown("Paint over what shall be drawn anew, and say what the whole picture shows.")
        text = gr.Textbox(label="The whole picture shows", elem_id="brush_text")
        made["inpaint"] = button("Draw it anew", "inpaint"), picture | {"caption": text, "mask": painted}
    with gr.Tab("Extend"):
        text = gr.Textbox(label="The whole picture shows", elem_id="out_text")
        share = gr.Slider(0.2, 0.9, 0.5, step=0.05, label="Share of the side that the picture takes")
        made["outpaint"] = button("Draw around it", "outpaint"), picture | {"caption": text, "scale": share}
    with gr.Tab("Change by text"):
        words = {"source": gr.Textbox(label="From", elem_id="source")}
        words["target"] = gr.Textbox(label="To", elem_id="target")
        words["theta"] = gr.Slider(0.05, 1, 0.5, step=0.05, label="How far")
        made["textdiff"] = button("Change", "textdiff"), picture | words
    with gr.Tab("Mix"):
        gr.Markdown("Choose one picture, keep it as the first, then choose another.")
        keep = gr.Button("Keep the chosen one as the first", elem_id="keep")
        kept_one = gr.HTML("", elem_id="kept")
        frames = gr.Slider(2, MAX_PICTURES + 1, 5, step=1, label="Pictures on the way")
        ends = {"first": second, "second": chosen, "frames": frames}
        made["interpolate"] = button("Mix with the chosen one", "mix"), ends
    with gr.Tab("Start from it"):
        text = gr.Textbox(label="What shall be drawn", elem_id="start_text")
        strength = gr.Slider(0.05, 1, 0.7, step=0.05, label="How far from the picture")
        made["image_to_image"] = button("Draw", "start"), picture | {"caption": text, "strength": strength}
    with gr.Tab("Enlarge"):
        made["upscale"] = button("Enlarge", "upscale"), picture
    return made, (keep, kept_one)


def choose_one(visit: list, id) -> tuple:
    """(id, brush, settings, history) when the picture `id` was clicked on."""
    by_id = dict(visit)
    id = id if isinstance(id, str) and id in by_id else ""
    return id, *details(by_id, id), cards(visit[::-1], id, small=True)


def take_one(visit: list, data, size: int) -> tuple | str:
    """(status, pictures, history, visit, id, brush, settings) of an upload, made square of a side; or the
    status of one that is refused."""
    try:
        if data == "unreadable":
            raise Refused("the browser cannot read this file: choose it again")
        large, _, length = str(data).partition(" ")
        if large == "large" and length.isdecimal():
            raise Refused(too_large(int(length)))
        square = pictures.square_picture(read_upload(data), size)
    except Refused as error:
        return note(str(error), bad=True)
    id = str(next_id(visit))
    visit = [*visit, (id, Picture(png_bytes(square), "uploaded", {}, ""))][-MAX_HISTORY:]
    text = note("uploaded and chosen: change it below")
    shown, history = cards(visit[-1:], id), cards(visit[::-1], id, small=True)
    return text, shown, history, visit, id, *details(dict(visit), id)


def keep_one(visit: list, id) -> tuple[str, str]:
    """(id, its picture) of the first picture of a mix."""
    by_id = dict(visit)
    if id not in by_id:
        return "", note("first choose a picture: click on one", bad=True)
    return id, f"<img width=96 src='{as_url(by_id[id].png)}'>"


def build(studio: Studio):
    """(gradio Blocks of the page, keywords of how it looks)."""
    import gradio as gr

    name, model = next(iter(studio.models.items()))
    with gr.Blocks(title="dalle2_jax studio", analytics_enabled=False, fill_width=True) as blocks:
        visit, chosen, second = gr.State([]), gr.State(""), gr.State("")
        gr.Markdown(f"# Studio\nSay what to draw, then change what you get. Model: **{name}**")
        with gr.Row():
            with gr.Column(scale=2):
                fields, buttons = _create(gr, studio)
            with gr.Column(scale=3):
                status = gr.HTML(note("Ready. The first pictures take a little longer."), elem_id="status")
                shown = gr.HTML("", elem_id="shown")
        gr.Markdown("## Change a picture")
        passed = gr.Textbox(visible="hidden")
        with gr.Row():
            with gr.Column(scale=2):
                brush = gr.HTML(details({}, "")[0], elem_id="chosen")
                about = gr.HTML("", elem_id="about")
            with gr.Column(scale=3), gr.Tabs():
                edits, (keep, kept_one) = _edits(gr, chosen, second, passed)
        gr.Markdown("## This visit")
        zipped = gr.Button("All pictures as one archive", elem_id="zip", size="sm")
        link, history = gr.HTML("", elem_id="archive"), gr.HTML("", elem_id="history")
        with gr.Row(elem_classes="hidden", visible="hidden"):
            choose = gr.Button(elem_id="choose", visible="hidden")
            take = gr.Button(elem_id="take", visible="hidden")

        quick = dict(concurrency_limit=None, api_visibility="private", show_progress="hidden")
        outputs = [status, shown, history, visit]

        def on(button, action, fields, js=None):
            """Runs `action` on a click; fields: name of the request -> component or state."""

            def answered(now, *values):
                for parts in answer(studio, action, fields, now, values):
                    yield tuple(gr.skip() if part is None else part for part in parts)

            button.click(answered, [visit, *fields.values()], outputs, js=js, **quick)

        on(buttons["create"], "create", fields)
        on(buttons["explain"], "explain", {k: v for k, v in fields.items() if k != "n"})
        for action, (button, own) in edits.items():
            of_all = {"seed": fields["seed"], "num_steps": fields["decoder_steps"], "n": fields["n"]}
            taken = {k: v for k, v in of_all.items() if k in ACTIONS[action]}
            # The script replaces the last value by what was painted.
            js = "(...all) => { all[all.length - 1] = window.studio.mask(); return all; }"
            on(button, action, taken | {"model": fields["model"]} | own, js if "mask" in own else None)

        js = "(v, p) => [v, studio.chosen]"
        choose.click(choose_one, [visit, passed], [chosen, brush, about, history], js=js, **quick)

        def taken_one(now, data):
            made = take_one(now, data, model.image_size)
            return made if isinstance(made, tuple) else (made, *[gr.skip()] * 6)

        js = "(v, p) => [v, studio.upload]"
        take.click(taken_one, [visit, passed], [*outputs, chosen, brush, about], js=js, **quick)
        keep.click(keep_one, [visit, chosen], [second, kept_one], **quick)

        def archived(now):
            url = html.archive(now)
            return f"<a class=link id=zip_link href='{url}' download='pictures.zip'>pictures.zip</a>"

        zipped.click(archived, visit, link, **quick)
    blocks.queue(default_concurrency_limit=None, max_size=64)
    return blocks, dict(css=html.CSS, head=html.HEAD, show_error=False)
