"""The studio's page: gathers a request, and shows the answer of `work.Studio`."""

import functools
import queue
import threading
import time

from dalle2_jax.edit.actions import PATHS
from dalle2_jax.generate.pictures import square_picture
from dalle2_jax.generate.pipeline import Pipeline
from dalle2_jax.generate.settings import defaults
from dalle2_jax.runtime.grid import png_bytes
from dalle2_jax.studio import html
from dalle2_jax.studio.html import Visit, cards, details, history, note
from dalle2_jax.studio.requests import ACTIONS, MAX_PICTURES, SAMPLING, Refused, read_upload, too_large
from dalle2_jax.studio.work import Picture, Stopped, Studio

MAX_HISTORY = 48  # pictures that a visit keeps
MIX_FRAMES = 5
NAMES = {
    "text": "reading",
    "prior": "imagining",
    "decoder": "sketching",
    "inversion": "looking at the picture",
}
# tab -> (action, text and id of its button)
TABS = {
    "More like it": ("variations", "Vary", "vary"),
    "Brush": ("inpaint", "Draw it anew", "inpaint"),
    "Extend": ("outpaint", "Draw around it", "outpaint"),
    "Change by text": ("textdiff", "Change", "textdiff"),
    "Mix": ("interpolate", "Mix with the chosen one", "mix"),
    "Start from it": ("image_to_image", "Draw", "start"),
    "Enlarge": ("upscale", "Enlarge", "upscale"),
}
HINTS = {
    "inpaint": "Paint over what shall be drawn anew, and say what the whole picture shows.",
    "interpolate": "Choose one picture, keep it as the first, then choose another.",
}
LABELS = {
    "caption": "The whole picture shows",
    "source": "From",
    "target": "To",
    "eta": "How much is left to chance",
    "strength": "How far from the picture (1: all is new)",
    "scale": "Share of the side that the picture takes",
    "theta": "How far",
    "frames": "Pictures on the way",
}


def _events(studio: Studio, action: str, request: dict):
    """The events of `Studio.draw`, and last ('done', what it returned) or ('error', text)."""
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

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            event = events.get()
            yield event
            if event[0] in ("done", "error"):
                return
    finally:
        gone.set()


def progress_of(studio: Studio, name: str, step: str, done: int, total: int, spent: float):
    """(the seconds left as text, the share that is done) of drawing with a model; '' and None: unknown.

    By the seconds that steps took before, if they ran; else by the share.
    """
    steps = [step.name for step in studio.models[name].steps("draw")]
    if step not in steps:
        return "", None
    place, seconds = steps.index(step), studio.seconds
    share, after = (place + done / total) / len(steps), steps[place + 1 :]
    left = spent / share * (1 - share)
    if all((name, later) in seconds for later in after):
        left = seconds[name, step] * (total - done) + sum(seconds[name, later] * total for later in after)
    return f", about {left:.0f} s left", share


def add(visit: Visit, pictures: list[Picture]) -> tuple[Visit, Visit]:
    """(visit with new pictures, these); a visit keeps MAX_HISTORY."""
    first = max(map(int, visit), default=0) + 1
    new = {f"{first + i}": picture for i, picture in enumerate(pictures)}
    return dict([*visit.items(), *new.items()][-MAX_HISTORY:]), new


