"""HiFi-GAN: the vocoder that turns log-mels into sound, and the discriminators and losses that train it.

Sections II-B and III-B, Fig. 1; Kong, Kim, Bae 2020.  There is one generator for each sampling rate, all with
AudioLDM's structure; only the strides differ, because their product is the hop:

    Generator                  mel (B, T, 64) -> wave (B, T * hop), in [-1, 1]
    MultiPeriodDiscriminator   wave (B, L) -> scores and features of 5 discriminators
    MultiScaleDiscriminator    wave (B, L) -> scores and features of 3 discriminators
"""
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import weights

# Strides of the transposed convolutions at each rate.  Their product is the hop, rate / 100.  The kernels are the same
# at every rate, so the tensors of all four generators have the same shapes, and one can start from another.
STRIDES = {16_000: (5, 4, 2, 2, 2), 24_000: (5, 4, 3, 2, 2), 32_000: (5, 4, 4, 2, 2), 48_000: (6, 5, 4, 2, 2)}
KERNELS = (16, 16, 8, 4, 4)

# Published name -> ours, read in both directions (weights.rename): transformers' generator, and HiFi-GAN's
# discriminators: spectral norm in the first scale one, weight norm in all others
TRANSFORMERS_NAMES = [("upsampler.", "ups.")]
DISCRIMINATOR_NAMES = [
    ("msd.discriminators.0.convs.{}.weight_v", "msd.discriminators.0.convs.{}.parametrizations.weight.0._v"),
    ("msd.discriminators.0.conv_post.weight_v", "msd.discriminators.0.conv_post.parametrizations.weight.0._v"),
    (".weight_u", ".parametrizations.weight.0._u"),
    (".weight_orig", ".parametrizations.weight.original"),
    (".weight_g", ".parametrizations.weight.original0"),
    (".weight_v", ".parametrizations.weight.original1"),
]

Features = list[Tensor]                                  # what the layers of one discriminator computed
Judged = list[tuple[Tensor, Features]]                   # score and features of each discriminator


class Conv1d(nn.Conv1d):
    """A Conv1d run as a 1 x k convolution over an image of height one, (B, C, 1, L) -> (B, C', 1, L').

    Same tensors, same result; but images can lie in channels_last, where many CPUs convolve faster.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight[:, :, None], self.bias, (1, self.stride[0]), (0, self.padding[0]),
                        (1, self.dilation[0]), self.groups)


class ConvTranspose1d(nn.ConvTranspose1d):
    """The same for the transposed convolution, (B, C, 1, L) -> (B, C', 1, L')."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.weight[:, :, None], self.bias, (1, self.stride[0]), (0, self.padding[0]))


