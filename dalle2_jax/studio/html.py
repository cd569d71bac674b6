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
.path {display: flex; flex-wrap: wrap; gap: 4px} .path img {width: 56px}
.path img, .pixels img {image-rendering: pixelated}
.token {display: inline-block; background: #e4e7fd; color: #223; border-radius: 5px; padding: 1px 7px;
  margin: 2px}
.strip {width: 100%; height: 14px; image-rendering: pixelated; display: block; margin: 2px 0 8px}
.settings {font-size: 13px} .settings b {font-weight: 600}
.link {display: inline-block; margin: 4px 12px 4px 0; text-decoration: underline; cursor: pointer}
"""
# The brush, the choice of a picture, the slider along a path; it reads files and sends them inside requests.
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


def note(text: str, bad: bool = False, share: float | None = None) -> str:
    """A line of status; `share` in 0..1 adds a bar."""
    bar = "" if share is None else f"<div class=bar><div style='width:{100 * share:.0f}%'></div></div>"
    return f"<div class='note{' bad' * bad}' role=status>{escape(text)}{bar}</div>"


def img(image: Picture | np.ndarray, more: str = "") -> str:
    """An img element of a picture, or of uint8 [H, W, 3]; `more`: further attributes."""
    if isinstance(image, Picture):
        return f"<img src='{as_url(image.png)}' alt='{escape(image.caption)}' {more}>"
    return f"<img src='{as_url(png_bytes(image))}' {more}>"


def cards(visit: Visit, chosen: str = "", small: bool = False) -> str:
    """Pictures to click on, each with its download."""
    made = "".join(
        f"<div class='card{' chosen' * (id == chosen)}' data-id={id} title='{escape(each.caption)}'>"
        + img(each, f"onclick=\"studio.choose('{id}')\"")
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
        f"<div class='card pixels'>{img(image)}{escape(name)}: "
        f"{f'{sides[i - 1]} to ' if i else ''}{sides[i]} pixels</div>"
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


def details(visit: Visit, chosen: str) -> tuple[str, str]:
    """(the chosen picture under the brush, its settings and its command)."""
    if chosen not in visit:
        return note("Draw or upload a picture, then click on it to change it."), ""
    each = visit[chosen]
    width, height = each.size
    brush = (
        f"<div class=brush data-id={chosen}>{img(each)}<canvas id=brush "
        f"width={width} height={height} onpointerdown='studio.paint(event)' "
        "onpointermove='studio.paint(event)'></canvas></div>"
        "<span class=link onclick='studio.clear()'>clear the brush</span>"
    )
    command = each.command and (
        f"<div class=command>{escape(each.command)}</div>"
        "<span class=link onclick='studio.copy(this)'>copy the command</span>"
    )
    lines = [f"<b>{escape(each.caption)}</b>", *map(escape, setting_lines(each.settings))]
    return brush, f"<div class=settings>{'<br>'.join(lines)}{command}</div>"


def setting_lines(settings: dict) -> list[str]:
    """The settings of a picture, as lines."""

    def line(values, hidden=()) -> str:
        return ", ".join(f"{k} {v}" for k, v in values.items() if v is not None and k not in hidden)

    lines = []
    for name, value in settings.items():
        if name == "settings":
            lines += [f"{step}: {line(values)}" for step, values in value.items()]
        elif name == "asked":
            lines.append(line(value, hidden=settings))
        elif name != "caption":
            lines.append(f"{name} {value}")
    return [line for line in lines if line]
