"""A stage from outside of the package: pictures as codes of a code book that is a moving average.

Each 4 x 4 patch of a picture is the entry of the code book nearest to its projection (arXiv:1711.00937, with
the moving average of appendix A.1). The code book is drawn from by the share of each code.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dalle2_jax.models.stages import Loss, Op

SIDE, PATCH = 2, 4  # patches a side of a picture, pixels a side of a patch
DECAY = 0.9


@dataclasses.dataclass(frozen=True)
class CodeBook:
    """The settings; parameters go to every call."""

    num_codes: int
    width: int = 4
    image_size: int = SIDE * PATCH
    ops = {
        "sample": Op(("codes",), ()),
        "encode": Op(("codes",), ("image",)),
        "decode": Op(("image",), ("codes",)),
    }

    def batch_spec(self, batch_size):
        side = self.image_size
        return {"image": jax.ShapeDtypeStruct((batch_size, side, side, 3), jnp.float32)}

    def init(self, key, batch):
        one, two, three = jax.random.split(key, 3)
        book = jax.random.normal(three, (self.num_codes, self.width))
        size = 3 * PATCH**2
        return {
            "fc1": {"kernel": jax.random.normal(one, (size, self.width)) / 7},
            "fc2": {"kernel": jax.random.normal(two, (self.width, size)) / 2},
            "stats": {"codes": book, "sums": book, "counts": jnp.ones(self.num_codes)},
        }

    def _nearest(self, params, image):
        """(patches [B, 4, 48], their projections [B, 4, D], their codes [B, 4])."""
        x = image.reshape(-1, SIDE, PATCH, SIDE, PATCH, 3).swapaxes(2, 3).reshape(len(image), SIDE**2, -1)
        z = x @ params["fc1"]["kernel"]
        return x, z, jnp.square(z[:, :, None] - params["stats"]["codes"]).sum(-1).argmin(-1)

    def loss(self, params, key, batch, *, step=0, train=True):
        x, z, codes = self._nearest(params, batch["image"])
        chosen = jax.nn.one_hot(codes, self.num_codes)  # [B, 4, K]
        nearest = chosen @ params["stats"]["codes"]  # has a gradient, which training must not follow
        commit = jnp.square(z - nearest).mean()
        out = (z + jax.lax.stop_gradient(nearest - z)) @ params["fc2"]["kernel"]
        statistics = {"counts": chosen.sum((0, 1)), "sums": jnp.einsum("bpk,bpd->kd", chosen, z)}
        scalars = {"commit": commit, "step": jnp.float32(step)}
        return Loss(jnp.square(out - x).mean() + commit, scalars, statistics)

    def update(self, params, statistics, key):
        assert statistics["sums"].shape == (2, self.num_codes, self.width)  # one for each part of the batch
        old, new = params["stats"], jax.tree.map(lambda x: x.sum(axis=0), statistics)
        counts, sums = (DECAY * old[name] + (1 - DECAY) * new[name] for name in ("counts", "sums"))
        codes = sums / counts[:, None]
        # a code that hardly any patch has moves beside another one
        where, how_far = jax.random.split(key)
        other = codes[jax.random.randint(where, (self.num_codes,), 0, self.num_codes)]
        other += 0.1 * jax.random.normal(how_far, other.shape)
        codes = jnp.where(counts[:, None] < 0.7, other, codes)
        stats = {"codes": codes, "sums": counts[:, None] * codes, "counts": counts}
        return params | {"stats": stats}, {"used": (new["counts"] > 0).mean()}

    def sample(self, params, keys, batch=None):
        """Codes [B, 4], one key a picture."""
        logits = jnp.log(params["stats"]["counts"])
        return jax.vmap(lambda key: jax.random.categorical(key, logits, shape=(SIDE**2,)))(keys)

    def encode(self, params, image):
        """[B, 8, 8, 3] in [-1, 1] -> codes [B, 4] int32."""
        return self._nearest(params, image)[2].astype(jnp.int32)

    def decode(self, params, codes):
        """codes [B, 4] -> [B, 8, 8, 3] in [-1, 1]."""
        x = (params["stats"]["codes"][codes] @ params["fc2"]["kernel"]).clip(-1, 1)
        x = x.reshape(-1, SIDE, SIDE, PATCH, PATCH, 3).swapaxes(2, 3)
        return x.reshape(-1, self.image_size, self.image_size, 3)


def build(*, num_codes: int) -> CodeBook:
    """Of a config."""
    return CodeBook(num_codes)
