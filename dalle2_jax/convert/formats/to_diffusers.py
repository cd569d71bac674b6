"""Our models as folders of diffusers and transformers.

A cascade becomes an UnCLIPPipeline, a CLIP alone a CLIPModel, an unconditional generator a DDPMPipeline,
stages that read a T5 become IF's pipelines. The tables are those of the imports (karlo.py, hf_clip.py,
ddpm.py, deepfloyd.py) in the other direction. A pipeline supports the settings of its weights alone; a
setting that it does not support is an error that names the setting.
"""

import importlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dalle2_jax.convert import tables
from dalle2_jax.convert.formats import ddpm, deepfloyd, hf_clip, karlo
from dalle2_jax.convert.formats.karlo import demand
from dalle2_jax.convert.formats.unet import check_groups
from dalle2_jax.data.tokenizer import Tokenizer
from dalle2_jax.models import models, null_caption
from dalle2_jax.runtime import modeldir

# The module of this class since diffusers 0.34; Karlo's index has "unclip", which is no longer found.
_TEXT_PROJ = "diffusers.pipelines.deprecated.unclip.text_proj"
_SCHEDULERS = {"prior": "fixed_small_log", "decoder": "learned_range", "super_res": "fixed_small_log"}


def export_model(out: Path, stages: dict[str, tuple[dict, Any]], tokenizer: Tokenizer | None) -> list[str]:
    """Write the folder `out`; returns notes for the user.

    Args:
      out: made if absent; files of the same names are replaced.
      stages: role -> (config, parameters); 'clip' alone, 'decoder' alone without captions, 't5' with
        'decoder', an upsampler or both, or 'clip', 'prior', 'decoder' and one upsampler.
      tokenizer: theirs; None: they read no captions.

    Raises:
      ValueError: names a setting that diffusers does not support, before anything is written.
    """
    settings = {role: _settings(config) for role, (config, _) in stages.items()}
    params = {role: params for role, (_, params) in stages.items()}
    files: dict[str, dict] = {}  # file -> JSON value
    weights: dict[str, dict] = {}  # file -> tensors
    is_clip, reads_t5 = set(stages) == {"clip"}, "t5" in stages
    if tokenizer is None:
        if set(stages) != {"decoder"}:
            raise ValueError(f"diffusers has no pipeline of {', '.join(stages)} without captions")
        files, weights = ddpm.export(settings["decoder"], params["decoder"])
    elif is_clip:
        _check_clip(settings["clip"])
        files |= hf_clip.settings_files(settings["clip"])
        weights["model.safetensors"] = tables.exported(hf_clip.rows(settings["clip"]), params["clip"])
    elif reads_t5:
        files, weights = deepfloyd.export(settings, params)
    else:
        files["model_index.json"] = _index(tokenizer)
        _pipeline(settings, params, files, weights)
    notes = [] if is_clip or reads_t5 or tokenizer is None else _null_differs(stages, tokenizer)
    for name in (*weights, *files):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
    for name, tensors in weights.items():
        types = dict.fromkeys(tensors, np.dtype(np.float32))
        modeldir.write_tensors(out / name, tensors, types, kind="pt")
    for name, value in files.items():
        modeldir.write_json(out / name, value)
    if tokenizer is not None:
        beside = next((out / name for name in files if name.endswith("text_encoder/config.json")), None)
        save_tokenizer(tokenizer, beside.parent.with_name("tokenizer") if beside else out)
    return notes


def _settings(config: dict) -> dict:
    """All settings of a stage's model, defaults included."""
    build = importlib.import_module(f"dalle2_jax.models.stages.{config['stage']}").build
    bound = inspect.signature(build).bind_partial(**config["model"])
    bound.apply_defaults()
    return json.loads(json.dumps(models.to_plain(dict(bound.arguments))))


def _check_clip(settings: Mapping) -> None:
    demand("clip", settings, noise=None, loss="softmax")
    if settings["vision"] and settings["vision"]["kind"] != "vit":
        raise ValueError("transformers' CLIPModel has a vision transformer, this CLIP has a ResNet")


