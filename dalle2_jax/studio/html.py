"""The studio's page as HTML: style and script, cards of pictures, an explanation."""

import base64
import io
import zipfile
from html import escape

import numpy as np

from dalle2_jax.runtime.grid import png_bytes
from dalle2_jax.studio.requests import MAX_UPLOAD
from dalle2_jax.studio.work import Picture, as_url

Visit = dict[str, Picture]  # id -> picture, in the order in which they were made
CSS = """
.gradio-container {max-width: 1240px !important; width: 100%; margin: auto}
.cards {display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 12px}
.cards.small {grid-template-columns: repeat(auto-fill, minmax(84px, 1fr)); gap: 8px}
.card {border: 3px solid var(--border-color-primary); border-radius: 10px; overflow: hidden}
.card [role=button] {cursor: pointer}
.card:hover, .card:focus-within {border-color: var(--border-color-accent)}
.card.chosen {border-color: var(--color-accent)}
.card img, .way img {width: 100%; display: block} .card small {display: block}
.card a, .card small {font-size: 12px; padding: 2px 6px}
.note {display: flex; flex-wrap: wrap; justify-content: space-between; align-items: center;
  padding: 8px 12px; border-radius: 8px; background: var(--background-fill-secondary);
  border: 1px solid var(--border-color-primary); color: var(--body-text-color)}
.note.bad {background: var(--error-background-fill); border-color: var(--error-border-color);
  color: var(--error-text-color)}
.bar {width: 100%; height: 5px; background: var(--border-color-primary); border-radius: 3px; margin-top: 6px}
.bar div {height: 5px; background: var(--color-accent); border-radius: 3px}
.brush {position: relative; width: 300px; max-width: 100%} .brush img {width: 100%; display: block}
.brush canvas {position: absolute; inset: 0; width: 100%; height: 100%; opacity: .55; cursor: crosshair;
  touch-action: none}
.tools input, .way input {accent-color: var(--color-accent)}
.tools {display: flex; flex-wrap: wrap; gap: 16px; align-items: center}
.way {width: 320px; max-width: 100%} .way input {width: 100%}
.command {font: 12px monospace; white-space: pre-wrap; background: var(--background-fill-secondary);
  color: var(--body-text-color); padding: 8px; border-radius: 5px}
.path {display: flex; flex-wrap: wrap; gap: 4px} .path img {width: 56px}
.path img, .pixels img {image-rendering: pixelated}
.token {display: inline-block; background: var(--color-accent-soft); color: var(--body-text-color);
  border-radius: 5px; padding: 1px 7px; margin: 2px}
.strip {width: 100%; height: 14px; image-rendering: pixelated; display: block; margin: 2px 0 8px}
.settings {font-size: 13px} .settings summary {cursor: pointer}
.link {display: inline-block; margin: 4px 12px 4px 0; text-decoration: underline; cursor: pointer;
  color: var(--link-text-color)}
button.small {font: 13px sans-serif; padding: 3px 12px; border-radius: 5px; cursor: pointer;
  background: var(--button-secondary-background-fill); color: var(--button-secondary-text-color)}
"""
# The brush, the choice of a picture, the slider along a path; it reads files and sends them inside requests.
HEAD = """<script>
window.studio = {
  chosen: '', last: null, strokes: null,
  click(selector) { document.querySelector(selector).click(); },
  canvas() { return document.querySelector('#brush'); },
  choose(id) {
    this.clear(); this.chosen = id;
    document.querySelectorAll('.card').forEach((c) => c.classList.toggle('chosen', c.dataset.id === id));
    this.click('#choose');
  },
  paint(e) {
    if (e.type !== 'pointerdown' && !this.last) return;
    const c = e.target, r = c.getBoundingClientRect(), s = c.width / r.width, g = c.getContext('2d');
    const at = [(e.clientX - r.left) * s, (e.clientY - r.top) * s], from = this.last || at;
    const size = document.querySelector('#brush_size'), eraser = document.querySelector('#eraser');
    g.globalCompositeOperation = eraser && eraser.checked ? 'destination-out' : 'source-over';
    g.strokeStyle = '#7a3cf0'; g.lineWidth = c.width * (size ? size.value : 16) / 100; g.lineCap = 'round';
    g.beginPath(); g.moveTo(...from); g.lineTo(...at); g.stroke();
    this.last = at;
  },
  clear() {
    const c = this.canvas(); this.strokes = null;
    if (c) c.getContext('2d').clearRect(0, 0, c.width, c.height);
  },
  restore() {
    const c = this.canvas();
    if (this.strokes && this.strokes !== c) c.getContext('2d').drawImage(this.strokes, 0, 0);
  },
  mask() {
    const c = this.canvas(); if (!c) return '';
    const painted = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
    if (!painted.some((x) => x)) return '';
    this.strokes = c;
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
    const done = () => { e.textContent = 'Copied'; setTimeout(back, 1500); };
    if (navigator.clipboard) return navigator.clipboard.writeText(text).then(done);
    const box = document.createElement('textarea'); box.value = text; document.body.append(box);
    box.select(); document.execCommand('copy'); box.remove(); done();
  },
  file(input) {
    const f = input.files[0]; if (!f) return;
    const r = new FileReader(), send = (what) => {
      this.upload = what; this.click('#take'); input.value = '';
    };
    if (f.size > LIMIT) return send('large ' + f.size);
    r.onload = () => send(r.result); r.onerror = () => send('unreadable');
    r.readAsDataURL(f);
  },
};
window.addEventListener('pointerup', () => window.studio.last = null);
</script>""".replace("LIMIT", str(MAX_UPLOAD))
UPLOAD = """<label class=link tabindex=0 onkeydown="if (event.key === 'Enter') this.click()">Upload a picture
<input id=file type=file accept='image/png,image/jpeg,image/webp' style='display:none'
  onchange='studio.file(this)'></label>"""
