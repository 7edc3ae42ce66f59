"""Networks that use the fused ops: the tutorial U-Net, the DDPM paper's, lucidrains', and their parts."""

from .ddpm_unet import DDPMUNet
from .rms_unet import RMSNormUNet
from .unet import ConvBlock, TimeEmbedding, UNet

__all__ = ["ConvBlock", "DDPMUNet", "RMSNormUNet", "TimeEmbedding", "UNet"]