def answer(studio: Studio, action: str, fields, visit: Visit, *values):
    """Yields dicts of changed outputs as an action goes on: status, shown, history, visit.

    fields, values: of a click's components; chosen pictures are ids of the visit.
    """
    request = dict(zip(fields, values, strict=True))
    ids = {name: request[name] for name in ("picture", "first", "second") if name in request}
    if not all(id in visit for id in ids.values()):
        yield {"status": note("first choose a picture: click on one", bad=True)}
        return
    if request.get("mask") == "":
        yield {"status": note("first paint over what shall be drawn anew", bad=True)}
        return
    request |= {name: visit[id].png for name, id in ids.items()}
    began, notes = time.monotonic(), ""
    yield {"status": note("starting")}
    for kind, *event in _events(studio, action, request):
        seconds = time.monotonic() - began
        if kind == "waiting":
            yield {"status": note(f"{event[0]} before you")}
        elif kind == "stage":
            step, done, total, _ = event
            name = request.get("model") or next(iter(studio.models))
            left, share = progress_of(studio, name, step, done, total, seconds)
            text = f"{NAMES.get(step, 'sharpening')}: {done} of {total}{left}"
            yield {"status": note(text, share=share)}
        elif kind == "pictures":
            yield {"shown": html.sketch(event[1])}
        elif kind == "note":
            notes += f". Note: {event[0]}"
        elif kind == "error":
            yield {"status": note(event[0], bad=True)}
        elif action == "explain":
            yield {"status": note(f"explained in {seconds:.1f} s"), "shown": html.explained(event[0])}
        else:
            visit, new = add(visit, event[0])
            shown = (html.way(event[0]) if action in PATHS else "") + cards(new)
            done = f"done in {seconds:.1f} s: click on a picture to change it{notes}"
            yield {"status": note(done), "shown": shown, "history": history(visit), "visit": visit}


def _settings(gr, model: Pipeline) -> dict:
    """Fields of `create` besides the caption -> components."""
    made = {"n": gr.Slider(1, MAX_PICTURES, 4, step=1, label="How many pictures", elem_id="n")}
    made["seed"] = gr.Number(0, label="Seed: the same one gives the same pictures", precision=0)
    values = defaults(model.engine, model.steps("draw"))
    scale = values.pop("guidance_scale", 1)
    label = "Guidance: how closely to follow the words"
    made["guidance_scale"] = gr.Slider(0, 20, scale, step=0.5, label=label)
    for name, field in SAMPLING.items():
        if name not in values:
            continue
        label = f"{field.help.removesuffix('.')} (empty: the model's)"
        if field.kind == "choice":
            made[name] = gr.Dropdown([("the model's", ""), *field.choices], value="", label=label)
        else:  # a gr.Number without a value becomes 0 as soon as it is shown; a text stays empty
            made[name] = gr.Textbox("", label=label, placeholder="the model's", max_lines=1)
    return made


def _create(gr, studio: Studio) -> tuple[dict, dict]:
    """(field -> component, action -> button) of the column that draws captions."""
    names = list(studio.models)
    example = "a red star above a blue ring" if studio.folders[names[0]] is None else ""
    fields = {"caption": gr.Textbox(example, label="What shall be drawn?", lines=2, elem_id="caption")}
    buttons = {"create": gr.Button("Draw", variant="primary", elem_id="draw")}
    label = "Model (and its kind of prior)"
    fields["model"] = gr.Dropdown(names, value=names[0], label=label, visible=len(names) > 1)
    with gr.Accordion("Settings", open=False):
        fields |= _settings(gr, studio.models[names[0]])
    buttons["explain"] = gr.Button("Explain how it is drawn", elem_id="explain")
    gr.HTML(
        "<label class=link>Upload a picture of your own"
        "<input id=file type=file accept='image/png,image/jpeg,image/webp' style='display:none' "
        "onchange='studio.file(this)'></label>"
    )
    return fields, buttons


def _edits(gr, chosen, second, painted) -> tuple[dict[str, tuple], tuple]:
    """(action -> (button, field -> component) of the tabs that change a picture, (keep, its picture))."""
    made, states = {}, {"picture": chosen, "first": second, "second": chosen}
    keep: tuple = ()
    for tab, (action, text, id) in TABS.items():
        with gr.Tab(tab):
            if action in HINTS:
                gr.Markdown(HINTS[action])
            if action == "interpolate":
                button = gr.Button("Keep the chosen one as the first", elem_id="keep")
                keep = button, gr.HTML("", elem_id="kept")
            fields = {name: state for name, state in states.items() if name in ACTIONS[action]}
            for name, label in LABELS.items():
                field = ACTIONS[action].get(name)
                if field is None:
                    continue
                if field.kind == "text":
                    fields[name] = gr.Textbox(label=label, elem_id=f"{id}_{name}")
                else:
                    value = MIX_FRAMES if action == "interpolate" else field.default
                    step = 1 if field.kind == "int" else 0.05
                    fields[name] = gr.Slider(field.low, field.high, value, step=step, label=label)
            fields |= {"mask": painted} if action == "inpaint" else {}  # the last: see `build`
            made[action] = gr.Button(text, variant="primary", elem_id=id), fields
    return made, keep


