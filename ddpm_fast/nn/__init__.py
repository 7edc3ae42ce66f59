"""Networks that use the fused ops: the tutorial U-Net and its parts."""

from .unet import ConvBlock, TimeEmbedding, UNet

__all__ = ["ConvBlock", "TimeEmbedding", "UNet"]
