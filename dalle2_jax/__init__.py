"""DALL·E 2 (unCLIP) in JAX: CLIP, diffusion prior, decoder and upsamplers, all trained by one loop.

Importing the package starts nothing: no device, no TensorFlow, no network. The commands are
`python -m dalle2_jax.train`, `python -m dalle2_jax.generate` and their siblings; `docs/design.md` shows which
file holds what.
"""

__version__ = "0.1.0"
