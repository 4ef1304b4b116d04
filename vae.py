"""AudioLDM's variational auto-encoder: the perceptual compression between log-mels and latents.

Section II-A and Fig. 1.  A mel of T frames x 64 bands is treated as an image with one channel and becomes a latent
with 8 channels, a quarter as long and a quarter as high:

    encode   mel (B, T, 64) -> mean, logvar, each (B, 8, T/4, 16)        T a multiple of 4
    decode   z (B, 8, T/4, 16) -> mel (B, T, 64)

A mel has 100 frames a second at every sampling rate, so this one network serves all four rates.  mean, logvar and z
are unscaled.  The diffusion model's z_0 = scale_factor * z, undone before decoding; its standard deviation is 1 with
AudioLDM's VAE, 0.3 with one trained here (train.py: LATENT_STD).
"""
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weights

# Published name -> ours, read in both directions (weights.rename).  AudioLDM's own names are kept but for two;
# diffusers saves the same tensors under names of its own, and counts the decoder's levels from the other end.
AUDIOLDM_NAMES = [(".nin_shortcut.", ".shortcut."), (".attn_1.", ".attention.")]
DIFFUSERS_NAMES = [
    ("encoder.down_blocks.{}.", "encoder.down.{}."),
    ("decoder.up_blocks.0.", "decoder.up.2."),
    ("decoder.up_blocks.1.", "decoder.up.1."),
    ("decoder.up_blocks.2.", "decoder.up.0."),
    ("down.{}.resnets.", "down.{}.block."),
    ("up.{}.resnets.", "up.{}.block."),
    (".downsamplers.0.", ".downsample."),
    (".upsamplers.0.", ".upsample."),
    (".conv_shortcut.", ".shortcut."),
    (".mid_block.resnets.0.", ".mid.block_1."),
    (".mid_block.resnets.1.", ".mid.block_2."),
    (".mid_block.attentions.0.", ".mid.attention."),
    (".attention.group_norm.", ".attention.norm."),
    (".attention.to_q.", ".attention.q."),
    (".attention.to_k.", ".attention.k."),
    (".attention.to_v.", ".attention.v."),
    (".attention.to_out.0.", ".attention.proj_out."),
    (".conv_norm_out.", ".norm_out."),
]
OLD_DIFFUSERS_NAMES = [(".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0.")]


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), (B, C_in, H, W) -> (B, C_out, H, W)."""

    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class Attention(nn.Module):
    """One head of self-attention over all positions of the image, (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        # With heads as a dimension, even one, torch never holds the (H*W)^2 scores: 5 GiB less for 60 seconds.
        q, k, v = (conv(h).flatten(2).transpose(1, 2)[:, None] for conv in (self.q, self.k, self.v))  # (B, 1, H*W, C)
        h = F.scaled_dot_product_attention(q, k, v)[:, 0]                                    # (B, H*W, C)
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, x.shape[2:]))


class Middle(nn.Module):
    """The bottom of both halves, (B, C, H, W) -> (B, C, H, W): residual block, attention, residual block."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.block_1 = ResBlock(channels, channels, groups)
        self.attention = Attention(channels, groups)
        self.block_2 = ResBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attention(self.block_1(x)))


class Downsample(nn.Module):
    """Halve both sides, (B, C, H, W) -> (B, C, H/2, W/2)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))         # the published network pads right and bottom only


