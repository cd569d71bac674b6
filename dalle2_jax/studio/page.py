"""The studio's page: what is asked for is gathered here, and what `work.Studio` answers is shown."""

import base64
import html
import io
import queue
import threading
import time
import zipfile

import numpy as np

from dalle2_jax.generate import pictures
from dalle2_jax.runtime.grid import png_bytes
from dalle2_jax.studio.work import (
    MAX_PICTURES,
    MAX_STEPS,
    MAX_UPLOAD,
    Picture,
    Refused,
    Stopped,
    Studio,
    as_url,
    read_upload,
    too_large,
)

MAX_HISTORY = 48  # pictures that a visit keeps
CSS = """
.gradio-container {max-width: 1240px !important; width: 100%; margin: auto}
.cards {display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 12px}
.cards.small {grid-template-columns: repeat(auto-fill, minmax(84px, 1fr)); gap: 8px}
.card {cursor: pointer; border: 3px solid #eceef6; border-radius: 10px; overflow: hidden}
.card:hover {border-color: #aab4f4} .card.chosen {border-color: #5b6af0}
.card img, .way img {width: 100%; display: block} .card a {font-size: 12px; padding: 2px 6px}
.note {padding: 8px 12px; border-radius: 8px; background: #eef0ff; color: #223}
.note.bad {background: #ffe9e6; color: #702014}
.bar {height: 5px; background: #d7dbf8; border-radius: 3px; margin-top: 6px}
.bar div {height: 5px; background: #5b6af0; border-radius: 3px}
.brush {position: relative; width: 300px; max-width: 100%} .brush img {width: 100%; display: block}
.brush canvas {position: absolute; inset: 0; width: 100%; height: 100%; opacity: .55; cursor: crosshair;
  touch-action: none}
.way {width: 320px; max-width: 100%} .way input {width: 100%}
.command {font: 12px monospace; white-space: pre-wrap; background: #f3f4f8; color: #223; padding: 8px}
.path {display: flex; flex-wrap: wrap; gap: 4px} .path img {width: 56px; image-rendering: pixelated}
.token {display: inline-block; background: #e4e7fd; color: #223; border-radius: 5px; padding: 1px 7px;
  margin: 2px}
.strip {width: 100%; height: 14px; image-rendering: pixelated; display: block; margin: 2px 0 8px}
.said {font-size: 13px} .said b {font-weight: 600}
.link {display: inline-block; margin: 4px 12px 4px 0; text-decoration: underline; cursor: pointer}
"""
# The brush, the choice of a picture, the slider along a path; files are read here and sent inside requests.
HEAD = """<script>
window.studio = {
  chosen: '', last: null,
  choose(id) { this.clear(); this.chosen = id; document.querySelector('#choose').click(); },
  paint(e) {
    if (e.type !== 'pointerdown' && !this.last) return;
    const c = e.target, r = c.getBoundingClientRect(), s = c.width / r.width, g = c.getContext('2d');
    const at = [(e.clientX - r.left) * s, (e.clientY - r.top) * s], from = this.last || at;
    g.strokeStyle = '#7a3cf0'; g.lineWidth = c.width / 6; g.lineCap = 'round';
    g.beginPath(); g.moveTo(...from); g.lineTo(...at); g.stroke();
    this.last = at;
  },
  clear() {
    const c = document.querySelector('#brush');
    if (c) c.getContext('2d').clearRect(0, 0, c.width, c.height);
  },
  mask() {
    const c = document.querySelector('#brush'); if (!c) return '';
    const painted = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
    if (!painted.some((x) => x)) return '';
    const m = document.createElement('canvas'); m.width = c.width; m.height = c.height;
    const g = m.getContext('2d'); g.drawImage(c, 0, 0);
    for (const [how, colour] of [['source-in', 'white'], ['destination-over', 'black']]) {
      g.globalCompositeOperation = how; g.fillStyle = colour; g.fillRect(0, 0, m.width, m.height);
    }
    return m.toDataURL('image/png');
  },
  frame(e) {
    const way = e.closest('.way');
    [...way.querySelectorAll('img')].forEach((m, i) => m.style.display = i == e.value ? 'block' : 'none');
  },
  copy(e) {
    const text = e.parentElement.querySelector('.command').textContent;
    const old = e.textContent, back = () => e.textContent = old;
    const done = () => { e.textContent = 'copied'; setTimeout(back, 1500); };
    if (navigator.clipboard) return navigator.clipboard.writeText(text).then(done);
    const box = document.createElement('textarea'); box.value = text; document.body.append(box);
    box.select(); document.execCommand('copy'); box.remove(); done();
  },
  file(input) {
    const f = input.files[0]; if (!f) return;
    const r = new FileReader(), send = (what) => {
      this.upload = what; document.querySelector('#take').click(); input.value = '';
    };
    if (f.size > LIMIT) return send('large ' + f.size);
    r.onload = () => send(r.result); r.onerror = () => send('unreadable');
    r.readAsDataURL(f);
  },
};
window.addEventListener('pointerup', () => window.studio.last = null);
</script>""".replace("LIMIT", str(MAX_UPLOAD))
NAMES = {
    "text": "reading",
    "prior": "imagining",
    "decoder": "sketching",
    "inversion": "looking at the picture",
}


