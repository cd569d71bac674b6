"""The settings of training common to all recipes, with defaults."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """A recipe without stage, model and data."""
    config = ConfigDict()
    config.stage = ""
    config.model = ConfigDict()  # keywords of dalle2_jax.models.stages.<stage>.build
    config.data = ConfigDict(  # of dalle2_jax.data.settings.DataSettings
        dict(
            source="tar",  # scenes | tar | parquet | tfrecord | tfds | folder | embeddings
            path="",
            split="train",
            eval_split="validation",
            language="en",  # en | zh | any
            flip=False,  # never where captions name sides
            data_dir="",
            image_field="",
            caption_field="",
            verify_sha256=False,
            allow_damaged="",  # files, with commas between
            max_bad_fraction=1e-3,
            num_workers=2,
            group=1,
            classes=(),  # (): the names that the data have
        )
    )
    # path: a folder or hub name; '': the frozen CLIP's tokenizer, or a byte-level BPE of vocab_size tokens
    # trained on the dataset's captions.
    config.tokenizer = ConfigDict(dict(path="", vocab_size=49408, context_length=77))
    config.optim = ConfigDict(  # fields of dalle2_jax.train.optim.Settings
        dict(
            optimizer="adamw",  # | adafactor
            learning_rate=1.2e-4,
            schedule="constant",
            final_fraction=0.0,
            decay_steps=0,  # of a schedule; 0: num_steps
            decay_fraction=1.0,
            warmup_steps=10_000,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            weight_decay=0.0,
            grad_clip=1.0,
            muon_learning_rate=0.0,
        )
    )
    config.batch_size = 0  # global, in examples
    config.num_steps = 0
    config.grad_accum = 1
    config.spike_sigma = 0.0  # skip steps so many deviations above the mean loss or norm; 0: none
    config.cpu_products = ""  # float32 | bfloat16 on CPUs; "": bfloat16 where the CPU has AMX
    config.ema_decay = 0.9999
    config.seed = 0
    config.clip = ""  # workdir or model directory of the frozen CLIP that computes embeddings
    config.frozen = ConfigDict()  # further frozen stages that compute fields: tokenizer="PATH"
    config.trainable = ()  # patterns of the parameters that are trained; (): all
    config.init_from = ""  # workdir or model directory of the initial parameters
    config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))  # -1: the remaining devices

    config.log_every = 100
    config.eval_every = 5_000
    config.eval_batches = 4
    config.sample_every = 10_000
    config.num_samples = 16
    config.sample_captions = ()  # what the samples show; (): captions of validation records
    config.sample_prior = ""  # workdir or model directory of the prior that draws their image embeddings
    config.checkpoint_every = 5_000
    config.keep_checkpoints = 3
    config.profile_at = 0  # first step of a profile; 0: none
    config.profile_steps = 5
    config.wandb = ""  # project name
    return config


def debug(config: ConfigDict, model: dict, side: int = 64) -> ConfigDict:
    """The preset `debug`: two steps on scenes of `side` pixels with the smaller `model`."""
    config.model.update(model)
    config.model.dtype = "float32"
    config.data.update(source="scenes", path=f"debug_{side}")
    config.tokenizer.update(vocab_size=512, context_length=32)
    config.mesh.update(data=-1, fsdp=1, tensor=1)
    config.batch_size, config.num_steps, config.optim.warmup_steps = 8, 2, 0
    config.log_every, config.eval_every, config.sample_every, config.checkpoint_every = 1, 2, 2, 2
    config.eval_batches, config.num_samples = 1, 4
    return config


def check_preset(preset: str, presets: tuple[str, ...]) -> None:
    """Raise ValueError for an unknown preset."""
    if preset not in ("", *presets):
        raise ValueError(f"preset {preset!r} is unknown; this config has {presets}")
