"""Networks that use the fused ops: the tutorial U-Net, the DDPM paper's, and their parts."""

from .ddpm_unet import DDPMUNet
from .unet import ConvBlock, TimeEmbedding, UNet

__all__ = ["ConvBlock", "DDPMUNet", "TimeEmbedding", "UNet"]