def note(text: str, bad: bool = False, share: float | None = None) -> str:
    """A line that says how things are; `share` in 0..1 adds a bar."""
    bar = "" if share is None else f"<div class=bar><div style='width:{100 * share:.0f}%'></div></div>"
    return f"<div class='note{' bad' * bad}' role=status>{html.escape(text)}{bar}</div>"


def cards(visit: list[tuple[str, Picture]], chosen: str = "", small: bool = False) -> str:
    """Pictures to click on, each with its download."""
    return (
        f"<div class='cards{' small' * small}'>"
        + "".join(
            f"<div class='card{' chosen' * (id == chosen)}' data-id={id} title='{html.escape(each.caption)}'>"
            f"<img src='{as_url(each.png)}' alt='{html.escape(each.caption)}' "
            f"onclick=\"studio.choose('{id}')\">"
            f"<a href='{as_url(each.png)}' download='picture-{id}.png'>download</a></div>"
            for id, each in visit
        )
        + "</div>"
    )


def way(made: list[Picture]) -> str:
    """The frames of a path, with a slider between its ends."""
    shown = "".join(
        f"<img src='{as_url(each.png)}' alt='{html.escape(each.caption)}' "
        f"style='display:{'block' if not i else 'none'}'>"
        for i, each in enumerate(made)
    )
    slider = f"<input type=range min=0 max={len(made) - 1} value=0 oninput='studio.frame(this)'>"
    return f"<div class=way>{shown}{slider}</div>"


def sketch(images: np.ndarray) -> str:
    """Pictures of a stage that are not the last ones yet."""
    shown = "".join(f"<div class=card><img src='{as_url(png_bytes(image))}'></div>" for image in images)
    return f"<div class='cards sketch'>{shown}</div>"


def strip(embed: np.ndarray) -> str:
    """An embedding [E] as a row of colours: blue below zero, white, orange above."""
    share = np.clip(embed / (3 * embed.std() + 1e-9), -1, 1)[:, None]
    ends = np.where(share < 0, np.array([40, 90, 220]), np.array([240, 120, 20]))
    row = 255 - np.abs(share) * (255 - ends)
    return f"<img class=strip src='{as_url(png_bytes(row.round().astype(np.uint8)[None]))}'>"


