"""Other libraries' checkpoints and classes. What needs the library itself is in a module of its name, such as
`ddpm_fast.interop.diffusers`; folders and state dicts are read and written without it.
"""

from ._unets import from_diffusers, load_unet, new_keys, old_keys, save_unet, to_diffusers

__all__ = ["from_diffusers", "load_unet", "new_keys", "old_keys", "save_unet", "to_diffusers"]