class ResBlock(nn.Module):
    """Three residual pairs of a dilated and a plain convolution, (B, C, 1, L) -> (B, C, 1, L)."""

    DILATIONS = (1, 3, 5)

    def __init__(self, channels: int, kernel: int):
        super().__init__()
        self.convs1 = nn.ModuleList(
            Conv1d(channels, channels, kernel, dilation=d, padding=d * (kernel // 2)) for d in self.DILATIONS)
        self.convs2 = nn.ModuleList(
            Conv1d(channels, channels, kernel, padding=kernel // 2) for _ in self.DILATIONS)

    def forward(self, x: Tensor) -> Tensor:
        for conv1, conv2 in zip(self.convs1, self.convs2):
            x = x + conv2(F.leaky_relu(conv1(F.leaky_relu(x, 0.1)), 0.1))
        return x


class Generator(nn.Module):
    """The vocoder.  The defaults are AudioLDM's at 16 kHz (55 M parameters).

    strides, kernels: of the transposed convolutions.  channels: after the first layer, halved at each upsampling.
    n_mels: bands of the mel.
    """

    RES_KERNELS = (3, 7, 11)

    def __init__(self, strides: tuple[int, ...] = STRIDES[16_000], kernels: tuple[int, ...] = KERNELS,
                 channels: int = 1024, n_mels: int = 64):
        super().__init__()
        if (len(strides) != len(kernels) or channels % 2 ** len(strides)
                or not all(1 <= stride <= kernel for stride, kernel in zip(strides, kernels))):
            raise ValueError(f"the vocoder takes as many kernels as strides, none smaller, and channels that can be "
                             f"halved as often, "
                             f"got strides {tuple(strides)}, kernels {tuple(kernels)}, channels {channels}")
        self.hop = math.prod(strides)
        self.conv_pre = Conv1d(n_mels, channels, 7, padding=3)
        self.ups = nn.ModuleList()
        self.resblocks = nn.ModuleList()                 # three for each upsampling, one after the other
        for stride, kernel in zip(strides, kernels):
            self.ups.append(ConvTranspose1d(channels, channels // 2, kernel, stride, padding=(kernel - stride) // 2))
            channels //= 2
            self.resblocks += [ResBlock(channels, kernel) for kernel in self.RES_KERNELS]
        self.conv_post = Conv1d(channels, 1, 7, padding=3)

    def forward(self, mel: Tensor) -> Tensor:
        """Log-mel (B, T, n_mels) -> wave (B, T * hop)."""
        h = mel.transpose(1, 2)[:, :, None]                                     # (B, n_mels, 1, T)
        h = self.conv_pre(h.contiguous(memory_format=torch.channels_last))      # (B, C, 1, T)
        for i, up in enumerate(self.ups):
            h = up(F.leaky_relu(h, 0.1))                                        # C -> C / 2, T -> T * stride, or 1 more
            branches = self.resblocks[3 * i:3 * i + 3]
            h = sum(block(h) for block in branches) / len(branches)
        wave = torch.tanh(self.conv_post(F.leaky_relu(h, 0.01)).float())        # 0.01, PyTorch's default, as published
        # A layer whose kernel - stride is odd adds a sample, which later strides multiply: 16 to 64 at our rates, cut.
        return wave[:, 0, 0, :mel.shape[1] * self.hop]

    @classmethod
    def from_pretrained(cls, path: str | Path, strides: tuple[int, ...] = STRIDES[16_000]) -> "Generator":
        """AudioLDM's `.ckpt`, Tango's `pytorch_model_vae.bin`, a `vocoder/` folder of a diffusers pipeline, HiFi-GAN's
        `g_*`, or ours.

        strides: not in the weights; default: AudioLDM's at 16 kHz.
        Raises ValueError naming the file if it is damaged or holds anything else, or its config.json if strides differ.
        """
        return weights.build(cls, *cls.published(path, strides))

    @classmethod
    def published(cls, path: str | Path, strides: tuple[int, ...]) -> weights.Published:
        """What `weights.build` takes to make the generator of a published file."""
        path = Path(path)
        tensors = weights.under(weights.read(path), "generator.", "state_dict.first_stage_model.vocoder.", "vocoder.",
                                "")
        tensors = weights.fold_weight_norm(tensors, path)
        ups, names = "ups", []
        if path.is_dir():                                                         # transformers'
            ups, names = "upsampler", TRANSFORMERS_NAMES
            for statistics in ("mean", "scale"):                                  # not used without normalize_before
                tensors.pop(statistics, None)
        kernels = tuple(weights.shape_of(tensors, f"{ups}.{i}.weight", 3, path)[2]
                        for i in range(weights.count(tensors, ups + ".{}.")))
        channels, n_mels, _ = weights.shape_of(tensors, "conv_pre.weight", 3, path)
        config_path = (path if path.is_dir() else path.parent) / "config.json"
        config = weights.read_json(config_path) if path.is_dir() or config_path.is_file() else {}
        if path.is_dir() or "upsample_rates" in config:                           # may be another file's
            weights.check_config(config, {
                "resblock": "1", "resblock_kernel_sizes": list(cls.RES_KERNELS), "normalize_before": False,
                "resblock_dilation_sizes": [list(ResBlock.DILATIONS)] * 3, "leaky_relu_slope": 0.1,
                "upsample_rates": list(strides)}, config_path)
        sizes = {"strides": tuple(strides), "kernels": kernels, "channels": channels, "n_mels": n_mels}
        return sizes, tensors, path, names


class PeriodDiscriminator(nn.Module):
    """Folds the wave into rows of `period` samples and judges each column for itself, (B, L) -> score, features."""

    def __init__(self, period: int, channels: int):
        super().__init__()
        self.period = period
        widths = [1, channels, 4 * channels, 16 * channels, 32 * channels, 32 * channels]
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(c_in, c_out, (5, 1), (3 if i < 4 else 1, 1), padding=(2, 0)))
            for i, (c_in, c_out) in enumerate(zip(widths, widths[1:])))
        self.conv_post = weight_norm(nn.Conv2d(widths[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, wave: Tensor) -> tuple[Tensor, Features]:
        h = F.pad(wave[:, None], (0, -wave.shape[1] % self.period), mode="reflect")
        h = h.unflatten(2, (-1, self.period))                                   # (B, 1, ceil(L / period), period)
        h = h.contiguous(memory_format=torch.channels_last)
        features = []
        for conv in self.convs:
            h = F.leaky_relu(conv(h), 0.1)
            features.append(h)
        h = self.conv_post(h)
        return h.flatten(1).float(), features + [h]


class MultiPeriodDiscriminator(nn.Module):
    """Five period discriminators; channels = 32 is the published width."""

    def __init__(self, channels: int = 32):
        super().__init__()
        self.discriminators = nn.ModuleList(PeriodDiscriminator(period, channels) for period in (2, 3, 5, 7, 11))

    def forward(self, wave: Tensor) -> Judged:
        return [discriminator(wave) for discriminator in self.discriminators]


class ScaleDiscriminator(nn.Module):
    """Strided and grouped convolutions over the wave, (B, L) -> score, features."""

    def __init__(self, channels: int, norm):
        super().__init__()
        #          in, out (in units of `channels`), kernel, stride, groups
        layers = [(0, 1, 15, 1, 1), (1, 1, 41, 2, 4), (1, 2, 41, 2, 16), (2, 4, 41, 4, 16),
                  (4, 8, 41, 4, 16), (8, 8, 41, 1, 16), (8, 8, 5, 1, 1)]
        self.convs = nn.ModuleList(
            norm(Conv1d(c_in * channels or 1, c_out * channels, kernel, stride, padding=kernel // 2,
                        groups=max(1, groups * channels // 128)))       # groups as wide as published, or one
            for c_in, c_out, kernel, stride, groups in layers)
        self.conv_post = norm(Conv1d(8 * channels, 1, 3, padding=1))

    def forward(self, wave: Tensor) -> tuple[Tensor, Features]:
        h = wave[:, None, None].contiguous(memory_format=torch.channels_last)   # (B, 1, 1, L)
        features = []
        for conv in self.convs:
            h = F.leaky_relu(conv(h), 0.1)
            features.append(h)
        h = self.conv_post(h)
        return h.flatten(1).float(), features + [h]


class MultiScaleDiscriminator(nn.Module):
    """Judges the wave at its rate, at half and at a quarter of it; channels = 128 is the published width."""

    def __init__(self, channels: int = 128):
        super().__init__()
        norms = [spectral_norm, weight_norm, weight_norm]
        self.discriminators = nn.ModuleList(ScaleDiscriminator(channels, norm) for norm in norms)

    def forward(self, wave: Tensor) -> Judged:
        judged = []
        for i, discriminator in enumerate(self.discriminators):
            if i > 0:
                wave = F.avg_pool1d(wave, 4, 2, padding=2)                      # half the rate
            judged.append(discriminator(wave))
        return judged


class Discriminators(nn.Module):
    """Both kinds, with the channels of the first layer of each."""

    def __init__(self, mpd_channels: int = 32, msd_channels: int = 128):
        super().__init__()
        self.mpd, self.msd = MultiPeriodDiscriminator(mpd_channels), MultiScaleDiscriminator(msd_channels)

    def forward(self, *waves: Tensor) -> list[Judged]:
        """Score and features of each discriminator, for each of the waves (B, L)."""
        return [self.mpd(wave) + self.msd(wave) for wave in waves]

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Discriminators":
        """HiFi-GAN's `do_*`, whose other tensors are the optimizers'.

        Raises ValueError naming the file if it is damaged or holds anything else.
        """
        tensors = {name: tensor for name, tensor in weights.read(path).items() if name.startswith(("mpd.", "msd."))}
        sizes = {"mpd_channels": weights.shape_of(tensors, "mpd.discriminators.0.convs.0.bias", 1, path)[0],
                 "msd_channels": weights.shape_of(tensors, "msd.discriminators.0.convs.0.bias", 1, path)[0]}
        return weights.build(cls, sizes, tensors, path, DISCRIMINATOR_NAMES)


def discriminator_loss(real: Judged, generated: Judged) -> Tensor:
    """Least squares: real waves should score 1, generated ones 0 (HiFi-GAN, Eq. 1, summed as in Eq. 8)."""
    return sum((1 - score_real).square().mean() + score_generated.square().mean()
               for (score_real, _), (score_generated, _) in zip(real, generated))


def adversarial_loss(generated: Judged) -> Tensor:
    """Least squares: generated waves should score 1 (HiFi-GAN, Eq. 2, summed as in Eq. 7)."""
    return sum((1 - score).square().mean() for score, _ in generated)


def feature_matching_loss(real: Judged, generated: Judged) -> Tensor:
    """L1 between what the discriminators' layers compute from a real and from a generated wave (HiFi-GAN, Eq. 4)."""
    return sum((a.detach().float() - b.float()).abs().mean()
               for (_, features_real), (_, features_generated) in zip(real, generated)
               for a, b in zip(features_real, features_generated))


def mel_loss(mel_real: Tensor, mel_generated: Tensor) -> Tensor:
    """L1 between log-mels (HiFi-GAN, Eq. 3); each (B, T, 64)."""
    return (mel_real - mel_generated).abs().mean()


def generator_loss(real: Judged, generated: Judged, mel_real: Tensor, mel_generated: Tensor) -> Tensor:
    """HiFi-GAN, Eq. 7, with its weights 2 and 45."""
    return (adversarial_loss(generated) + 2 * feature_matching_loss(real, generated)
            + 45 * mel_loss(mel_real, mel_generated))


def stft_loss(real: Tensor, generated: Tensor, n_fft: int) -> Tensor:
    """L1 between log-magnitudes of the spectra of waves (B, L); one of Parallel WaveGAN's losses (Yamamoto 2020)."""
    window = torch.hann_window(n_fft, device=real.device)
    log_real, log_generated = (
        torch.stft(wave, n_fft, n_fft // 4, window=window, return_complex=True).abs().clamp(min=1e-4).log()
        for wave in (real, generated))                                          # (B, n_fft / 2 + 1, frames)
    return (log_real - log_generated).abs().mean()


def convergence_loss(mel_real: Tensor, mel_generated: Tensor) -> Tensor:
    """The error of each band of log-mels (B, T, 64), as magnitudes, relative to the band itself: spectral convergence
    (Arik 2018), band by band.

    In the L1 of log-mels a click is a few frames of many, so one too faint costs little.  Here the loud moments count.
    """
    real, generated = mel_real.exp(), mel_generated.exp()
    return ((real - generated).norm(dim=1) / (real.norm(dim=1) + 1e-3)).mean()
