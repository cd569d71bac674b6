"""What a run tells: scalars, labelled image grids and text (one `Writer`), speed and time left (one `Progress`).

Everything goes to WORKDIR: metrics.jsonl (one JSON object a line, easy to read and plot), TensorBoard events, samples/*.png,
and Weights & Biases where a project is named. Only process 0 writes. A resumed run appends.
"""

import contextlib
import functools
import glob
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from absl import logging
from etils import epath

# Dense bfloat16 peak of one device, FLOP/s, from the makers' data sheets. First match in the device's kind wins.
PEAK_FLOPS = (
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6", 918e12),
    ("A100", 312e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
)

# Fonts with Chinese glyphs where systems usually keep them; Pillow's own font is Latin only.
_WIDE_FONTS = (
    "/usr/share/fonts/**/NotoSansCJK*.*c",
    "/usr/share/fonts/**/NotoSansSC*.*tf",
    "/usr/share/fonts/**/SourceHanSans*.*",
    "/usr/share/fonts/**/wqy*.tt*",
    "/usr/share/fonts/**/DroidSansFallback*.ttf",
    "/System/Library/Fonts/PingFang.ttc",
    "/System/Library/Fonts/Hiragino Sans GB.ttc",
    "/System/Library/Fonts/STHeiti*.ttc",
    "C:/Windows/Fonts/msyh.tt*",
    "C:/Windows/Fonts/simsun.ttc",
)


def peak_flops(device_kind: str) -> float | None:
    """Returns the dense bfloat16 peak of one device in FLOP/s, None if it is not in the table (a CPU, for instance)."""
    return next((peak for name, peak in PEAK_FLOPS if name in device_kind), None)


def show_duration(seconds: float) -> str:
    """Returns '42s', '3m05s', '2h10m' or '4d03h'."""
    if not math.isfinite(seconds):
        return "?"
    total = max(0, round(seconds))
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    if total < 48 * 3600:
        return f"{total // 3600}h{total // 60 % 60:02d}m"
    return f"{total // 86400}d{total // 3600 % 24:02d}h"


def labelled_grid(
    images: np.ndarray,
    labels: Sequence[str] | None = None,
    columns: int | None = None,
    min_size: int = 128,
    max_lines: int = 4,
) -> np.ndarray:
    """Lays out images in a grid, each with its label below.

    Args:
      images: uint8 [N, H, W, 3].
      labels: N texts; wrapped to the width of an image, at most `max_lines` lines. None for a bare grid.
      columns: images a row; about the square root of N by default.
      min_size: smaller images are enlarged by a whole factor (pixels repeated) until they are at least this wide, so that
        labels stay readable.

    Returns:
      uint8 [height, width, 3], black text on white. Characters that no font at hand can draw are left out.
    """
    from PIL import Image, ImageDraw

    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not images.size:
        raise ValueError(f"images must be uint8 [N, H, W, 3], not {images.dtype} {list(images.shape)}")
    count = len(images)
    if labels is not None and len(labels) != count:
        raise ValueError(f"{count} images but {len(labels)} labels")
    if columns is not None and columns < 1:
        raise ValueError(f"columns={columns} must be >= 1")
    factor = max(1, math.ceil(min_size / images.shape[2]))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = images.shape[1:3]
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    size = max(11, min(22, width // 14))
    gap, leading = max(4, width // 32), size + size // 4
    wrapped = [_wrap(label, size, width, max_lines) for label in labels or [""] * count]
    label_height = max(len(lines) for _, lines in wrapped) * leading + (gap // 2 if labels else 0)
    cell_height, cell_width = height + label_height + gap, width + gap
    canvas = Image.new("RGB", (columns * cell_width + gap, rows * cell_height + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (font, lines) in enumerate(wrapped):
        x, y = gap + i % columns * cell_width, gap + i // columns * cell_height
        canvas.paste(Image.fromarray(images[i]), (x, y))
        for j, line in enumerate(lines):
            draw.text((x, y + height + gap // 2 + j * leading), line, font=font, fill="black")
    return np.asarray(canvas)


def _wrap(label: str, size: int, width: int, max_lines: int) -> tuple[object, list[str]]:
    """(font, lines): breaks at spaces, or anywhere in text without spaces, such as Chinese."""
    text = " ".join(str(label).split())
    font = _font_for(text, size)
    text = "".join(c for c in text if c == " " or _has_glyph(font, c)).strip()
    lines, line = [], ""
    for word in text.split(" ") if text else []:
        candidate = f"{line} {word}" if line else word
        if font.getlength(candidate) <= width:
            line = candidate
            continue
        if line:
            lines.append(line)
        while font.getlength(word) > width and len(word) > 1:
            cut = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            lines.append(word[:cut])
            word = word[cut:]
        line = word
    lines += [line] if line else []
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while last and font.getlength(last + "...") > width:
            last = last[:-1]
        lines = lines[: max_lines - 1] + [last + "..."]
    return font, lines


def _font_for(text: str, size: int):
    default = _default_font(size)
    if all(c == " " or _has_glyph(default, c) for c in text):
        return default
    return _wide_font(size) or default


@functools.cache
def _default_font(size: int):
    from PIL import ImageFont

    return ImageFont.load_default(size)


@functools.cache
def _wide_font(size: int):
    from PIL import ImageFont

    for pattern in _WIDE_FONTS:
        for path in sorted(glob.glob(pattern, recursive=True)):
            with contextlib.suppress(OSError):
                return ImageFont.truetype(path, size)
    return None


@functools.lru_cache(maxsize=65536)
def _has_glyph(font, character: str) -> bool:
    """Whether a font draws a character as something else than its box for missing ones."""
    try:
        missing, drawn = font.getmask("\U0010fffe"), font.getmask(character)
    except (UnicodeEncodeError, OSError):  # Pillow's bitmap font knows Latin-1 only
        return False
    return drawn.size != missing.size or bytes(drawn) != bytes(missing)


class Writer:
    """Writes scalars, images and text of a run to its workdir; does nothing on processes other than 0.

    Args:
      workdir: the run's folder; made if absent.
      wandb: 'project' or 'entity/project' of Weights & Biases; None for none.
    """

    def __init__(self, workdir: str | os.PathLike, wandb: str | None = None):
        self._workdir = epath.Path(workdir)
        self._active = jax.process_index() == 0
        self._file = self._board = self._wandb = None
        if not self._active:
            return
        self._workdir.mkdir(parents=True, exist_ok=True)
        path = self._workdir / "metrics.jsonl"
        torn = path.exists() and (text := path.read_bytes()) and not text.endswith(b"\n")
        self._file = path.open("a")
        if torn:  # the run was killed in the middle of a line
            self._file.write("\n")
        try:
            import tensorboardX

            self._board = tensorboardX.SummaryWriter(os.fspath(self._workdir), flush_secs=30)
        except ImportError:
            logging.info(
                "no TensorBoard events: pip install tensorboardX to have them (metrics.jsonl is written)"
            )
        if wandb:
            self._wandb = _start_wandb(self._workdir, wandb)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes {name: number} of one step; names such as 'train/loss'."""
        if not self._active:
            return
        values = {name: float(value) for name, value in values.items()}
        # JSON has no NaN
        numbers = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": int(step), "time": round(time.time(), 3), **numbers}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def images(
        self,
        step: int,
        name: str,
        images: np.ndarray,
        captions: Sequence[str] | None = None,
        columns: int | None = None,
    ) -> None:
        """Writes a labelled grid of uint8 [N, H, W, 3] to samples/NAME_STEP.png and to TensorBoard.

        The PNG carries the captions as text ('captions', a JSON list), also those that no font could draw.
        """
        if not self._active:
            return
        grid = labelled_grid(images, captions, columns)
        path = self._workdir / "samples" / f"{name.replace('/', '_')}_{step:08d}.png"
        save_png(path, grid, {"captions": json.dumps(list(captions or []), ensure_ascii=False)})
        if self._board is not None:
            self._board.add_image(name, grid, step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(grid)}, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        """Writes a text to metrics.jsonl and TensorBoard."""
        if not self._active:
            return
        self._file.write(json.dumps({"step": int(step), name: text}, ensure_ascii=False) + "\n")
        if self._board is not None:
            self._board.add_text(name, text, step)

    def flush(self) -> None:
        """Makes all that was written visible to readers."""
        if self._active:
            self._file.flush()
            if self._board is not None:
                self._board.flush()

    def close(self) -> None:
        """Flushes and closes; calling it again does no harm."""
        if not self._active:
            return
        self._active = False
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def save_png(path: str | os.PathLike, image: np.ndarray, texts: Mapping[str, str] | None = None) -> None:
    """Writes uint8 [H, W, 3] as PNG with optional text entries; makes the folder if needed."""
    import io

    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    for name, text in (texts or {}).items():
        info.add_itxt(name, text)
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(buffer, format="PNG", pnginfo=info)
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())


def _start_wandb(workdir: epath.Path, where: str):
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            "wandb is not installed: pip install wandb, or leave --config.wandb empty"
        ) from error
    entity, _, project = where.rpartition("/")
    id_file = workdir / "wandb_id.txt"  # so that a resumed run goes on in the same place
    run_id = id_file.read_text().strip() if id_file.exists() else None
    run = wandb.init(
        project=project, entity=entity or None, id=run_id, resume="allow", dir=os.fspath(workdir)
    )
    id_file.write_text(run.id)
    return run


class Progress:
    """Measures a loop: steps and examples a second, share of time spent waiting for input, FLOP/s, time left.

    With n steps since the last report, in a time of which w was spent inside `waiting()` and p inside `paused()`:

        steps/s = n / (time - p)        wait = w / (time - p)        MFU = flops_per_step * steps/s / (peak * devices)
        time left = (total_steps - step) * (time since the start / steps since the start), recent steps weighing more

    Call `report` only after the step's results have reached the host, since JAX computes asynchronously.

    Args:
      total_steps: the step at which the run ends.
      start_step: the step from which it starts (resumes).
      batch_size: global; 0 if examples/s means nothing.
      flops_per_step: floating-point operations of a whole step over all devices (a multiply-add is two); None if unknown.
      name: opens the console's line.
      print_every: seconds between lines on the console, so that a fast loop does not flood it; the last step always prints.
      clock: for tests.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        batch_size: int = 0,
        flops_per_step: float | None = None,
        name: str = "",
        print_every: float = 5.0,
        file=None,
        clock=time.monotonic,
    ):
        self._total, self._batch_size, self._name = total_steps, batch_size, name
        self._flops = flops_per_step if flops_per_step and flops_per_step > 0 else None
        self._print_every, self._file, self._clock = print_every, file, clock
        self._began = self._last_time = clock()
        self._last_step, self._last_print = start_step, -math.inf
        self._waited = self._paused = 0.0
        self._seconds_per_step: float | None = None
        self._pauses, self._steps = 0.0, 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for input."""
        began = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - began

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time inside (evaluation, samples) out of the speed, but not out of the time left."""
        began = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - began

    def report(self, step: int, **shown: float) -> dict[str, float]:
        """Returns the speed since the last report as scalars, and prints a line with them and with `shown` (such as the loss)."""
        now = self._clock()
        steps = step - self._last_step
        if steps <= 0:
            return {}
        busy = max(now - self._last_time - self._paused, 1e-9)
        rate = steps / busy
        self._steps, self._pauses = self._steps + steps, self._pauses + self._paused
        # Recent windows weigh more (the speed of a machine changes), long windows more than short ones.
        keep = 0.0 if self._seconds_per_step is None else 0.7 ** (steps / max(1, self._steps / 10))
        self._seconds_per_step = keep * (self._seconds_per_step or 0.0) + (1 - keep) / rate
        left = (self._total - step) * (self._seconds_per_step + self._pauses / self._steps)
        values = {
            "speed/steps_per_s": rate,
            "speed/wait": min(1.0, self._waited / busy),
            "speed/seconds_left": left,
        }
        line = [
            f"{self._name} {step}/{self._total} ({100 * step // max(1, self._total)}%)".strip(),
            *(f"{name} {value:.4g}" for name, value in shown.items()),
            f"{rate:.3g} steps/s",
        ]
        if self._batch_size:
            values["speed/examples_per_s"] = rate * self._batch_size
            line.append(f"{rate * self._batch_size:.4g} examples/s")
        line.append(f"input wait {100 * values['speed/wait']:.0f}%")
        if self._flops:
            flops, devices = self._flops * rate, jax.devices()
            peak = peak_flops(devices[0].device_kind)
            if peak:
                values["speed/mfu"] = flops / (peak * len(devices))
                line.append(f"MFU {100 * values['speed/mfu']:.1f}%")
            else:
                values["speed/gflops"] = flops / 1e9
                line.append(f"{flops / 1e9:.3g} GFLOP/s")
        line.append(f"{show_duration(now - self._began)} gone, {show_duration(left)} left")
        if step >= self._total or now - self._last_print >= self._print_every:
            self._last_print = now
            if jax.process_index() == 0:
                print(" | ".join(line), file=self._file or sys.stdout, flush=True)
        self._last_time, self._last_step, self._waited, self._paused = now, step, 0.0, 0.0
        return values
