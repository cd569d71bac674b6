"""From a config to a stage, from a directory to trained parameters."""

import importlib
import inspect
import json
from collections.abc import Collection, Iterable

import jax
import jax.numpy as jnp
from etils import epath

from dalle2_jax.models import trainable
from dalle2_jax.models.nets import layers
from dalle2_jax.runtime import checkpoint, checksums, files, hub, modeldir
from dalle2_jax.runtime.names import nearest, nearest_setting

# The name of a stage in a config -> the module with its `build`, and `SETTINGS` of sampling. To add a stage,
# write such a module (see `stages`) and name it here.
STAGES = {
    name: f"dalle2_jax.models.stages.{name}"
    for name in (
        *("clip", "prior", "ar_prior", "decoder", "upsampler", "classifier", "t5"),
        *("tokenizer", "token_model", "pixelsnail", "dalle_mini", "lpips"),
    )
}
# What may take the place of a stage in a model.
KINDS = {
    "prior": ("prior", "ar_prior"),
    "noisy_clip": ("clip",),
    "token_model": ("token_model", "pixelsnail", "dalle_mini"),
}
# Settings of a config that are paths (`data.path` of some sources is a name, which nothing is expanded in).
PATHS = (
    *("clip", "init_from", "sample_prior", "tokenizer.path"),
    *("data.path", "data.data_dir", "data.embeddings", "data.leave_out"),
)


def check_keywords(function, keywords: dict, what: str) -> None:
    """Raise ValueError for a keyword that `function` does not take, or one that it lacks, naming the nearest
    one."""
    parameters = inspect.signature(function).parameters
    check_names(keywords, parameters, what)
    missing = [n for n, p in parameters.items() if p.default is inspect.Parameter.empty and n not in keywords]
    if missing:
        raise ValueError(f"{what} lacks {', '.join(f'{what}.{name}' for name in missing)}")


def check_names(
    names: Iterable[str], known: Collection[str], what: str, elsewhere: Collection[str] = ()
) -> None:
    """Raise ValueError for a name that is not known, naming the nearest one, or else that of `elsewhere`."""
    for name in names:
        if name not in known:
            near = nearest(name, known, show=str)
            found = f"{what}.{near}" if near else nearest_setting(name, elsewhere)
            hint = f"; did you mean {found}?" if found else f"; it has {sorted(known)}"
            raise ValueError(f"{what}.{name} is not a setting{hint}")


def to_plain(value):
    """A config value as JSON types, tuples as lists."""
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


def expand_paths(config: dict) -> dict:
    """A config (plain JSON types) with the settings that are paths as the system takes them."""
    config = dict(config)
    if config.get("frozen"):
        config["frozen"] = {name: files.expand(path) for name, path in config["frozen"].items()}
    for group, _, name in (setting.rpartition(".") for setting in PATHS):
        if group and isinstance(config.get(group), dict):
            config[group] = _expanded(config[group], name)
        elif not group:
            config = _expanded(config, name)
    return config


def _expanded(settings: dict, name: str) -> dict:
    path = settings.get(name)
    return settings | {name: files.expand(path)} if isinstance(path, str) else settings


def _to_arguments(value):
    """JSON types as constructor arguments: lists as tuples."""
    if isinstance(value, dict):
        return {key: _to_arguments(item) for key, item in value.items()}
    return tuple(_to_arguments(item) for item in value) if isinstance(value, list | tuple) else value


def stage_module(name: str):
    """The module of a stage; ValueError for an unknown name."""
    if name not in STAGES:
        near = nearest(name, STAGES)
        raise ValueError(
            f"stage {name!r} is unknown; {f'did you mean {near}?' if near else f'there are {tuple(STAGES)}'}"
        )
    return importlib.import_module(STAGES[name])


def build_stage(config: dict):
    """The stage that `config['stage']` names, built from `config['model']`; ValueError says which setting is
    wrong."""
    module = stage_module(config["stage"])
    model = _to_arguments(to_plain(config["model"]))
    check_keywords(module.build, model, "model")
    return module.build(**model)


def is_workdir(path) -> bool:
    """Whether `path` is a training workdir (as opposed to a model directory)."""
    return (epath.Path(path) / "config.json").exists() and (epath.Path(path) / "checkpoints").exists()


def _stage_folder(path: epath.Path, name: str) -> epath.Path:
    """The folder of stage `name` in the model directory `path`, or `path` if it is such a folder itself."""
    if (path / modeldir.WEIGHTS_FILE).exists():
        return path
    folders = {stage: entry["folder"] for stage, entry in modeldir.read_index(path)["stages"].items()}
    alike = [stage for stage in folders if stage.rstrip("0123456789") == name] if name not in folders else []
    if len(alike) > 1:
        raise ValueError(
            f"{path} holds {len(alike)} {name}s: give one of "
            f"{', '.join(str(path / folders[stage]) for stage in alike)}"
        )
    for stage in (name, *alike):
        if stage in folders:
            return path / folders[stage]
    raise ValueError(f"{path} holds no stage {name!r}; it has {sorted(folders)}")


