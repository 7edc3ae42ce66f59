"""`DDPMUNet` with the face of OpenAI's `UNetModel`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..nn import DDPMUNet
from ..nn.ddpm_blocks import Attention, ResnetBlock
from ._openai_flags import UNCOVERED, check_size, widths_of
from ._openai_keys import to_ours, to_theirs
from ._openai_shape import CLASS, Heads, Shape, ddpm_arguments
from ._weights import check_state


class UNetModel(DDPMUNet):
    """OpenAI's network: arguments (in guided-diffusion's order), call and state dict; `DDPMUNet`'s layers and maths.

    image_size: side of the images, for which attention_resolutions are factors of reduction (4 is a quarter of it).
    num_heads, num_heads_upsample (-1: the same), num_head_channels (not -1: heads of that size, however many).
    use_checkpoint is accepted and changes nothing; use_fp16 says nothing before `convert_to_fp16` is called.
    `state_dict` is a copy where it holds q, k and v of attention: write with `load_state_dict`, which takes OpenAI's
    keys and `DDPMUNet`'s. Parameters have `DDPMUNet`'s names. ValueError for values of dims and conv_resample that are
    not covered.
    """

    def __init__(
        self,
        image_size: int | None,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float = 0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
    ) -> None:
        for name, value in (("conv_resample", conv_resample), ("dims", dims)):
            if value != UNCOVERED[name]:
                raise ValueError(f"{name}={value!r} is not covered, only {UNCOVERED[name]!r}")
        check_size(image_size, len(channel_mult))
        shape = Shape(
            in_channels=in_channels,
            out_channels=out_channels,
            num_channels=model_channels,
            num_res_blocks=num_res_blocks,
            widths=widths_of(model_channels, channel_mult),
            attention=tuple(2**level in attention_resolutions for level in range(len(channel_mult))),
            scale_shift=use_scale_shift_norm,
            updown=resblock_updown,
            num_classes=num_classes,
        )
        heads = Heads(num_heads, num_heads_upsample, num_head_channels)
        super().__init__(**ddpm_arguments(shape, heads, image_size=image_size, dropout=dropout))
        self.image_size, self.model_channels, self.num_res_blocks = image_size, model_channels, num_res_blocks
        self.channel_mult, self.attention_resolutions = tuple(channel_mult), tuple(attention_resolutions)
        self.num_heads, self.num_head_channels, self.num_heads_upsample = num_heads, num_head_channels, heads.upsample
        self.use_new_attention_order = use_new_attention_order
        self._start_at_zero()

    def _start_at_zero(self) -> None:
        """Every residual branch and the network itself begin as nothing."""
        for part in self.modules():
            if isinstance(part, (ResnetBlock, Attention)):
                last = part.conv2 if isinstance(part, ResnetBlock) else part.to_out[0]
                for parameter in last.parameters():
                    nn.init.zeros_(parameter)
        for parameter in self.conv_out.parameters():
            nn.init.zeros_(parameter)

    def forward(  # type: ignore[override]
        self, x: Tensor, timesteps: Tensor | float, y: Tensor | None = None
    ) -> Tensor:
        """x (N, C, H, W), timesteps (N,) of any real dtype, y (N,) labels exactly if class-conditional; like x."""
        if (y is None) != (self.num_classes is None):
            given = "none was given" if y is None else "one was given"
            needs = "no y" if self.num_classes is None else f"y, labels in 0..{self.num_classes - 1}"
            raise ValueError(f"this {CLASS} takes {needs}, and {given}")
        return super().forward(x.to(self.dtype), timesteps, y).to(x.dtype)

    def convert_to_fp16(self) -> None:
        """All weights to float16 (OpenAI's keeps those of the time embedding and of the output in float32)."""
        self.half()

    def convert_to_fp32(self) -> None:
        """All weights to float32."""
        self.float()

    # -- their keys -------------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """OpenAI's keys; arguments as in `torch.nn.Module`."""
        given = {**dict(zip(("destination", "prefix", "keep_vars"), args, strict=False)), **kwargs}
        own = super().state_dict(keep_vars=given.get("keep_vars", False))
        result, prefix = given.get("destination"), given.get("prefix", "")
        result = OrderedDict() if result is None else result
        for key, value in to_theirs(own, self.config, self.use_new_attention_order).items():
            result[f"{prefix}{key}"] = value
        return result

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """OpenAI's keys, or `DDPMUNet`'s. RuntimeError naming what is missing, unexpected or of another shape."""
        if strict and not _ours(state_dict):
            try:
                check_state(state_dict, self.state_dict(), "the state dict")
            except ValueError as error:
                raise RuntimeError(str(error)) from None
        return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        mine = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        if _ours(mine):
            # OpenAI's training loop puts averaged weights into a state dict by the parameters' names; they count.
            mine = {key: value for key, value in mine.items() if key not in self.state_dict()}
        else:
            mine = to_ours(mine, self.config, self.use_new_attention_order)
        for key in [key for key in state_dict if key.startswith(prefix)]:
            del state_dict[key]
        state_dict.update({f"{prefix}{key}": value for key, value in mine.items()})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _ours(state: Mapping[str, Any]) -> bool:
    """Whether the keys are those of a `DDPMUNet`."""
    return "conv_in.weight" in state


def twin(model: UNetModel) -> DDPMUNet:
    """A `DDPMUNet` of the same submodules, which plans know; what is done to the model's, it sees."""
    net = DDPMUNet.__new__(DDPMUNet)
    net.__dict__ = dict(model.__dict__)
    return net
