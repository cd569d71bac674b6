"""Gaussian diffusion without networks: noise schedules, losses and samplers, in jax and numpy only."""
