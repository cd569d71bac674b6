"""The diffusion prior: caption and CLIP text embedding -> CLIP image embedding (section 2.2 of the paper).

With z the scaled image embedding, y the caption and its CLIP text embedding, t uniform in 0 .. T-1,

    x_t  = sqrt(alpha_bar) z + sqrt(1 - alpha_bar) eps
    loss = mean over the entries of (f(x_t, t, y) - z)^2

The text is dropped, caption and text embedding together, from a tenth of the examples; the noised embedding
never is. Sampling draws `num_candidates` embeddings a caption and keeps the one whose cosine with the text
embedding is largest. The paper found that guiding the prior harms, so the guidance scale is 1 unless asked
otherwise.

Embeddings are scaled before they are noised, as the noise has unit variance: see `EmbedScale`.

The paper samples with Analytic-DPM in 64 strided steps: method 'analytic' of `diffusion.sampling`, whose
statistics are measured with the trained network over training data (`Prior.measure`) and kept with its
parameters.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.models.diffusion import gaussian, schedules
from dalle2_jax.models.diffusion.guidance import NO_RULES, Guidance, check_rules, is_guided, pop_rules
from dalle2_jax.models.diffusion.process import Times
from dalle2_jax.models.nets.transformer import PriorTransformer
from dalle2_jax.models.stages import Loss, Op, candidates, check_settings, narrow_in_loop
from dalle2_jax.models.stages.clip import unit_norm
from dalle2_jax.models.stages.settings import (
    CANDIDATES,
    ETA,
    GUIDANCE,
    METHOD,
    STEPS,
)

SCALE_MODES = ("paper", "l2", "meanstd")
# 17.2 was chosen for unit vectors of 1024 entries; what it fixes is an entry's standard deviation, 17.2 / 32.
PAPER_STD = 17.2 / 32.0
SETTINGS = (*GUIDANCE, STEPS, METHOD, ETA, CANDIDATES)


@dataclasses.dataclass(frozen=True)
class EmbedScale:
    """The affine map of image embeddings to the space in which they are noised, and its inverse; both pure.

    'paper'    x * 17.2 sqrt(E / 1024): a unit vector's entries get standard deviation 0.5375 for every size E
    'l2'       x * sqrt(E): standard deviation 1
    'meanstd'  (x - embed_mean) / embed_std by entry, for embeddings that need not be of unit norm; the
               statistics are parameters without gradient, set by `Prior.fit`
    """

    mode: str
    embed_dim: int

    @property
    def factor(self) -> float:
        """The factor of 'paper' and 'l2', by which the text embedding is multiplied too; 1 for 'meanstd'."""
        std = {"paper": PAPER_STD, "l2": 1.0, "meanstd": 0.0}[self.mode]
        return std * math.sqrt(self.embed_dim) or 1.0

    def transform(self, params: dict, image_embed: jax.Array) -> jax.Array:
        """image_embed [..., E] -> z [..., E], float32."""
        x = image_embed.astype(jnp.float32)
        if self.mode == "meanstd":
            mean, std = _stats(params)
            return (x - mean) / std
        return x * self.factor

    def inverse(self, params: dict, z: jax.Array) -> jax.Array:
        """z [..., E] -> image_embed [..., E], float32."""
        if self.mode == "meanstd":
            mean, std = _stats(params)
            return z * std + mean
        return z / self.factor


def _stats(params: dict) -> tuple[jax.Array, jax.Array]:
    stats = jax.lax.stop_gradient(params["stats"])
    return stats["embed_mean"], stats["embed_std"]


@dataclasses.dataclass(frozen=True)
class Prior:
    """The prior's network, noise process and sampling defaults; parameters go to every call.

    Parameters are {'net': ...}, in mode 'meanstd' also 'stats': {'embed_mean', 'embed_std'}, and with method
    'analytic' also 'stats': {'eps_sq' [T]}; statistics have no gradient.
    """

    ops = {"sample": Op(("image_embed",))}
    net: PriorTransformer
    diffusion: gaussian.GaussianDiffusion
    embed_scale: EmbedScale
    embed_dim: int
    context_length: int
    states_width: int
    text_drop: float
    num_candidates: int
    guidance_scale: float

    @property
    def null_tokens(self) -> int:
        """How many positions the null caption has whose states may be read."""
        return self.net.null_tokens

    @property
    def sampling(self) -> dict:
        """The settings of `sample` and their defaults."""
        own = self.diffusion
        return dict(
            num_steps=own.num_steps,
            guidance_scale=self.guidance_scale,
            num_candidates=self.num_candidates,
            method=own.method,
            eta=own.eta,
            **NO_RULES,
        )

    def check(self, settings: dict) -> None:
        """Raises ValueError for settings of `sample` that this stage cannot take."""
        check_rules(settings, self.diffusion.schedule)
        self.diffusion.with_settings(settings["num_steps"], settings.get("method")).timesteps()

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The fields that `loss` reads; `sample` reads the same without `image_embed`."""
        spec = {
            "image_embed": jax.ShapeDtypeStruct((batch_size, self.embed_dim), jnp.float32),
            "text_embed": jax.ShapeDtypeStruct((batch_size, self.embed_dim), jnp.float32),
            "token_mask": jax.ShapeDtypeStruct((batch_size, self.context_length), jnp.bool_),
        }
        if self.states_width:
            shape = (batch_size, self.context_length, self.states_width)
            return spec | {"text_states": jax.ShapeDtypeStruct(shape, jnp.float32)}
        return spec | {"tokens": jax.ShapeDtypeStruct((batch_size, self.context_length), jnp.int32)}

    def init(self, key: jax.Array, batch: dict) -> dict:
        """Float32 parameters; the statistics of mode 'meanstd' are those of the identity: see `fit`."""
        t = jnp.zeros(batch["image_embed"].shape[0], jnp.int32)
        drop = jnp.zeros(t.shape, bool)
        params = {"net": self.net.init(key, batch["image_embed"], t, *self._text(batch), drop)["params"]}
        stats: dict[str, jax.Array] = {}
        if self.embed_scale.mode == "meanstd":
            stats |= {"embed_mean": jnp.zeros(self.embed_dim), "embed_std": jnp.ones(self.embed_dim)}
        if self.diffusion.method == "analytic":  # nothing can be drawn with them until they are measured
            stats["eps_sq"] = jnp.full(self.diffusion.schedule.num_timesteps, jnp.nan)
        return params | ({"stats": stats} if stats else {})

    def measure(self, params: dict, key: jax.Array, batch: dict) -> dict:
        """What sampling needs to know of the trained network, over one batch; averages of it over batches
        become statistics of the same names. Empty unless the method is 'analytic'.
        """
        if self.diffusion.method != "analytic":
            return {}
        z = self.embed_scale.transform(params, batch["image_embed"])
        keep = jnp.zeros(z.shape[0], bool)

        def network(x_t, t):
            return self.net.apply({"params": params["net"]}, x_t, t, *self._text(batch), keep)

        return {"eps_sq": self.diffusion.measure_eps_sq(network, key, z)}

    @property
    def fit_rows(self) -> int:
        """Training examples that `fit` reads."""
        return 4096 if self.embed_scale.mode == "meanstd" else 0

    def fit(self, params: dict, batches: Callable[[], Iterable[dict]]) -> tuple[dict, dict[str, float]]:
        """(`params` with mean and standard deviation of `image_embed` by entry, scalars that describe them).

        batches() yields dicts of arrays [n, E]. Raises ValueError unless the mode is 'meanstd'.
        """
        if self.embed_scale.mode != "meanstd":
            raise ValueError(
                f"embed_scale.mode {self.embed_scale.mode!r} has no statistics: set it to 'meanstd'"
            )
        x = np.concatenate([np.asarray(batch["image_embed"], np.float64) for batch in batches()])
        moments = {"embed_mean": x.mean(axis=0), "embed_std": np.maximum(x.std(axis=0), 1e-6)}
        fitted = {name: jnp.asarray(value, jnp.float32) for name, value in moments.items()}
        scalars = dict(rows=len(x), mean_std=float(fitted["embed_std"].mean()))
        return params | {"stats": params["stats"] | fitted}, scalars

    def _text(self, batch: dict) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(text_embed, tokens or states, token_mask) for the network; ValueError for another length."""
        text = batch["text_states"] if self.states_width else batch["tokens"]
        for length in (text.shape[1], batch["token_mask"].shape[1]):
            if length != self.context_length:
                raise ValueError(
                    f"the prior reads captions of {self.context_length} positions, got {length}: "
                    "give tokenizer and prior the same context_length"
                )
        return batch["text_embed"] * self.embed_scale.factor, text, batch["token_mask"]

    def loss(
        self, params: dict, key: jax.Array, batch: dict, *, step: jax.Array | int = 0, train: bool = True
    ) -> Loss:
        """Mean loss over the batch and its scalars; `train=False` drops no text."""
        size = batch["image_embed"].shape[0]
        diffusion_key, drop_key = jax.random.split(key)
        z = self.embed_scale.transform(params, batch["image_embed"])
        drop = jax.random.bernoulli(drop_key, self.text_drop, (size,)) & train

        def network(x_t, t):
            return self.net.apply({"params": params["net"]}, x_t, t, *self._text(batch), drop)

        losses, metrics, predicted = self.diffusion.loss(diffusion_key, network, z, train=train)
        predicted = unit_norm(self.embed_scale.inverse(params, predicted))
        cosine = (predicted * unit_norm(batch["image_embed"])).sum(axis=-1)
        metrics = metrics | {"loss": losses, "cosine": cosine}
        return Loss(losses.mean(), {name: value.mean() for name, value in metrics.items()})

    def sample(
        self,
        params: dict,
        keys: jax.Array,
        batch: dict,
        *,
        return_candidates: bool = False,
        **settings,
    ) -> jax.Array:
        """Image embeddings [B, E] float32 in CLIP's own scale, one key a caption.

        Reads text_embed, token_mask and tokens (or text_states). A sample depends on its own key and caption
        alone; the first of n candidates is the only one of one. return_candidates: all of them,
        [B, num_candidates, E], none chosen.

        settings: values in the place of those in `sampling`, None for those. A guidance scale given as the
        Python number 1 saves the unconditional half of the work; an array is traced. Method 'ddpm' has the
        small fixed variance; 'analytic' needs parameters that hold its statistics. Other
        guidance_RULE: see `guidance.Guidance`.
        """
        settings = self.sampling | {name: value for name, value in settings.items() if value is not None}
        scale, rules = settings.pop("guidance_scale"), pop_rules(settings)
        num_candidates = settings.pop("num_candidates")
        diffusion, size = self.diffusion.with_settings(**settings), batch["text_embed"].shape[0]

        # The conditional and the null half of a candidate are neighbours, as candidates are.
        keys = candidates.split_keys(keys, num_candidates)
        halves = jnp.array([False, True] if is_guided(scale) else [False])
        text = [jnp.repeat(x, len(halves), axis=0) for x in self._text(batch)]
        read = self.net.read(params["net"], *text, jnp.tile(halves, size))
        read = candidates.spread(read, size, num_candidates)

        def network_of(read):
            def network(x_t, t):
                own, x = narrow_in_loop(params["net"], x_t)
                return self.net.apply({"params": own} | read, x, t)

            return network

        if is_guided(scale):
            scale = jnp.repeat(scale, num_candidates) if jnp.ndim(scale) else scale
            conditional = network_of(jax.tree.map(lambda x: x[0::2], read))
            denoise = diffusion.denoiser(conditional, guidance=Guidance(network_of(read), scale, **rules))
        else:
            denoise = diffusion.denoiser(network_of(read))
        eps_sq = params.get("stats", {}).get("eps_sq")
        z: Any = diffusion.sample(denoise, keys, (self.embed_dim,), eps_sq=eps_sq)
        z = self.embed_scale.inverse(params, z)
        if return_candidates:
            return z.reshape(size, num_candidates, self.embed_dim)
        return candidates.closest(z, batch["text_embed"])


def build(
    *,
    embed_dim: int,
    text: dict,
    embed_scale: dict | None = None,
    text_drop: float = 0.1,
    schedule: str = "cosine",
    num_timesteps: int = 1000,
    objective: str = "x0",
    weighting: str = "uniform",
    num_steps: int = 64,
    spacing: str = "uniform",
    method: str = "ddpm",
    eta: float = 0.0,
    num_candidates: int = 2,
    guidance_scale: float = 1.0,
    clip_range: float | None = None,
    process: dict | None = None,
    remat: bool | str = "none",
    scan_blocks: bool = False,
    dtype: str = "float32",
) -> Prior:
    """The prior of a config; defaults are the paper's, but for its method, 'analytic'. Raises ValueError for
    settings that are unknown, missing or do not go together.

    Args:
      embed_dim: size of CLIP's embeddings.
      text: dict(width, depth, num_heads, context_length) of the transformer, with `vocab_size` to learn the
        caption's token embeddings (the paper's way), or `states_width` to read the states of the frozen
        CLIP's text transformer. Then also null_tokens: with n > 0 the null caption is "" with its n tokens,
        as CLIP encodes it; 0, the default, is a learned null.
      embed_scale: dict(mode='paper' | 'l2' | 'meanstd'), see EmbedScale; None is 'paper'.
      text_drop: how often the text is dropped in training.
      schedule, num_timesteps: of the noise, see diffusion.schedules.
      objective, weighting: what the network predicts, and the loss over t, see diffusion.process.
      num_steps, spacing, method, eta, num_candidates, guidance_scale: defaults of `sample`.
      clip_range: bound of |z| in sampling, in the scaled space (Karlo's weights: 5 or 10); None: no bound.
      process: fields of `diffusion.process.Times`.
      remat: what of a block is computed again in the backward pass, 'none', 'products' (all else) or 'all'.
      scan_blocks: compile the blocks as one loop, see `TransformerStack`. dtype: compute type of the network.
    """
    embed_scale = {"mode": "paper"} if embed_scale is None else embed_scale
    check_settings(embed_scale, ("mode",), (), "embed_scale")
    if embed_scale["mode"] not in SCALE_MODES:
        raise ValueError(f"embed_scale.mode {embed_scale['mode']!r} is unknown; choose one of {SCALE_MODES}")
    _check_text(text)
    check_settings(process or {}, (), Times._fields, "process")
    if not 0 <= text_drop < 1:
        raise ValueError(f"text_drop must be in [0, 1), got {text_drop}")
    return Prior(
        net=PriorTransformer(
            embed_dim=embed_dim, **text, remat=remat, dtype=jnp.dtype(dtype), scan=scan_blocks
        ),
        # Embeddings are not bounded by 1: nothing is clipped unless the weights come with a range.
        diffusion=gaussian.GaussianDiffusion(
            schedule=schedules.make_schedule(schedule, num_timesteps),
            objective=objective,
            learned_variance=False,
            weighting=weighting,
            num_steps=num_steps,
            spacing=spacing,
            method=method,
            eta=eta,
            limit=clip_range,
            data="latents",
            times=Times(**(process or {})),
            data_variance=PAPER_STD**2 if embed_scale["mode"] == "paper" else 1.0,
        ),
        embed_scale=EmbedScale(embed_scale["mode"], embed_dim),
        embed_dim=embed_dim,
        context_length=text["context_length"],
        states_width=text.get("states_width", 0),
        text_drop=text_drop,
        num_candidates=num_candidates,
        guidance_scale=guidance_scale,
    )


def _check_text(text: dict) -> None:
    """Raise ValueError for settings of `text` that are unknown, missing or do not go together."""
    required = ("width", "depth", "num_heads", "context_length")
    check_settings(text, required, ("vocab_size", "states_width", "null_tokens"), "text")
    if bool(text.get("vocab_size")) == bool(text.get("states_width")):
        raise ValueError(
            "text needs either vocab_size (learned token embeddings) or states_width (a frozen CLIP's states)"
        )
    if text.get("null_tokens") and not text.get("states_width"):
        raise ValueError(
            "text.null_tokens is for a prior on CLIP's states: set text.states_width, or leave it out"
        )