def open_stage(path, name: str):
    """(stage, config, folder) of what `load_stage` reads, without its parameters."""
    path = epath.Path(hub.local(path))
    folder = path if is_workdir(path) else _stage_folder(path, name)
    if not (folder / modeldir.CONFIG_FILE).exists():
        raise FileNotFoundError(f"{folder} is not a stage: it has no {modeldir.CONFIG_FILE}")
    config = json.loads((folder / modeldir.CONFIG_FILE).read_text())
    stage, role = build_stage(config), name.rstrip("0123456789")
    kinds = KINDS.get(role, (role,) if role in STAGES else (config["stage"],))
    if config["stage"] not in kinds and not (role == "tokenizer" and _encodes_codes(stage)):
        raise ValueError(f"{path} holds a {config['stage']!r}, not a {name!r}")
    return stage, config, folder


def _encodes_codes(stage) -> bool:
    """Whether a stage of any kind is a tokenizer of pictures."""
    ops = getattr(stage, "ops", {})
    return any("codes" in op.writes for do, op in ops.items() if do.startswith("encode"))


def load_stage(path, name: str, keep_dtype: bool = False, lazy: bool = False):
    """(stage, config, parameters) of a training workdir (its newest average), of stage `name` of a model
    directory, or of a stage's folder in one.

    path: on the disk, or hf://OWNER/NAME@COMMIT of a model directory, or with a stage's folder behind it.
    name: 'clip', 'prior', 'decoder', 'upsampler' or, of a model directory with several, 'upsampler64' and the
    like; a name that is no stage's, such as 'teacher', stands for any stage. keep_dtype: parameters keep the
    type that they are stored in, else they are float32. Arrays are on the host. lazy: those of a model
    directory on the disk are read when they are used. Raises FileNotFoundError or ValueError that says what
    `path` lacks.
    """
    stage, config, folder = open_stage(path, name)
    if not is_workdir(folder):
        _, params = modeldir.load_stage(folder, keep_dtype, lazy=lazy)
    else:
        params = checkpoint.restore_ema_params(folder)
        if config.get("trainable"):
            base = trainable.load_base(folder, checksums.read_meta(folder)[1]["frozen"][trainable.BASE])
            params = trainable.merge(params, base)
    modeldir.check_params(params, abstract_params(stage), str(path))
    return stage, config, params


def load_start(path, config: dict):
    """`load_stage` of what a run of `config` can start from at `path`.

    In a model directory an autoregressive prior lies in the prior's place, a CLIP of noised pictures beside
    the other one, from which it may start, too.
    """
    name = {"ar_prior": "prior"}.get(config["stage"], config["stage"])
    if name == "clip" and config["model"].get("noise"):
        try:
            return load_stage(path, "noisy_clip")
        except ValueError:
            pass  # there is none: from the plain one
    return load_stage(path, name)


def abstract_params(stage) -> dict:
    """Shapes and types of a stage's parameters, without computing anything."""
    with layers.shapes_only(True):
        return jax.eval_shape(stage.init, jax.random.key(0), stage.batch_spec(1))


def encoded_specs(stage) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of the fields that a stage's encoders write, of one example."""
    if hasattr(stage, "encoded_specs"):  # also of a tokenizer that decodes alone
        return stage.encoded_specs
    spec = stage.batch_spec(1)
    found: dict[str, jax.ShapeDtypeStruct] = {}
    for do, op in stage.ops.items():
        if do.startswith("encode"):
            reads = [spec[name] for name in op.reads]
            made = jax.eval_shape(getattr(stage, do), abstract_params(stage), *reads)
            found |= dict(zip(op.writes, made if isinstance(made, tuple) else (made,), strict=True))
    return found


def zeros(spec: dict) -> dict:
    """A batch, or any tree, of zeros with the shapes of `spec`."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), spec)


def crop_tokens(tokens: jax.Array, token_mask: jax.Array, context_length: int) -> tuple[jax.Array, jax.Array]:
    """The first `context_length` tokens, a caption that is cut ending in its end-of-text token, its last
    real one.

    tokens [B, L] int32, token_mask [B, L] bool; shorter ones are padded with 0.
    """
    length = tokens.shape[1]
    if length <= context_length:
        pad = ((0, 0), (0, context_length - length))
        return jnp.pad(tokens, pad), jnp.pad(token_mask, pad)
    cut = token_mask[:, context_length]
    # the last real token: CLIP's highest id, T5's 1
    end = jnp.take_along_axis(tokens, token_mask.sum(axis=1, keepdims=True) - 1, axis=1)[:, 0]
    last = jnp.where(cut, end, tokens[:, context_length - 1])
    return tokens[:, :context_length].at[:, -1].set(last), token_mask[:, :context_length]
