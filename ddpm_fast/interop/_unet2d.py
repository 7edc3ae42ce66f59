"""`DDPMUNet` with the face of diffusers' `UNet2DModel`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets import unet_2d
from torch import Tensor

from .. import inference
from ..nn import DDPMUNet
from ._signature import signature_of
from ._unets import new_keys, unet_arguments


class _Unbuilt(unet_2d.UNet2DModel):
    """diffusers' class without its layers: what its own functions ask `isinstance` of."""

    def __init__(self) -> None:
        ModelMixin.__init__(self)


class UNet2DModel(DDPMUNet, _Unbuilt):
    """diffusers' `UNet2DModel` (same constructor, defaults, call, files) with `DDPMUNet`'s layers and state-dict keys.

    Runs wherever diffusers takes one of its own; saved files are as its own. `enable_fused()` makes calls in eval mode
    without gradients run a fused plan. ValueError for blocks that `DDPMUNet` does not cover.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    @signature_of(unet_2d.UNet2DModel)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # The registered config has every argument, those left at diffusers' defaults too.
        super().__init__(**unet_arguments(self.config, type(self).__name__))
        # Pipelines save the name of the module that an object gives: theirs, so that their folder needs no ddpm_fast.
        self.__module__ = "diffusers"
        self._fused_as: tuple[torch.dtype | None] | None = None
        self._compiled: inference.Compiled | None = None

    @property
    def config(self) -> Any:
        """diffusers' frozen config."""
        return self._internal_dict

    @config.setter
    def config(self, checked: dict[str, Any]) -> None:
        """`DDPMUNet` writes its own here, the same but for the types of sequences."""
        self._checked = checked

    def forward(  # type: ignore[override]
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> unet_2d.UNet2DOutput | tuple[Tensor]:
        """sample (N, C, H, W), timestep (N,), (1,), 0-dim or a number -> UNet2DOutput(sample) or a tuple of it."""
        if self._fused_as is not None and not self.training and not torch.is_grad_enabled():
            self._check_images(sample)
            t = self._times(sample, timestep).contiguous()
            output = self._plan()(sample, t, class_labels).to(sample.dtype)
        else:
            output = super().forward(sample, timestep, class_labels)
        return unet_2d.UNet2DOutput(sample=output) if return_dict else (output,)

    # -- fused plans ------------------------------------------------------------------------------------------------

    def enable_fused(self, dtype: torch.dtype | None = None) -> None:
        """Calls in eval mode without gradients run a fused plan (`ddpm_fast.inference.compile`), in `dtype`.

        None is the model's own. The first call for a batch and image size makes the plan, in seconds. Raises TypeError
        where no plan is known for the network, ValueError for a dtype that plans do not compute in.
        """
        reason = inference.unknown_reason(self._twin())
        if reason is not None:
            raise TypeError(reason)
        if dtype is not None and dtype not in inference.DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, inference.DTYPES))}, got {dtype}")
        self._fused_as, self._compiled = (dtype,), None

    def disable_fused(self) -> None:
        """Calls run the network itself again."""
        self._fused_as = self._compiled = None

    def _twin(self) -> DDPMUNet:
        """A `DDPMUNet` of the same submodules, which plans know and call as such; what is done to ours, it sees."""
        twin = DDPMUNet.__new__(DDPMUNet)
        twin.__dict__ = {**self.__dict__, "config": self._checked, "training": False}
        return twin

    def _plan(self) -> inference.Compiled:
        if self._compiled is None:
            assert self._fused_as is not None
            self._compiled = inference.compile(self._twin(), dtype=self._fused_as[0])
        return self._compiled

    def __getstate__(self) -> dict[str, Any]:
        # A plan is of this machine and this object.
        return {**self.__dict__, "_compiled": None}

    # -- files ------------------------------------------------------------------------------------------------------

    def _fix_state_dict_keys_on_load(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """diffusers' hook for old files: renames attention's layers in place."""
        renamed = new_keys(state_dict)
        state_dict.clear()
        state_dict.update(renamed)
        return state_dict