def _check_cascade(settings: Mapping[str, dict]) -> str:
    """The name of the upsampler. Raises ValueError for settings that UnCLIPPipeline does not have."""
    base = ("clip", "prior", "decoder")
    above = [role for role in settings if role not in base]
    if len(above) != 1 or not set(base) <= settings.keys() or not above[0].startswith("upsampler"):
        parts = "a CLIP, a prior, a decoder and one upsampler"
        raise ValueError(f"UnCLIPPipeline is {parts}; this is {', '.join(settings)}")
    noise = dict(schedule="cosine", num_timesteps=1000)
    _check_clip(settings["clip"])
    demand("clip", settings["clip"], unit_embeds=False)
    if "embed_scale" not in settings["prior"]:
        raise ValueError("the prior is an autoregressive one, diffusers has the diffusion prior alone")
    demand("prior", settings["prior"], embed_scale={"mode": "meanstd"}, objective="x0", **noise)
    decoder = dict(objective="eps", learned_variance=True, inpaint=False, num_heads=0, num_classes=0)
    demand("decoder", settings["decoder"], embed_scale=1.0, **decoder, **noise)
    upsampler = dict(low_res_noise=0.0, resize="cubic", text=None, num_classes=0, inpaint=False)
    upsampler |= dict(objective="eps", learned_variance=False, attention_resolutions=[], **noise)
    demand(above[0], settings[above[0]], **upsampler)
    for role in ("decoder", above[0]):
        if (settings[role]["net"] or {}).get("kind") == "vit":
            raise ValueError(f"{role}: model.net.kind is 'vit', diffusers' unCLIP has U-Nets alone")
    for role in ("prior", "decoder"):
        embed_dim, text = settings[role]["embed_dim"], settings[role]["text"] or {}
        if (width := text.get("states_width")) != embed_dim:
            needed = f"diffusers needs embed_dim, {embed_dim}"
            raise ValueError(f"{role}: model.text.states_width is {width!r}, {needed}")
    return above[0]


