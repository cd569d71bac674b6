"""The null caption "" of stages with `null_tokens` (Karlo): the frozen CLIP's outputs for it.

A stage keeps them beside its weights and never trains them; diffusers has no other null caption.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.models import models

# Kind of stage -> its leaves of (the text embedding [E], the text states [n, D] of the n tokens).
LEAVES = {
    "prior": ("net/null_text_embed/embedding", "net/null_text_states/embedding"),
    "decoder": ("null_text_embed", "null_text_states/embedding"),
}


def encode(clip: Any, params: dict, tokenizer: Callable) -> tuple[jax.Array, jax.Array]:
    """(text embedding [E], text states [n, D] of its n tokens) of "", by a CLIP stage with its parameters."""
    tokens, mask = tokenizer([""])
    count = int(np.sum(mask))
    cut = models.crop_tokens(jnp.asarray(tokens), jnp.asarray(mask), clip.context_length)
    tokens, mask = map(np.asarray, cut)  # which may meet sharded parameters
    embed, states = jax.jit(clip.encode_text)(params, tokens, mask)
    return embed[0], states[0, :count]
