"""Gaussian diffusion without networks: noise schedules, training losses and samplers, in jax and numpy only."""