def _pipeline(settings: Mapping, params: Mapping, files: dict, weights: dict) -> None:
    """Adds the parts of UnCLIPPipeline to `files` and `weights`."""
    above = _check_cascade(settings)
    clip, prior, decoder, upsampler = (settings[role] for role in ("clip", "prior", "decoder", above))
    for role in ("decoder", above):
        check_groups(params[role]["net"], 32, "UnCLIPPipeline")

    def add(folder: str, config: dict, tensors: dict, file: str = "diffusion_pytorch_model") -> None:
        files[f"{folder}/config.json"], weights[f"{folder}/{file}.safetensors"] = config, tensors

    towers = tables.exported(hf_clip.tower_rows(clip), params["clip"], dropped=["logit_scale"])
    config = hf_clip.text_config(clip) | {"architectures": ["CLIPTextModelWithProjection"]}
    add("text_encoder", config, _below(towers, "text."), "model")
    if clip["vision"]:
        config = hf_clip.vision_config(clip) | {"architectures": ["CLIPVisionModelWithProjection"]}
        add("image_encoder", config, _below(towers, "vision."), "model")
        files["feature_extractor/preprocessor_config.json"] = hf_clip.preprocessor(clip)

    text = prior["text"]
    config = dict(
        _class_name="PriorTransformer",
        num_attention_heads=text["num_heads"],
        attention_head_dim=text["width"] // text["num_heads"],
        num_layers=text["depth"],
        embedding_dim=prior["embed_dim"],
        num_embeddings=text["context_length"],
        additional_embeddings=4,
        dropout=0.0,
    )
    dropped = [*null_caption.LEAVES["prior"], "stats/eps_sq"]
    rows = karlo.diffusers_prior_rows(text["depth"])
    add("prior", config, tables.exported(rows, params["prior"], dropped=dropped))

    side, levels = decoder["image_size"], range(len(decoder["channel_mult"]))
    attends = [side // 2**level in decoder["attention_resolutions"] for level in levels]
    common = dict(clip_embeddings_dim=decoder["embed_dim"], cross_attention_dim=decoder["text"]["width"])
    config = _unet_config("UNet2DConditionModel", decoder, attends) | dict(
        in_channels=3,
        out_channels=6,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        cross_attention_dim=decoder["text"]["width"],
        attention_head_dim=decoder["head_dim"],
        class_embed_type="identity",
    )
    rows = karlo.diffusers_decoder_rows(params["decoder"], decoder["num_image_tokens"])
    both = tables.exported(rows, params["decoder"], dropped=null_caption.LEAVES["decoder"])
    add("decoder", config, _below(both, "decoder."))
    config = dict(
        _class_name="UnCLIPTextProjModel",
        clip_extra_context_tokens=decoder["num_image_tokens"],
        time_embed_dim=4 * decoder["channels"],
        **common,
    )
    add("text_proj", config, _below(both, "text_proj."))

    attends = [False] * len(upsampler["channel_mult"])
    config = _unet_config("UNet2DModel", upsampler, attends) | dict(
        in_channels=6, out_channels=3, add_attention=False
    )
    both = tables.exported(karlo.upsampler_rows(params[above]), params[above])
    add("super_res_first", config, _below(both, "first."))
    # an upsampler without a last-step network uses the first one for all steps
    add("super_res_last", config, _below(both, "last.") or _below(both, "first."))

    for name, variance in _SCHEDULERS.items():
        limit, kind = (prior["clip_range"], "sample") if name == "prior" else (1.0, "epsilon")
        files[f"{name}_scheduler/scheduler_config.json"] = dict(
            _class_name="UnCLIPScheduler",
            num_train_timesteps=1000,
            variance_type=variance,
            prediction_type=kind,
            clip_sample=limit is not None,
            clip_sample_range=limit or 1.0,
        )


def _index(tokenizer: Tokenizer) -> dict:
    """UnCLIPPipeline's model_index.json."""
    classes = {f"{part}_scheduler": "UnCLIPScheduler" for part in _SCHEDULERS}
    classes |= dict(prior="PriorTransformer", decoder="UNet2DConditionModel")
    classes |= dict(super_res_first="UNet2DModel", super_res_last="UNet2DModel")
    parts = {name: ["diffusers", kind] for name, kind in classes.items()}
    parts["text_encoder"] = ["transformers", "CLIPTextModelWithProjection"]
    parts["text_proj"] = [_TEXT_PROJ, "UnCLIPTextProjModel"]
    parts["tokenizer"] = ["transformers", _tokenizer_class(tokenizer)]
    return dict(_class_name="UnCLIPPipeline", _diffusers_version="0.35.0") | parts


def _unet_config(name: str, settings: Mapping, attends: list[bool]) -> dict:
    """The settings that diffusers' two U-Nets share."""
    return dict(
        _class_name=name,
        sample_size=settings["image_size"],
        block_out_channels=[settings["channels"] * mult for mult in settings["channel_mult"]],
        layers_per_block=settings["num_res_blocks"],
        down_block_types=[karlo.BLOCK_TYPES[yes][0] for yes in attends],
        up_block_types=[karlo.BLOCK_TYPES[yes][1] for yes in reversed(attends)],
        resnet_time_scale_shift="scale_shift" if settings["scale_shift"] else "default",
        norm_num_groups=32,
        norm_eps=1e-5,
        act_fn="silu",
    )


def _below(tensors: Mapping, prefix: str) -> dict:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def _null_differs(stages: Mapping, tokenizer: Tokenizer) -> list[str]:
    """Notes on null captions other than "", the null caption of diffusers."""
    clip, clip_params = stages["clip"]
    null = karlo.null_caption(clip, clip_params, tokenizer)
    notes = []
    for role, leaves in null_caption.LEAVES.items():
        flat = modeldir.flatten(stages[role][1])
        for name, leaf, value in zip(("text_embed", "text_states"), leaves, null, strict=True):
            ours = np.asarray(flat.get(leaf, np.zeros(0)), np.float32)
            if ours.shape != value.shape or not np.allclose(ours, value, rtol=1e-2, atol=1e-2):
                notes.append(f"the {role}'s null {name} is not that of the caption '', which diffusers has")
    return notes


def _tokenizer_class(tokenizer: Tokenizer) -> str:
    return "CLIPTokenizer" if tokenizer.kind == "clip" else "PreTrainedTokenizerFast"


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer as transformers reads it: SOT (T5: none), the caption, EOT, padding of id 0."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    if tokenizer.kind == "t5":
        ends = dict(eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
        settings = dict(tokenizer_class="T5TokenizerFast", model_max_length=tokenizer.context_length)
        modeldir.write_json(folder / "tokenizer_config.json", settings | ends)
        return
    state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = state["model"]["vocab"]
    words = {number: word for word, number in vocab.items()}
    words |= {tokenizer.sot: "<|startoftext|>", tokenizer.eot: "<|endoftext|>"}
    sot, eot, pad = words[tokenizer.sot], words[tokenizer.eot], words[0]
    settings = dict(
        tokenizer_class=_tokenizer_class(tokenizer),
        model_max_length=tokenizer.context_length,
    ) | dict(bos_token=sot, eos_token=eot, unk_token=eot, pad_token=pad)
    if tokenizer.kind == "clip":
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in state["model"]["merges"]]
        modeldir.write_json(folder / "vocab.json", vocab | {sot: tokenizer.sot, eot: tokenizer.eot})
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    else:
        special = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
        marks = ((tokenizer.sot, sot), (tokenizer.eot, eot))
        state["added_tokens"] = [dict(id=number, content=word, **special) for number, word in marks]
        spaces = dict(type="Replace", pattern={"Regex": "\\s+"}, content=" ")
        strip = dict(type="Strip", strip_left=True, strip_right=True)
        state["normalizer"] = dict(type="Sequence", normalizers=[spaces, strip, {"type": "Lowercase"}])
        first, last = ({"SpecialToken": {"id": word, "type_id": 0}} for word in (sot, eot))
        template = [first, {"Sequence": {"id": "A", "type_id": 0}}, last]
        tokens = {word: dict(id=word, ids=[number], tokens=[word]) for number, word in marks}
        processor = dict(type="TemplateProcessing", single=template, pair=template, special_tokens=tokens)
        state["post_processor"] = processor
        modeldir.write_json(folder / "tokenizer.json", state)
    modeldir.write_json(folder / "tokenizer_config.json", settings)
