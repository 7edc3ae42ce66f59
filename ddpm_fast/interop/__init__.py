"""Other libraries' checkpoints and classes: `ddpm_fast.interop.diffusers`. Each is imported when it is asked for."""
