"""Networks as Flax Linen modules: the only folder that imports flax.linen, and the one that knows no
diffusion."""
