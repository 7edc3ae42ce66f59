"""What `ddpm_fast.Sampler` is made of: its choices, the loop on the device, CUDA graphs, inputs and outputs."""