class Upsample(nn.Module):
    """Double both sides, each pixel becoming a square of four, and convolve; (B, C, H, W) -> (B, C, 2H, 2W).

    Both are linear: together they are one transposed convolution of stride 2, whose 4 x 4 kernel is the 3 x 3 one,
    mirrored, shifted to each pixel of the square, and summed.  That takes 4/9 of the arithmetic, and a tenth off the
    time of decoding.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.conv.weight.flip(2, 3).transpose(0, 1)                      # (C, C, 3, 3), mirrored
        square = [F.pad(kernel, (left, 1 - left, top, 1 - top)) for left in (0, 1) for top in (0, 1)]
        return F.conv_transpose2d(x, sum(square), self.conv.bias, stride=2, padding=1)


class DownLevel(nn.Module):
    """The encoder at one resolution, (B, c_in, H, W) -> (B, c_out, H/2, W/2); the last keeps the size."""

    def __init__(self, c_in: int, c_out: int, blocks: int, groups: int, last: bool):
        super().__init__()
        self.block = nn.Sequential(*(ResBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(blocks)))
        self.downsample = nn.Identity() if last else Downsample(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.block(x))


class UpLevel(nn.Module):
    """The decoder at one resolution, (B, c_in, H, W) -> (B, c_out, 2H, 2W); the last keeps the size."""

    def __init__(self, c_in: int, c_out: int, blocks: int, groups: int, last: bool):
        super().__init__()
        self.block = nn.Sequential(*(ResBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(blocks)))
        self.upsample = nn.Identity() if last else Upsample(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.upsample(self.block(x))


class Encoder(nn.Module):
    """(B, 1, T, 64) -> (B, 2 * latent, T/4, 16)."""

    def __init__(self, widths: tuple[int, ...], blocks: int, groups: int, latent: int):
        super().__init__()
        self.conv_in = nn.Conv2d(1, widths[0], 3, padding=1)
        self.down = nn.Sequential(*(
            DownLevel(widths[max(i - 1, 0)], width, blocks, groups, last=i == len(widths) - 1)
            for i, width in enumerate(widths)))
        self.mid = Middle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * latent, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mid(self.down(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """(B, latent, T/4, 16) -> (B, 1, T, 64).  Level 0 is the finest, as in the encoder, and runs last."""

    def __init__(self, widths: tuple[int, ...], blocks: int, groups: int, latent: int):
        super().__init__()
        self.conv_in = nn.Conv2d(latent, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        self.up = nn.ModuleList(
            UpLevel(widths[min(i + 1, len(widths) - 1)], width, blocks + 1, groups, last=i == 0)
            for i, width in enumerate(widths))
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 1, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class VAE(nn.Module):
    """AudioLDM's VAE; the defaults are the published sizes (55 M parameters).

    widths: channels from the mel's resolution down, multiples of 32; three of them, for the quarter length.
    blocks: residual blocks at each resolution of the encoder (the decoder has one more).
    groups: how many groups of channels each norm has.  A group of one channel loses how loud the clip is, so narrow
        networks take fewer.
    """

    LATENT = 8

    def __init__(self, widths: tuple[int, ...] = (128, 256, 512), blocks: int = 2, groups: int = 32):
        super().__init__()
        if len(widths) != 3 or any(width % 32 for width in widths):
            raise ValueError(f"VAE widths must be three multiples of 32, got {tuple(widths)}")
        if type(groups) is not int or groups not in (1, 2, 4, 8, 16, 32):
            raise ValueError(f"the VAE's groups must be 1, 2, 4, 8, 16 or 32, got {groups!r}")
        self.encoder = Encoder(widths, blocks, groups, self.LATENT)
        self.decoder = Decoder(widths, blocks, groups, self.LATENT)
        self.quant_conv = nn.Conv2d(2 * self.LATENT, 2 * self.LATENT, 1)
        self.post_quant_conv = nn.Conv2d(self.LATENT, self.LATENT, 1)
        self.register_buffer("scale_factor", torch.ones(()))

    def encode(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """mel (B, T, 64) -> mean and logvar of q(z | mel) = N(mean, exp(logvar)), each (B, 8, T/4, 16), unscaled."""
        if mel.ndim != 3 or mel.shape[1] % 4 or mel.shape[2] % 4:
            raise ValueError(f"the VAE takes mels (B, T, 64), T a multiple of 4, got {tuple(mel.shape)}")
        x = mel.unsqueeze(1).contiguous(memory_format=torch.channels_last)         # (B, 1, T, 64)
        mean, logvar = self.quant_conv(self.encoder(x)).float().chunk(2, dim=1)    # (B, 8, T/4, 16) each
        return mean, logvar.clamp(-30, 20)

    def decode(self, z: Tensor) -> Tensor:
        """z (B, 8, T/4, 16), unscaled -> mel (B, T, 64)."""
        z = z.contiguous(memory_format=torch.channels_last)
        return self.decoder(self.post_quant_conv(z)).float().squeeze(1)

    def forward(self, mel: Tensor, eps: Tensor, ddim_noise: float) -> tuple[Tensor, Tensor, Tensor]:
        """What training takes: mel (B, T, 64) and standard normal noise (B, 8, T/4, 16) -> decoded, mean, logvar.

        ddim_noise: standard deviation of a second noise in z: what DDIM leaves in z_0, divided by scale_factor; 0
            unless --decoder-only.
        """
        mean, logvar = self.encode(mel)
        std = (logvar.exp() + ddim_noise ** 2).sqrt()                              # independent noises' variances add
        return self.decode(mean + std * eps), mean, logvar

    @torch.no_grad()
    def normalize_latents(self, mean: Tensor, std: Tensor) -> None:
        """Give each channel of the latent zero mean and unit standard deviation; mean, std: (8,), what they are now.

        The layer that makes the latent and the one that reads it are linear: what is decoded stays the same.
        """
        made, read, n = self.quant_conv, self.post_quant_conv, self.LATENT
        made.weight[:n] /= std[:, None, None, None]
        made.bias[:n] = (made.bias[:n] - mean) / std
        made.bias[n:] -= 2 * std.log()                                             # the log-variance
        read.bias += read.weight[:, :, 0, 0] @ mean
        read.weight *= std[:, None, None]

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "VAE":
        """AudioLDM's published VAE: its own `.ckpt`, Tango's `pytorch_model_vae.bin`, or a diffusers `vae/` folder.

        Raises ValueError naming the file if it is damaged or holds anything else.
        """
        return weights.build(cls, *cls.published(path))

    @classmethod
    def published(cls, path: str | Path) -> weights.Published:
        """What `weights.build` takes to make the VAE of a published file."""
        path, groups = Path(path), 32
        if path.is_dir():
            # Files from before mid-2023 have the old names; attention is a linear layer or a 1 x 1 convolution.
            tensors = weights.rename(weights.read(path), OLD_DIFFUSERS_NAMES)
            tensors = {name: tensor[:, :, None, None] if ".attentions." in name and tensor.ndim == 2 else tensor
                       for name, tensor in tensors.items()}
            config = weights.read_json(path / "config.json")
            weights.check_config(config, {"act_fn": "silu", "shift_factor": None}, path / "config.json")
            scale_factor, groups = config.get("scaling_factor"), config.get("norm_num_groups", groups)
            names, block = DIFFUSERS_NAMES, "encoder.down_blocks.{}.resnets.{}."
        else:
            everything = weights.under(weights.read(path), "state_dict.", "")
            tensors = weights.under(everything, "first_stage_model.", "")      # beside the vocoder and the loss
            tensors = {name: tensor for name, tensor in tensors.items()
                       if name.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))}
            scale_factor = everything.get("scale_factor")
            if path.with_name("vae_config.json").is_file():                    # Tango's
                scale_factor = weights.read_json(path.with_name("vae_config.json")).get("scale_factor")
            names, block = AUDIOLDM_NAMES, "encoder.down.{}.block.{}."
        if scale_factor is None:
            warnings.warn(f"{path}: there is no scale factor with this VAE; 1 is taken")
            scale_factor = 1.0
        try:
            tensors["scale_factor"] = torch.tensor(float(scale_factor))
            if not tensors["scale_factor"].isfinite() or tensors["scale_factor"] == 0:
                raise ValueError
        except (ValueError, TypeError, RuntimeError, OverflowError):
            raise ValueError(f"{path}: the scale factor must be a number but 0, got {scale_factor!r:.50}") from None
        widths = [weights.shape_of(tensors, block.format(i, 0) + "conv1.weight", 4, path)[0] for i in range(3)]
        sizes = {"widths": widths, "blocks": weights.count(tensors, block.replace("{}", "0", 1)), "groups": groups}
        return sizes, tensors, path, names


def sample_posterior(mean: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    """z ~ N(mean, exp(logvar)) from standard normal noise eps; all three of one shape."""
    return mean + torch.exp(0.5 * logvar) * eps


def log_flicker(mel: Tensor) -> Tensor:
    """How much the bands of a mel (B, T, 64) flicker around each place, -> (B, 3, T', 30): the log of the mean size of
    three differences (over time; over time twice; over time and frequency) in overlapping windows of 16 x 4."""
    change = mel.diff(dim=1)[:, :-1, :-1]                                                            # (B, T-2, 63)
    twice, across = mel.diff(n=2, dim=1)[..., :-1], mel.diff(dim=1).diff(dim=2)[:, :-1]
    sizes = torch.stack([change, twice, across], dim=1).abs()                                        # (B, 3, T-2, 63)
    return torch.log(F.avg_pool2d(sizes, (16, 4), stride=(8, 2)) + 0.02)


def vae_loss(mel: Tensor, decoded: Tensor, mean: Tensor, logvar: Tensor, kl_weight: float,
             flicker_weight: float) -> dict[str, Tensor]:
    """L1 + kl_weight * KL(q || N(0, I)) + ours: detail + flicker_weight * flicker; each a mean.

    mel, decoded: (B, T, 64), T at least 18.  mean, logvar: (B, 8, T/4, 16).
    """
    error = decoded - mel
    l1 = error.abs().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    # What tells the rates apart, differences between neighbours, weighs little in the L1.
    detail = error.diff(dim=1).abs().mean() + error.diff(dim=2).abs().mean()
    # An L1 is least at the median of what may be, so what can't be foretold is smoothed away: rain without its texture.
    # AudioLDM's VAE has a discriminator against it; here, asking for the recording's flicker is enough.
    flicker = (log_flicker(decoded) - log_flicker(mel)).abs().mean()
    return {"loss": l1 + kl_weight * kl + detail + flicker_weight * flicker, "l1": l1, "kl": kl, "detail": detail,
            "flicker": flicker}