TOOLS = """<div class=tools><label>Brush size <input id=brush_size type=range min=2 max=50 value=16></label>
<label><input id=eraser type=checkbox> Eraser</label>
<button type=button class=small onclick='studio.clear()'>Clear the brush</button></div>"""
STOP = "<button type=button class=small onclick=\"studio.click('#stop')\">Stop</button>"


def note(text: str, bad: bool = False, share: float | None = None, stop: bool = False) -> str:
    """A line of status; `share` in 0..1 adds a bar, `stop` a button that stops the work."""
    bar = "" if share is None else f"<div class=bar><div style='width:{100 * share:.0f}%'></div></div>"
    return f"<div class='note{' bad' * bad}' role=status><span>{escape(text)}</span>{STOP * stop}{bar}</div>"


def img(image: Picture | np.ndarray, more: str = "") -> str:
    """An img element of a picture, or of uint8 [H, W, 3]; `more`: further attributes."""
    if isinstance(image, Picture):
        return f"<img src='{as_url(image.png)}' alt='{escape(image.label)}' {more}>"
    return f"<img src='{as_url(png_bytes(image))}' {more}>"


def cards(visit: Visit, chosen: str = "", small: bool = False) -> str:
    """Pictures to click on, each with its download."""
    key = "role=button tabindex=0 onkeydown=\"if (event.key === 'Enter') this.click()\""
    made = "".join(
        f"<div class='card{' chosen' * (id == chosen)}' data-id={id} title='{escape(each.label)}'>"
        + img(each, f"{key} onclick=\"studio.choose('{id}')\"")
        + f"<a href='{as_url(each.png)}' download='picture-{id}.png'>download</a></div>"
        for id, each in visit.items()
    )
    return f"<div class='cards{' small' * small}'>{made}</div>"


def history(visit: Visit, chosen: str = "") -> str:
    """The pictures of a visit, the last first."""
    return cards(dict(reversed(visit.items())), chosen, small=True)


def way(frames: list[Picture]) -> str:
    """The frames of a path, with a slider between its ends."""
    first, *others = frames
    shown = img(first) + "".join(img(each, "style='display:none'") for each in others)
    slider = f"<input type=range min=0 max={len(others)} value=0 oninput='studio.frame(this)'>"
    return f"<div class=way>{shown}{slider}</div>"


def sketch(images: np.ndarray) -> str:
    """Pictures of a step before the last."""
    shown = "".join(f"<div class=card>{img(image)}</div>" for image in images)
    return f"<div class='cards sketch'>{shown}</div>"


