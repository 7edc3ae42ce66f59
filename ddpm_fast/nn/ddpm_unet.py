"""The U-Net of the DDPM paper (Ho et al. 2020, appendix B), with the options and the keys of diffusers' UNet2DModel."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from .ddpm_blocks import ACT, DownBlock, FourierFeatures, MidBlock, Sinusoids, Style, TimeMLP, UpBlock, norm_act
from .ddpm_config import ACTIVATIONS, checked


class DDPMUNet(nn.Module):
    """The paper's noise predictor. Keywords and state-dict keys are those of diffusers' `UNet2DModel`.

    The defaults are the paper's network for CIFAR-10 (google/ddpm-cifar10-32, 35.7 M parameters), not diffusers'.
    Attention is F.scaled_dot_product_attention; the convolution in front of a time embedding leaves its bias to
    `ops.add_bias_temb`. Old checkpoints' attention names (query, key, value, proj_attn) load too.

    Args:
        sample_size: None, the side of an image or (height, width); informs `Sampler`, the network takes any size whose
            sides are multiples of 2**(levels - 1).
        in_channels, out_channels: of the images in and out.
        center_input_sample: the network sees 2x - 1.
        time_embedding_type: "positional" (sinusoids), "fourier" (of log t, and the result is divided by t) or "learned"
            (a table of num_train_timesteps rows). time_embedding_dim: default 4 block_out_channels[0].
            time_proj_dim: length of the sinusoids (or table rows, or half of the features), default
            block_out_channels[0].
        freq_shift, flip_sin_to_cos: the two conventions of sinusoids, see `Sinusoids`.
        down_block_types, up_block_types: "DownBlock2D", "AttnDownBlock2D" or "ResnetDownsampleBlock2D", "UpBlock2D",
            "AttnUpBlock2D" or "ResnetUpsampleBlock2D" per level.
        mid_block_type: "UNetMidBlock2D" or None; add_attention: whether it has attention; mid_block_scale_factor: its
            results are divided by it; attn_norm_num_groups: groups of its attention's norm, default norm_num_groups,
            and no norm at all with "scale_shift".
        block_out_channels: per level. layers_per_block: residual blocks per level, one more on the way up.
        downsample_padding: 1, or 0 for zeros at the bottom and right only.
        downsample_type, upsample_type: of levels with attention, "conv" or "resnet"; the Resnet blocks are "resnet".
        dropout, act_fn ("silu", "swish", "mish", "gelu", "relu"), norm_num_groups, norm_eps: of the residual blocks.
        attention_head_dim: channels per head; None is one head. num_attention_heads: instead of it how many heads every
            attention has, or (down and mid, up).
        resnet_time_scale_shift: "default" adds the time embedding, "scale_shift" modulates the second norm with it.
        class_embed_type, num_class_embeds: class labels 0..num_class_embeds-1, or "timestep" (labels are embedded as
            timesteps are) or "identity" (labels are the embedding, (N, time_embedding_dim)); required then.

    num_attention_heads and time_proj_dim are not diffusers'; OpenAI's checkpoints need them.
    Raises ValueError or TypeError naming the argument that is not covered.
    """

    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 1,
        flip_sin_to_cos: bool = False,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: tuple[str, ...] = ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: tuple[int, ...] = (128, 256, 256, 256),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 0,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = None,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-6,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
        num_attention_heads: int | tuple[int, int] | None = None,
        time_proj_dim: int | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self.config = config = checked(given)
        """Keyword arguments that build this architecture again: `DDPMUNet(**net.config)`."""
        self.in_channels, self.out_channels, self.sample_size = in_channels, out_channels, config["sample_size"]
        widths: tuple[int, ...] = config["block_out_channels"]
        self.act = ACTIVATIONS[act_fn.lower()]
        style = Style(
            time_dim=time_embedding_dim or 4 * widths[0],
            groups=norm_num_groups,
            eps=norm_eps,
            act=self.act,
            dropout=dropout,
            time_scale_shift=resnet_time_scale_shift,
        )
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self._build_embeddings(time_proj_dim or widths[0], style.time_dim)
        self._build_stages(widths, style)
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, widths[0], norm_eps)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def _build_embeddings(self, width: int, time_dim: int) -> None:
        config, features = self.config, width
        self.time_proj: nn.Module
        if config["time_embedding_type"] == "fourier":
            self.time_proj, features = FourierFeatures(width), 2 * width
        elif config["time_embedding_type"] == "learned":
            self.time_proj = nn.Embedding(config["num_train_timesteps"], width)
        else:
            self.time_proj = Sinusoids(width, config["flip_sin_to_cos"], config["freq_shift"])
        self.time_embedding = TimeMLP(features, time_dim)
        self.class_embedding: nn.Module | None = None
        if config["class_embed_type"] == "timestep":
            self.class_embedding = TimeMLP(features, time_dim)
        elif config["class_embed_type"] == "identity":
            self.class_embedding = nn.Identity()
        elif config["num_class_embeds"] is not None:
            self.class_embedding = nn.Embedding(config["num_class_embeds"], time_dim)

    def _build_stages(self, widths: tuple[int, ...], style: Style) -> None:
        config, last = self.config, len(widths) - 1
        layers: int = config["layers_per_block"]

        def head_dim(block: str, width: int, way: int) -> int | None:
            """way: 0 down and in the middle, 1 up."""
            if not block.startswith("Attn"):
                return None
            heads = config.get("num_attention_heads")
            return width // heads[way] if heads else config["attention_head_dim"] or width

        def change(block: str, level: int, end: int, kind: str) -> str | None:
            """How a level hands over to the next one: plain blocks know a convolution only."""
            if level == end:
                return None
            return kind if block.startswith("Attn") else "resnet" if block.startswith("Resnet") else "conv"

        # As each list is assigned, its place among the keys is fixed.
        self.down_blocks, self.mid_block, self.up_blocks = nn.ModuleList(), None, nn.ModuleList()
        for level, block in enumerate(config["down_block_types"]):
            width = widths[level]
            pairs = [(widths[max(level - 1, 0)], width)] + [(width, width)] * (layers - 1)
            down = change(block, level, last, config["downsample_type"])
            padding = config["downsample_padding"]
            self.down_blocks.append(DownBlock(pairs, style, head_dim(block, width, 0), down, padding))
        if config["mid_block_type"] is not None:
            width = widths[-1]
            dim = head_dim("Attn" if config["add_attention"] else "", width, 0)
            default = style.groups if style.time_scale_shift == "default" else None
            mid_style = dataclasses.replace(style, scale=config["mid_block_scale_factor"])
            self.mid_block = MidBlock(width, mid_style, dim, config["attn_norm_num_groups"] or default)
        for i, block in enumerate(config["up_block_types"]):
            level = last - i
            width, above, below = widths[level], widths[max(level - 1, 0)], widths[min(level + 1, last)]
            # the first block is fed from below, the last one's skip comes from the level above
            pairs = [((width if k else below) + (width if k < layers else above), width) for k in range(layers + 1)]
            up = change(block, i, last, config["upsample_type"])
            self.up_blocks.append(UpBlock(pairs, style, head_dim(block, width, 1), up))

    # -- what it says about itself --------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the parameters are kept in, and images must be given in."""
        return self.conv_in.weight.dtype

    @property
    def num_classes(self) -> int | None:
        """How many class labels there are; None without a table of them."""
        return self.class_embedding.num_embeddings if isinstance(self.class_embedding, nn.Embedding) else None

    @property
    def null_label(self) -> None:
        """No label of these networks means "no label"; one trained that way is named by `Sampler(null_label=)`."""
        return None

    # -- what it does ---------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, t: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """Predicts the noise in x (or what else it was trained for).

        Args:
            x: (N, in_channels, H, W), the dtype of the parameters, H and W multiples of 2**(levels - 1).
            t: (N,), (1,) or 0-dim tensor or a number; sinusoids are computed in fp32.
            labels: (N,) whole numbers, or with class_embed_type="identity" (N, time_embedding_dim); required where
                the network has a class embedding. Out of range they are named on the CPU; CUDA has its own assertion.

        Returns:
            (N, out_channels, H, W) in the dtype of x.
        """
        self._check_images(x)
        t = self._times(x, t)
        temb = self._embed(t, labels)
        if self.config["center_input_sample"]:
            x = 2 * x - 1
        x = self.conv_in(x)
        skips = [x]
        for down in self.down_blocks:
            x, passed = down(x, temb)
            skips += passed
        if self.mid_block is not None:
            x = self.mid_block(x, temb)
        for up in self.up_blocks:
            x = up(x, skips, temb)
        y: Tensor = self.conv_out(norm_act(self.conv_norm_out, x, "silu"))
        if self.config["time_embedding_type"] == "fourier":
            y = (y / t.float()[:, None, None, None]).to(y.dtype)
        return y

    def _embed(self, t: Tensor, labels: Tensor | None) -> Tensor:
        """act(time embedding + class embedding), (N, time_dim), in the parameters' dtype."""
        emb: Tensor = self.time_embedding(self.time_proj(t).to(self.dtype))
        if self.class_embedding is None:
            if labels is not None:
                raise ValueError("labels were given to an unconditional DDPMUNet; build it with num_class_embeds=K")
            return ACT[self.act](emb)
        if labels is None:
            raise ValueError('labels are required: this DDPMUNet is class-conditional, and no label means "no label"')
        identity = self.config["class_embed_type"] == "identity"
        expected = (t.shape[0], emb.shape[1]) if identity else t.shape
        if labels.shape != expected:
            raise ValueError(f"labels must have shape {tuple(expected)}, got {tuple(labels.shape)}")
        if self.config["class_embed_type"] == "timestep":
            labels = self.time_proj(labels).to(self.dtype)
        elif isinstance(self.class_embedding, nn.Embedding):
            _check_rows("labels", labels, self.class_embedding.num_embeddings)
        emb = emb + self.class_embedding(labels).to(self.dtype)
        return ACT[self.act](emb)

    def _times(self, x: Tensor, t: Tensor | float) -> Tensor:
        """t as (N,) on the device of x."""
        if not isinstance(t, Tensor):
            dtype = torch.int64 if isinstance(t, int) else torch.float32
            t = torch.full((x.shape[0],), t, dtype=dtype, device=x.device)
        if t.shape not in (x.shape[:1], (1,), ()):
            raise ValueError(
                f"t must have shape ({x.shape[0]},), one per image, or be one number, got {tuple(t.shape)}"
            )
        if t.dtype == torch.bool or t.is_complex():
            raise TypeError(f"t must be an integer or floating tensor, got {t.dtype}")
        if isinstance(self.time_proj, nn.Embedding):
            _check_rows("t", t, self.time_proj.num_embeddings)
        return t.to(x.device).reshape(-1).expand(x.shape[0])

    def _check_images(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must have shape (N, {self.in_channels}, H, W), got {tuple(x.shape)}")
        m = 1 << (len(self.down_blocks) - 1)
        h, w = x.shape[2:]
        if h % m or w % m or not h or not w:
            fit = tuple(max(-(-size // m), 1) * m for size in (h, w))
            raise ValueError(
                f"height and width of x must be multiples of {m} ({len(self.down_blocks)} levels), got ({h}, {w}); "
                f"pad or resize to the next valid size {fit}"
            )


def _check_rows(name: str, index: Tensor, rows: int) -> None:
    """TypeError or ValueError for what does not index a table of so many rows, as far as the host can see."""
    if index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, the row of a table, got {index.dtype}")
    if index.device.type == "cpu" and not torch.compiler.is_compiling() and index.numel():
        low, high = (int(value) for value in index.aminmax())
        if low < 0 or high >= rows:
            raise ValueError(f"{name} must be in 0..{rows - 1}, got {low}..{high}")
