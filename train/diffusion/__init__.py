"""Diffusion processes as pure functions of tensors: timesteps and noise are arguments, never drawn inside a step."""
