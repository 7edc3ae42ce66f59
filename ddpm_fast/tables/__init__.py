"""What `ddpm_fast.Schedule` computes with, all in float64: betas, lists of timesteps, coefficients of the steps."""