def strip(embed: np.ndarray) -> str:
    """An embedding [E] as a row of colours: blue below zero, white, orange above."""
    share = np.clip(embed / (3 * embed.std() + 1e-9), -1, 1)[:, None]
    ends = np.where(share < 0, np.array([40, 90, 220]), np.array([240, 120, 20]))
    row = 255 - np.abs(share) * (255 - ends)
    return img(row.round().astype(np.uint8)[None], "class=strip")


def explained(made: dict) -> str:
    """The page of what `explain` returns."""
    tokens = "".join(f"<span class=token>{escape(token)}</span>" for token in made["tokens"])
    prior = "".join(
        f"<div>sample {i + 1}: cosine with the text {cosine:.3f}"
        f"{', the closest: <b>kept</b>' * (i == made['kept'])}</div>{strip(made['candidates'][i])}"
        for i, cosine in enumerate(made["cosines"])
    )
    every = max(1, len(made["path"]) // 12)
    path = [*made["path"][:-1:every], made["path"][-1]]
    steps = "".join(img(image) for image in path)
    sides = [len(image) for image in made["stages"].values()]
    stages = "".join(
        f"<div class='card pixels'>{img(image)}<small>{escape(name)}: "
        f"{f'{sides[i - 1]} to ' if i else ''}{sides[i]} pixels</small></div>"
        for i, (name, image) in enumerate(made["stages"].items())
    )
    return (
        f"<div class=explained><h4>1. The caption as tokens</h4>{tokens}"
        f"<h4>2. CLIP makes one text embedding of them</h4>{strip(made['text_embed'])}"
        "<h4>3. The prior imagines image embeddings to go with it; the one closest to the text is kept</h4>"
        f"{prior}"
        f"<h4>4. The decoder takes noise away, step by step</h4><div class=path>{steps}</div>"
        f"<h4>5. Each upsampler enlarges the picture</h4><div class=cards>{stages}</div></div>"
    )


def archive(visit: Visit) -> str:
    """A link to a zip file of a visit: its pictures, and the commands that make them."""
    buffer, commands = io.BytesIO(), [each.command for each in visit.values() if each.command]
    with zipfile.ZipFile(buffer, "w") as file:
        for id, each in visit.items():
            file.writestr(f"picture-{id}.png", each.png)
        file.writestr("commands.txt", "".join(f"{command}\n" for command in commands))
    url = "data:application/zip;base64," + base64.b64encode(buffer.getvalue()).decode()
    return f"<a class=link id=zip_link href='{url}' download='pictures.zip'>pictures.zip</a>"


def details(visit: Visit, chosen: str, keep: bool = False) -> tuple[str, str]:
    """(the chosen picture under the brush, its settings and its command); `keep`: the strokes stay."""
    if chosen not in visit:
        return note("Draw or upload a picture to change it here."), ""
    each = visit[chosen]
    width, height = each.size
    brush = (
        f"<div class=brush data-id={chosen}>{img(each, 'onload=studio.restore()' * keep)}<canvas id=brush "
        f"width={width} height={height} onpointerdown='studio.paint(event)' "
        "onpointermove='studio.paint(event)'></canvas></div>"
    )
    command = each.command and (
        f"<div class=command>{escape(each.command)}</div>"
        "<button type=button class=small onclick='studio.copy(this)'>Copy the command</button>"
    )
    seed = f"<br>Seed {each.settings['seed']}" if "seed" in each.settings else ""
    lines = "<br>".join(map(escape, setting_lines(each.settings)))
    more = lines and f"<details><summary>All settings</summary>{lines}</details>"
    return brush, f"<div class=settings><b>{escape(each.label)}</b>{seed}{more}{command}</div>"


def setting_lines(settings: dict) -> list[str]:
    """The settings of a picture, as lines of plain words."""

    def line(values, hidden=()) -> str:
        shown = {k: v for k, v in values.items() if v is not None and k not in hidden}
        return ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in shown.items())

    lines = []
    for name, value in settings.items():
        if name == "settings":
            lines += [f"{step}: {line(values)}" for step, values in value.items()]
        elif name == "asked":
            lines.append(line(value, hidden=settings))
        elif name != "caption":
            lines.append(f"{name} {value}")
    return [line for line in lines if line]