def explained(made: dict) -> str:
    """What `UnCLIP.explain` found, as a page."""
    tokens = "".join(f"<span class=token>{html.escape(token)}</span>" for token in made["tokens"])
    prior = "".join(
        f"<div>sample {i + 1}: cosine with the text {cosine:.3f}"
        f"{', the closest: <b>kept</b>' * (i == made['kept'])}</div>{strip(made['candidates'][i])}"
        for i, cosine in enumerate(made["cosines"])
    )
    every = max(1, len(made["path"]) // 12)
    path = [*made["path"][:-1:every], made["path"][-1]]
    steps = "".join(f"<img src='{as_url(png_bytes(image))}'>" for image in path)
    sides = [len(image) for image in made["stages"].values()]
    stages = "".join(
        f"<div class=card><img src='{as_url(png_bytes(image))}' style='image-rendering:pixelated'>"
        f"{html.escape(name)}: {f'{sides[i - 1]} to ' if i else ''}{sides[i]} pixels</div>"
        for i, (name, image) in enumerate(made["stages"].items())
    )
    return (
        f"<div class=explained><h4>1. The caption as tokens</h4>{tokens}"
        f"<h4>2. CLIP makes one text embedding of them</h4>{strip(made['text_embed'])}"
        "<h4>3. The prior imagines image embeddings to go with it; the one closest to the text is kept</h4>"
        f"{prior}"
        f"<h4>4. The decoder takes noise away, step by step</h4><div class=path>{steps}</div>"
        f"<h4>5. Each upsampler makes what it is given larger</h4><div class=cards>{stages}</div></div>"
    )


def archive(visit: list[tuple[str, Picture]]) -> str:
    """All pictures of a visit as one zip file, an URL."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for id, each in visit:
            file.writestr(f"picture-{id}.png", each.png)
        file.writestr("commands.txt", "".join(f"{each.command}\n" for _, each in visit if each.command))
    return "data:application/zip;base64," + base64.b64encode(buffer.getvalue()).decode()


def details(visit: dict[str, Picture], chosen: str) -> tuple[str, str]:
    """(the chosen picture under the brush, its settings and its command)."""
    if chosen not in visit:
        return note("Draw or upload a picture, then click on it to change it."), ""
    each = visit[chosen]
    width, height = each.size
    brush = (
        f"<div class=brush data-id={chosen}><img src='{as_url(each.png)}'><canvas id=brush "
        f"width={width} height={height} onpointerdown='studio.paint(event)' "
        "onpointermove='studio.paint(event)'></canvas></div>"
        "<span class=link onclick='studio.clear()'>clear the brush</span>"
    )
    line = ""
    if each.command:
        line = (
            f"<div class=command>{html.escape(each.command)}</div>"
            "<span class=link onclick='studio.copy(this)'>copy the command</span>"
        )
    told = f"<b>{html.escape(each.caption)}</b><br>{spelled(each.settings)}{line}"
    return brush, f"<div class=said>{told}</div>"


def spelled(settings: dict) -> str:
    """The settings of a picture, as lines."""
    lines = []
    for name, value in settings.items():
        if name == "settings":
            lines += [
                f"{stage}: " + ", ".join(f"{key} {of}" for key, of in own.items() if of is not None)
                for stage, own in value.items()
            ]
        elif name == "asked":
            lines.append(", ".join(f"{key} {of}" for key, of in value.items() if key not in settings))
        elif name != "caption":
            lines.append(f"{name} {value}")
    return "".join(f"{html.escape(line)}<br>" for line in lines if line)


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


def build(studio: Studio):
    """(gradio Blocks of the page, keywords of how it looks)."""
    import gradio as gr

    names = list(studio.models)
    model = studio.models[names[0]]
    own = model.settings()

    def time_left(name, stage, done, total, spent):
        """(share that is done, seconds that are left): by how long the stages took before, if they ran."""
        stages = ["text", "prior", "decoder", *studio.models[name].cascade.upsamplers]
        if stage not in stages:
            return None, None
        at, known = stages.index(stage), studio.seconds
        share = (at + done / total) / len(stages)
        after = stages[at + 1 :]
        if all((name, later) in known for later in after):
            left = known[name, stage] * (total - done) + sum(known[name, later] * total for later in after)
        else:
            left = spent / share * (1 - share)
        return share, left

    def draw(action, visit, request):
        """Yields (status, pictures, history, visit, chosen id or None)."""
        kept, began, notes = list(visit), time.monotonic(), ""
        yield note("starting"), gr.skip(), gr.skip(), gr.skip()
        for kind, *said in _events(studio, action, request):
            if kind == "waiting":
                yield note(f"{said[0]} before you"), gr.skip(), gr.skip(), gr.skip()
            elif kind == "stage":
                stage, done, total, _ = said
                name = request.get("model") or names[0]
                share, left = time_left(name, stage, done, total, time.monotonic() - began)
                left = "" if left is None else f", about {left:.0f} s left"
                text = f"{NAMES.get(stage, 'sharpening')}: {done} of {total}{left}"
                yield note(text, share=share), gr.skip(), gr.skip(), gr.skip()
            elif kind == "pictures":
                yield gr.skip(), sketch(said[1]), gr.skip(), gr.skip()
            elif kind == "note":
                notes += f". Note: {said[0]}"
            elif kind == "error":
                yield note(said[0], bad=True), gr.skip(), gr.skip(), gr.skip()
            elif action == "explain":
                yield (
                    note(f"explained in {time.monotonic() - began:.1f} s"),
                    explained(said[0]),
                    gr.skip(),
                    gr.skip(),
                )
            else:
                new = [(f"{next_id(kept) + i}", each) for i, each in enumerate(said[0])]
                kept = [*kept, *new][-MAX_HISTORY:]
                shown = cards(new)
                if action in ("textdiff", "interpolate"):
                    shown = way(said[0]) + shown
                done = f"done in {time.monotonic() - began:.1f} s: click on a picture to change it{notes}"
                yield note(done), shown, cards(kept[::-1], small=True), kept

    def optional(label):
        """A number, or several, that may be left out: `work.check` reads them from the text."""
        # A gr.Number without a value becomes 0 as soon as it is shown; a text stays empty.
        return gr.Textbox("", label=label, placeholder="the model's", max_lines=1)

    def next_id(visit):
        return int(visit[-1][0]) + 1 if visit else 1

    with gr.Blocks(title="dalle2_jax studio", analytics_enabled=False, fill_width=True) as blocks:
        visit, chosen, second = gr.State([]), gr.State(""), gr.State("")
        gr.Markdown(f"# Studio\nSay what to draw, then change what you get. Model: **{names[0]}**")
        with gr.Row():
            with gr.Column(scale=2):
                example = "a red star above a blue ring" if studio.folders[names[0]] is None else ""
                caption = gr.Textbox(example, label="What shall be drawn?", lines=2, elem_id="caption")
                go = gr.Button("Draw", variant="primary", elem_id="draw")
                which = gr.Dropdown(
                    names, value=names[0], label="Model (and its kind of prior)", visible=len(names) > 1
                )
                with gr.Accordion("Settings", open=False):
                    n = gr.Slider(1, MAX_PICTURES, 4, step=1, label="How many pictures", elem_id="n")
                    seed = gr.Number(0, label="Seed: the same one gives the same pictures", precision=0)
                    scale = own["decoder"].get("guidance_scale", 1)
                    guidance = gr.Slider(
                        0, 20, scale, step=0.5, label="Guidance: how closely to follow the words"
                    )
                    steps = optional(f"Steps of the sketch (1 to {MAX_STEPS}; empty: the model's)")
                    prior_steps = optional("Steps of the prior (empty: the model's)")
                    upsampler_steps = optional("Steps of the upsamplers, such as 4,2 (empty: the model's)")
                    candidates = optional("Embeddings of the prior to choose from (empty: the model's)")
                explain = gr.Button("Explain how it is drawn", elem_id="explain")
                gr.HTML(
                    "<label class=link>Upload a picture of your own"
                    "<input id=file type=file accept='image/png,image/jpeg,image/webp' style='display:none' "
                    "onchange='studio.file(this)'></label>"
                )
            with gr.Column(scale=3):
                status = gr.HTML(note("Ready. The first pictures take a little longer."), elem_id="status")
                shown = gr.HTML("", elem_id="shown")
        gr.Markdown("## Change a picture")
        with gr.Row():
            with gr.Column(scale=2):
                brush = gr.HTML(details({}, "")[0], elem_id="chosen")
                about = gr.HTML("", elem_id="about")
            with gr.Column(scale=3), gr.Tabs():
                with gr.Tab("More like it"):
                    eta = gr.Slider(0, 1, 1, step=0.05, label="How much is left to chance")
                    far = gr.Slider(0.05, 1, 1, step=0.05, label="How far from the picture (1: all is new)")
                    vary = gr.Button("Vary", variant="primary", elem_id="vary")
                with gr.Tab("Brush"):
                    gr.Markdown("Paint over what shall be drawn anew, and say what the whole picture shows.")
                    brush_text = gr.Textbox(label="The whole picture shows", elem_id="brush_text")
                    inpaint = gr.Button("Draw it anew", variant="primary", elem_id="inpaint")
                with gr.Tab("Extend"):
                    out_text = gr.Textbox(label="The whole picture shows", elem_id="out_text")
                    share = gr.Slider(
                        0.2, 0.9, 0.5, step=0.05, label="Share of the side that the picture takes"
                    )
                    outpaint = gr.Button("Draw around it", variant="primary", elem_id="outpaint")
                with gr.Tab("Change by text"):
                    source = gr.Textbox(label="From", elem_id="source")
                    target = gr.Textbox(label="To", elem_id="target")
                    theta = gr.Slider(0.05, 1, 0.5, step=0.05, label="How far")
                    textdiff = gr.Button("Change", variant="primary", elem_id="textdiff")
                with gr.Tab("Mix"):
                    gr.Markdown("Choose one picture, keep it as the first, then choose another.")
                    keep = gr.Button("Keep the chosen one as the first", elem_id="keep")
                    kept_one = gr.HTML("", elem_id="kept")
                    frames = gr.Slider(2, MAX_PICTURES + 1, 5, step=1, label="Pictures on the way")
                    mix = gr.Button("Mix with the chosen one", variant="primary", elem_id="mix")
                with gr.Tab("Start from it"):
                    start_text = gr.Textbox(label="What shall be drawn", elem_id="start_text")
                    strength = gr.Slider(0.05, 1, 0.7, step=0.05, label="How far from the picture")
                    start = gr.Button("Draw", variant="primary", elem_id="start")
                with gr.Tab("Enlarge"):
                    upscale = gr.Button("Enlarge", variant="primary", elem_id="upscale")
        gr.Markdown("## This visit")
        zipped = gr.Button("All pictures as one archive", elem_id="zip", size="sm")
        link = gr.HTML("", elem_id="archive")
        history = gr.HTML("", elem_id="history")
        with gr.Row(elem_classes="hidden", visible="hidden"):
            passed = gr.Textbox(visible="hidden")
            choose = gr.Button(elem_id="choose", visible="hidden")
            take = gr.Button(elem_id="take", visible="hidden")

        outputs = [status, shown, history, visit]
        common = dict(
            outputs=outputs, concurrency_limit=None, api_visibility="private", show_progress="hidden"
        )

        def on(button, action, fields, js=None):
            """Runs `action` on a click; fields: name of the request -> component or state."""

            def asked(now, *values):
                request, by_id = dict(zip(fields, values, strict=True)), dict(now)
                for name in ("picture", "first", "second"):
                    if name in request:
                        if request[name] not in by_id:
                            yield note("first choose a picture: click on one", bad=True), *[gr.skip()] * 3
                            return
                        request[name] = by_id[request[name]].png
                if request.get("mask") == "":
                    yield note("first paint over what shall be drawn anew", bad=True), *[gr.skip()] * 3
                    return
                yield from draw(action, now, request)

            button.click(asked, [visit, *fields.values()], js=js, **common)

        first = {"seed": seed, "guidance_scale": guidance, "decoder_steps": steps, "prior_steps": prior_steps}
        first |= {"prior_candidates": candidates, "upsampler_steps": upsampler_steps, "caption": caption}
        first["model"] = which
        for event, action, more in ((go, "create", {"n": n}), (explain, "explain", {})):
            on(event, action, first | more)
        edit = {"picture": chosen, "seed": seed, "num_steps": steps, "model": which}
        on(vary, "variations", edit | {"n": n, "eta": eta, "strength": far})
        mask_js = "(...all) => { all[all.length - 1] = window.studio.mask(); return all; }"
        on(inpaint, "inpaint", edit | {"n": n, "caption": brush_text, "mask": passed}, js=mask_js)
        on(outpaint, "outpaint", edit | {"n": n, "caption": out_text, "scale": share})
        on(textdiff, "textdiff", edit | {"source": source, "target": target, "theta": theta})
        mixing = {"first": second, "second": chosen, "seed": seed, "num_steps": steps, "frames": frames}
        mixing["model"] = which
        on(mix, "interpolate", mixing)
        on(start, "image_to_image", edit | {"n": n, "caption": start_text, "strength": strength})
        on(upscale, "upscale", {"picture": chosen, "seed": seed, "model": which})

        quick = dict(concurrency_limit=None, api_visibility="private", show_progress="hidden")

        def choose_one(now, id):
            by_id = dict(now)
            id = id if isinstance(id, str) and id in by_id else ""
            return id, *details(by_id, id), cards(now[::-1], id, small=True)

        choose.click(
            choose_one,
            [visit, passed],
            [chosen, brush, about, history],
            js="(v, p) => [v, studio.chosen]",
            **quick,
        )

        def take_one(now, data):
            try:
                if data == "unreadable":
                    raise Refused("the browser cannot read this file: choose it again")
                large, _, size = str(data).partition(" ")
                if large == "large" and size.isdecimal():
                    raise Refused(too_large(int(size)))
                square = pictures.square_picture(read_upload(data), model.image_size)
            except Refused as error:
                return note(str(error), bad=True), *[gr.skip()] * 6
            id = str(next_id(now))
            now = [*now, (id, Picture(png_bytes(square), "uploaded", {}, ""))][-MAX_HISTORY:]
            text = note("uploaded and chosen: change it below")
            return (
                text,
                cards(now[-1:], id),
                cards(now[::-1], id, small=True),
                now,
                id,
                *details(dict(now), id),
            )

        more = [chosen, brush, about]
        take.click(take_one, [visit, passed], [*outputs, *more], js="(v, p) => [v, studio.upload]", **quick)

        def keep_one(now, id):
            by_id = dict(now)
            if id not in by_id:
                return "", note("first choose a picture: click on one", bad=True)
            return id, f"<img width=96 src='{as_url(by_id[id].png)}'>"

        keep.click(keep_one, [visit, chosen], [second, kept_one], **quick)
        zipped.click(
            lambda now: (
                f"<a class=link id=zip_link href='{archive(now)}' download='pictures.zip'>pictures.zip</a>"
            ),
            visit,
            link,
            **quick,
        )
    blocks.queue(default_concurrency_limit=None, max_size=64)
    return blocks, dict(css=CSS, head=HEAD, show_error=False)