def choose_one(visit: Visit, id):
    """Yields the outputs of a click on the picture `id`."""
    id = id if isinstance(id, str) and id in visit else ""
    brush, about = details(visit, id)
    yield {"chosen": id, "brush": brush, "about": about, "history": history(visit, id)}


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
    yield {"status": status, "shown": cards(new, id), "visit": visit}
    yield from choose_one(visit, id)


def keep_one(visit: Visit, id):
    """Yields the outputs when a picture is kept as the first of a mix."""
    if id in visit:
        yield {"second": id, "kept": html.img(visit[id], "width=96")}
    else:
        yield {"second": "", "kept": note("first choose a picture: click on one", bad=True)}


def zip_all(visit: Visit):
    """Yields a link to the archive of a visit."""
    yield {"link": html.archive(visit)}


def build(studio: Studio):
    """(gradio Blocks of the page, keywords of how it looks)."""
    import gradio as gr

    name, model = next(iter(studio.models.items()))
    with gr.Blocks(title="dalle2_jax studio", analytics_enabled=False, fill_width=True) as blocks:
        visit, chosen, second = gr.State({}), gr.State(""), gr.State("")
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
        link, past = gr.HTML("", elem_id="archive"), gr.HTML("", elem_id="history")
        with gr.Row(elem_classes="hidden", visible="hidden"):
            choose = gr.Button(elem_id="choose", visible="hidden")
            take = gr.Button(elem_id="take", visible="hidden")

        outputs = dict(status=status, shown=shown, history=past, visit=visit, chosen=chosen, link=link)
        outputs |= dict(brush=brush, about=about, second=second, kept=kept_one)

        def on(button, function, inputs, changes: str, js=None):
            """Run function(*inputs) on a click. It yields dicts of outputs, by names in `changes`."""

            def changed(*values):
                for made in function(*values):
                    yield {outputs[name]: value for name, value in made.items()}

            components = [outputs[name] for name in changes.split()]
            how = dict(concurrency_limit=None, api_visibility="private", show_progress="hidden")
            button.click(changed, inputs, components, js=js, **how)

        def on_action(button, action: str, fields, js=None):
            function = functools.partial(answer, studio, action, fields)
            on(button, function, [visit, *fields.values()], "status shown history visit", js)

        on_action(buttons["create"], "create", fields)
        on_action(buttons["explain"], "explain", {k: v for k, v in fields.items() if k != "n"})
        common = {"seed": fields["seed"], "num_steps": fields["decoder_steps"], "n": fields["n"]}
        for action, (button, of_tab) in edits.items():
            taken = {k: v for k, v in common.items() if k in ACTIONS[action]}
            # The script replaces the last value by the strokes of the brush.
            js = "(...all) => { all[all.length - 1] = window.studio.mask(); return all; }"
            taken |= {"model": fields["model"]} | of_tab
            on_action(button, action, taken, js if "mask" in of_tab else None)
        js = "(v, p) => [v, studio.chosen]"
        on(choose, choose_one, [visit, passed], "chosen brush about history", js)
        changes, js = "status shown history visit chosen brush about", "(v, p) => [v, studio.upload]"
        on(take, functools.partial(take_one, model.image_size), [visit, passed], changes, js)
        on(keep, keep_one, [visit, chosen], "second kept")
        on(zipped, zip_all, [visit], "link")
    blocks.queue(default_concurrency_limit=None, max_size=64)
    return blocks, dict(css=html.CSS, head=html.HEAD, show_error=False)
