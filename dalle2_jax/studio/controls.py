"""The studio's controls: gradio's components of the fields of requests."""

from dalle2_jax.generate.settings import SETTINGS, defaults
from dalle2_jax.studio import html
from dalle2_jax.studio.requests import ACTIONS, MAX_PICTURES, SAMPLING
from dalle2_jax.studio.subjects import subjects
from dalle2_jax.studio.work import Studio

MIX_FRAMES = 5
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
    "inpaint": "Paint over what shall be drawn anew. All else stays as it is.",
    "interpolate": "Choose one picture and keep it as the first. Then choose another.",
    "upscale": "A larger picture is first reduced to the size of the model's own.",
}
GROUPS = {  # role -> heading of its settings
    "prior": "**Prior**: from the caption to the idea of a picture",
    "decoder": "**Decoder**: the small picture",
    "upsampler": "**Upsamplers**: the larger pictures",
}
LABELS = {
    "caption": "The whole picture shows",
    "source": "It shows",
    "target": "It should show",
    "eta": "How much is left to chance",
    "strength": "How far from the picture (1: all is new)",
    "scale": "Share of the side that the picture takes",
    "theta": "How far",
    "frames": "Pictures on the way",
}


# fields of the tabs that hold the caption of the chosen picture, by the ids of their boxes
CAPTIONS = [
    f"{id}_{name}"
    for action, _, id in TABS.values()
    for name in ("caption", "source", "target")
    if name in ACTIONS[action]
]


def _settings(gr, studio: Studio) -> dict:
    """Fields of `create` besides caption, number and seed -> components."""
    model = next(iter(studio.models.values()))
    values, made = defaults(model.engine, model.steps("draw")), {}
    scale = values.pop("guidance_scale", 1)
    label = "Guidance: how closely to follow the caption"
    made["guidance_scale"] = gr.Slider(0, 20, scale, step=0.5, label=label, visible=model.reads_captions)
    found = [name for name in SAMPLING if name in values]
    for role, heading in GROUPS.items():
        if not any(SETTINGS[name].role == role for name in found):
            continue
        gr.Markdown(heading)
        with gr.Row():
            for name in found:
                if SETTINGS[name].role == role:
                    made[name] = _setting(gr, name, values[name], len(studio.models) == 1)
    return made


def _setting(gr, name: str, value, known: bool):
    """The component of a setting; `known`: the model's `value` is shown where it is left empty."""
    field, empty = SAMPLING[name], "the model's"
    if known:
        text = ",".join(map(str, value if isinstance(value, list) else [value]))
        empty += f": {'none' if value is None else text}"
    label = field.help.removesuffix(".")
    if field.kind == "choice":
        return gr.Dropdown([(empty, ""), *field.choices], value="", label=label)
    # a gr.Number without a value becomes 0 as soon as it is shown; a text stays empty
    return gr.Textbox("", label=label, placeholder=empty, max_lines=1)


def create(gr, studio: Studio) -> tuple[dict, dict]:
    """(field -> component, action -> button) of the column that draws captions."""
    names, models = list(studio.models), list(studio.models.values())
    _, tries = subjects(models[0])
    reads = any(model.reads_captions for model in models)
    # With one line Enter draws.
    box = gr.Textbox(
        "".join(tries[:1]), label="What shall it draw?", lines=1, elem_id="caption", visible=reads
    )
    fields, buttons = {"caption": box}, {}
    if tries:
        examples = [[text] for text in tries]
        gr.Examples(examples, box, label="For example", elem_id="examples", api_visibility="private")
    buttons["create"] = gr.Button("Draw", variant="primary", elem_id="draw")
    label = "Model (and its kind of prior)"
    fields["model"] = gr.Dropdown(names, value=names[0], label=label, visible=len(names) > 1)
    fields["n"] = gr.Slider(1, MAX_PICTURES, 4, step=1, label="How many pictures", elem_id="n")
    with gr.Row():
        fields["seed"] = gr.Number(0, label="Seed", precision=0, elem_id="seed")
        fields["fixed"] = gr.Checkbox(label="Keep the seed, to draw the same again", elem_id="fixed")
    with gr.Accordion("More settings", open=False):
        fields |= _settings(gr, studio)
    can = any("explain" in model.actions for model in models)
    buttons["explain"] = gr.Button("Explain how it is drawn", elem_id="explain", visible=can)
    gr.HTML(html.UPLOAD)
    return fields, buttons


def edits(gr, studio: Studio, chosen, second, painted) -> tuple[dict[str, tuple], tuple]:
    """(action -> (button, field -> component) of the tabs that change a picture, (keep, its picture) or ()).

    There is a tab for each action that a model can do.
    """
    made, states = {}, {"picture": chosen, "first": second, "second": chosen}
    keep: tuple = ()
    models = studio.models.values()
    reads = any(model.reads_captions for model in models)
    for tab, (action, text, id) in TABS.items():
        if not any(action in model.actions for model in models):
            continue
        with gr.Tab(tab):
            if action in HINTS:
                gr.Markdown(HINTS[action])
            if action == "inpaint":
                gr.HTML(html.TOOLS)
            if action == "interpolate":
                button = gr.Button("Keep the chosen one as the first", elem_id="keep")
                keep = button, gr.HTML("", elem_id="kept")
            fields = {name: state for name, state in states.items() if name in ACTIONS[action]}
            for name, label in LABELS.items():
                field = ACTIONS[action].get(name)
                if field is None:
                    continue
                if field.kind == "text":
                    fields[name] = gr.Textbox(label=label, lines=1, elem_id=f"{id}_{name}", visible=reads)
                else:
                    value = MIX_FRAMES if action == "interpolate" else field.default
                    step = 1 if field.kind == "int" else 0.05
                    fields[name] = gr.Slider(field.low, field.high, value, step=step, label=label)
            fields |= {"mask": painted} if action == "inpaint" else {}  # the last: see `build`
            made[action] = gr.Button(text, variant="primary", elem_id=id), fields
    return made, keep
