"""Networks that use the fused ops: the tutorial U-Net, the DDPM paper's, lucidrains', and their parts; an MLP."""

from .ddpm_unet import DDPMUNet
from .mlp import MLP
from .rms_unet import RMSNormUNet
from .unet import ConvBlock, TimeEmbedding, UNet

__all__ = ["MLP", "ConvBlock", "DDPMUNet", "RMSNormUNet", "TimeEmbedding", "UNet"]
