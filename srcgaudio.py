"""SRC-gAudio: one latent diffusion model that turns a text into sound at 16, 24, 32 or 48 kHz.

Li, Xu, Yu: "SRC-gAudio: Sampling-Rate-Controlled Audio Generation".  This file is the paper: the rates and their
mels (III-B), Eq. (1) to (4), the text encoder psi (II-A), and the pipeline of Fig. 1:

    training     wave -> mel_spectrogram -> VAE.encode, sample_posterior -> z -> z_0 = scale_factor * z -> Eq. (3)
    generation   z_T ~ N(0, I) -> DDIM under Eq. (4) -> z_0 -> z -> VAE.decode -> mel -> Generator of the rate -> wave

Shapes: wave (B, L), mel (B, T, 64), latent z (B, 8, T/4, 16), text (B, N, d).  T has two meanings: in shapes, the
number of a mel's frames; in z_T and NoiseSchedule.T, as in the paper, the number of diffusion steps.
The hop is rate / 100, so a mel has 100 frames a second at *every* rate: 10.24 s are 1024 x 64, whatever the rate, and
one VAE and one U-Net can serve all of them.  What differs is what the 64 bands mean: they span 0 to rate / 2.
"""
import functools
import math
import operator
import sys
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import weights
from unet import UNet
from vae import VAE
from vocoder import STRIDES, Generator

# ---------------------------------------------------------------------------------------------------------------------
# Sampling rates and log-mels (Section III-B)


@dataclass(frozen=True)
class MelConfig:
    n_fft: int
    hop: int
    n_mels: int


RATES = {                                                # (fftSize, hopSize, melDim) of Section III-B
    16_000: MelConfig(1024, 160, 64),
    24_000: MelConfig(2048, 240, 64),
    32_000: MelConfig(2048, 320, 64),
    48_000: MelConfig(2048, 480, 64),
}
FRAMES_PER_SECOND = 100                                  # rate / hop, the same in every row


def check_rate(rate: int) -> None:
    if rate not in RATES:
        raise ValueError(f"there is no sampling rate {rate!r}; choose from {', '.join(map(str, RATES))} (Hz)")


def mel_filters(rate: int, n_fft: int, n_mels: int) -> Tensor:
    """Slaney's triangular filters from 0 to rate / 2, each of unit area, (n_fft / 2 + 1, n_mels).

    The mel scale is linear up to 1 kHz, 200/3 Hz a mel, and logarithmic above, 27 mels for a factor of 6.4.
    """
    top = 15 + 27 * math.log(rate / 2 / 1000) / math.log(6.4)                     # rate / 2 in mels
    mel = torch.linspace(0, top, n_mels + 2, dtype=torch.float64)
    hz = torch.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))
    low, peak, high = hz[:-2], hz[1:-1], hz[2:]                                   # (n_mels,) each
    bin_hz = torch.linspace(0, rate / 2, n_fft // 2 + 1, dtype=torch.float64)[:, None]
    triangles = torch.minimum((bin_hz - low) / (peak - low), (high - bin_hz) / (high - peak)).clamp(min=0)
    return (triangles * 2 / (high - low)).float()                                 # (n_fft / 2 + 1, n_mels)


@functools.lru_cache
@torch.inference_mode(False)                             # else training's backward refuses what validation left here
def mel_constants(rate: int, device: torch.device) -> tuple[Tensor, Tensor]:
    config = RATES[rate]
    window = torch.hann_window(config.n_fft, dtype=torch.float32, device=device)
    return window, mel_filters(rate, config.n_fft, config.n_mels).to(device)


def mel_spectrogram(wave: Tensor, rate: int) -> Tensor:
    """Log-mel of a wave at one of the four rates, (B, L) -> (B, L // hop, 64), natural logarithm, floor 1e-5.

    AudioLDM's: magnitudes, Hann window of n_fft, reflect padding; the last frame, which centring adds, is dropped.
    The level is taken as it is.  For use outside autocast, which would round the mel to bfloat16.  Raises ValueError
    for another rate or fewer than n_fft / 2 + 1 samples.
    """
    check_rate(rate)
    config = RATES[rate]
    if wave.ndim != 2 or wave.shape[1] <= config.n_fft // 2:
        raise ValueError(f"a mel at {rate} Hz takes waves (B, L) of more than {config.n_fft // 2} samples, "
                         f"got {tuple(wave.shape)}")
    window, filters = mel_constants(rate, wave.device)
    spectrum = torch.stft(wave.float(), config.n_fft, config.hop, window=window, center=True, pad_mode="reflect",
                          return_complex=True).abs()                              # (B, n_fft / 2 + 1, frames + 1)
    mel = spectrum.transpose(1, 2) @ filters                                      # (B, frames + 1, 64)
    return mel[:, :wave.shape[1] // config.hop].clamp(min=1e-5).log()


# ---------------------------------------------------------------------------------------------------------------------
# Diffusion: Eq. (1) to (4)


class NoiseSchedule:
    """The variances beta_t of Eq. (1), what follows from them, and the reverse process, Eq. (2), as DDIM.

    Stable Diffusion's schedule: T = 1000, sqrt(beta) linear.  The paper's t runs from 1 to T; here, as in published
    implementations, indices run from 0 to T - 1.
    """

    T, BETA_1, BETA_T = 1000, 0.00085, 0.012

    def __init__(self):
        self.beta = torch.linspace(self.BETA_1 ** 0.5, self.BETA_T ** 0.5, self.T, dtype=torch.float64) ** 2     # (T,)
        # alpha_bar_t = (1 - beta_1) ... (1 - beta_t): how much of z_0's variance is left in z_t (DDPM's symbol; the
        # paper has beta alone).  alpha_bar[0] is that of the paper's t = 1.
        self.alpha_bar = torch.cumprod(1 - self.beta, dim=0)                                                     # (T,)

    def add_noise(self, z_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Jump from z_0 to z_t at once.

        z_0, eps: (B, 8, T/4, 16) clean latent and standard normal noise, or (B, ...) of any shape, in float32 at least
        (in bfloat16 the first alpha_bar is 1).  t: (B,) indices, 0 to 999.
        """
        alpha_bar = self.alpha_bar.to(z_0)[t].view(-1, *[1] * (z_0.ndim - 1))            # (B, 1, 1, 1)
        # Eq. (1), one step: q(z_t | z_t-1) = N(sqrt(1 - beta_t) z_t-1, beta_t I).  All steps from z_0 to z_t at once:
        # q(z_t | z_0) = N(sqrt(alpha_bar_t) z_0, (1 - alpha_bar_t) I)
        return alpha_bar.sqrt() * z_0 + (1 - alpha_bar).sqrt() * eps

    def eps_from_v(self, v: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """The noise in z_t (B, 8, T/4, 16) from v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) z_0, which some
        networks predict (Salimans, Ho 2022).  t: (B,) indices."""
        alpha_bar = self.alpha_bar.to(z_t)[t].view(-1, *[1] * (z_t.ndim - 1))            # (B, 1, 1, 1)
        return alpha_bar.sqrt() * v + (1 - alpha_bar).sqrt() * z_t

    def ddim_timesteps(self, steps: int) -> list[int]:
        """The indices t that DDIM visits, from noise to data: evenly spaced, down to 1, from which the last step goes
        to 0 (with T steps, T - 1 comes twice).

        With few steps the first index lies well below T, at 801 with 5, although z_T is pure noise and z_801 would
        still hold some of z_0; a single step starts at 1 and returns noise.
        """
        if not 1 <= steps <= self.T:
            raise ValueError(f"the number of steps must be from 1 to {self.T}, got {steps}")
        return [min(i * self.T // steps + 1, self.T - 1) for i in reversed(range(steps))]

    def ddim(self, predict_noise, z_T: Tensor, steps: int, progress: bool = False) -> Tensor:
        """Eq. (2), the reverse process, by DDIM with eta = 0 (Song, Meng, Ermon 2021).

        predict_noise: (z_t (B, ...), t: int) -> the noise in z_t, the same shape.  z_T: (B, ...) standard normal.
        steps: 1 to T.  Returns z_0 in z_T's shape, some noise left in it (see below).  `progress` shows a bar.
        """
        timesteps = self.ddim_timesteps(steps)
        # Eq. (2): p_theta(z_0:T | psi(P), Sr) = p_theta(z_T) times all p_theta(z_t-1 | z_t, c).  Each turn
        # takes about T / steps of these factors at once, and draws nothing.
        z_t = z_T                                        # z_T ~ N(0, I)
        # The last step ends at index 0, the paper's t = 1, as Stable Diffusion's does, and not at alpha_bar = 1: noise
        # of sqrt(1 - alpha_bar[0]) = 0.03 stays in what is returned.
        for t, t_next in zip(tqdm(timesteps, "DDIM", disable=not progress, leave=False), [*timesteps[1:], 0]):
            alpha_bar, alpha_bar_next = self.alpha_bar[t].item(), self.alpha_bar[t_next].item()
            eps = predict_noise(z_t, t)
            # Eq. (1)'s closed form solved for z_0 gives an estimate, which the same eps takes to the next, smaller t
            # (Song, Meng, Ermon, Eq. 12).  eta = 0 draws no new noise, so z_T alone decides what comes out.
            z_0_hat = (z_t - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar ** 0.5
            z_t = alpha_bar_next ** 0.5 * z_0_hat + (1 - alpha_bar_next) ** 0.5 * eps
        return z_t


def eps_theta(unet: UNet, schedule: NoiseSchedule, z_t: Tensor, t: Tensor, rate: Tensor, text: Tensor,
              text_mask: Tensor) -> Tensor:
    """eps_theta(z_t, t, c), the noise in z_t (B, 8, T/4, 16): makes c, runs the U-Net, and turns v into eps where it
    predicts v.

    t (index), rate (Hz): (B,).  text (B, N, d), text_mask (B, N): psi(P), or psi("") for c_null.
    """
    c, c_mask = unet.condition(t, rate, text, text_mask)
    predicted = unet(z_t, t, c, c_mask)
    return schedule.eps_from_v(predicted, z_t, t) if unet.predicts == "v" else predicted


def diffusion_loss(unet: UNet, schedule: NoiseSchedule, z_0: Tensor, eps: Tensor, t: Tensor, rate: Tensor,
                   text: Tensor, text_mask: Tensor) -> Tensor:
    """Eq. (3) for a batch, before the expectation: the mean squared error of each item, (B,).

    z_0, eps: (B, 8, T/4, 16).  t, rate (Hz): (B,).  text (B, N, d), text_mask (B, N).
    """
    z_t = schedule.add_noise(z_0, eps, t)
    # Eq. (3): min over theta of E || eps - eps_theta(z_t, t, c) ||^2, here as a mean over the latent's entries.  For a
    # network that predicts v, eps - eps_theta is sqrt(alpha_bar_t) (v - v_theta).
    return (eps - eps_theta(unet, schedule, z_t, t, rate, text, text_mask)).square().mean(dim=(1, 2, 3))


def guided_noise(unet: UNet, schedule: NoiseSchedule, z_t: Tensor, t: int, rate: int, text: Tensor, text_mask: Tensor,
                 null: Tensor, null_mask: Tensor, w: float) -> Tensor:
    """Classifier-free guidance, Eq. (4): the noise in z_t (B, 8, T/4, 16), the same shape.

    text (B, N, d), text_mask (B, N): psi(P).  null (B, N, d), null_mask (B, N): psi("").  Both branches run as one
    batch of 2 B; with w = 1 the null branch has weight 0 and is skipped.
    """
    if w != 1:
        z_t = torch.cat([z_t, z_t])                                               # (2 B, 8, T/4, 16)
        # c_null = concat(psi(""), Sr) empties the text only: time step and rate stay
        text, text_mask = torch.cat([text, null]), torch.cat([text_mask, null_mask])         # (2 B, N, d), (2 B, N)
    batch_t = torch.full((len(z_t),), t, device=z_t.device)                       # (2 B,)
    batch_rate = torch.full((len(z_t),), rate, device=z_t.device)
    eps = eps_theta(unet, schedule, z_t, batch_t, batch_rate, text, text_mask)
    if w == 1:
        return eps
    eps_c, eps_null = eps.chunk(2)                                                # (B, 8, T/4, 16) each
    # Eq. (4): eps~ = w eps_theta(z_t, t, c) + (1 - w) eps_theta(z_t, t, c_null).  Elsewhere it is written as
    # eps_null + w (eps_c - eps_null), which is the same; the w of Ho and Salimans, the paper's [21], is smaller by one.
    return w * eps_c + (1 - w) * eps_null


# ---------------------------------------------------------------------------------------------------------------------
# The text encoder psi: FLAN-T5's encoder (Section III-B)

# transformers' name -> ours, read in both directions (weights.rename)
T5_NAMES = [
    ("shared.", "embedding."),
    ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.", "relative_position_bias."),
    ("encoder.block.", "blocks."),
    (".layer.0.SelfAttention.", ".attention."),
    (".layer.0.layer_norm.", ".attention_norm."),
    (".layer.1.DenseReluDense.", ".feed_forward."),
    (".layer.1.layer_norm.", ".feed_forward_norm."),
    ("encoder.final_layer_norm.", "final_norm."),
]


class T5Attention(nn.Module):
    """Self-attention with a position bias and, unlike elsewhere, no division by sqrt(head_width); x (B, N, d), bias
    (B, heads, N, N) -> (B, N, d)."""

    def __init__(self, width: int, heads: int, head_width: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, heads * head_width, bias=False)
        self.k = nn.Linear(width, heads * head_width, bias=False)
        self.v = nn.Linear(width, heads * head_width, bias=False)
        self.o = nn.Linear(heads * head_width, width, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (linear(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)   # (B, heads, N, head_width)
        return self.o(h.transpose(1, 2).flatten(2))


class T5FeedForward(nn.Module):
    """Gated GELU, (B, N, d) -> (B, N, d)."""

    def __init__(self, width: int, ff_width: int):
        super().__init__()
        self.wi_0 = nn.Linear(width, ff_width, bias=False)
        self.wi_1 = nn.Linear(width, ff_width, bias=False)
        self.wo = nn.Linear(ff_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class T5Block(nn.Module):
    """Attention and feed-forward, each with a norm before it; x (B, N, d), bias (B, heads, N, N) -> (B, N, d)."""

    def __init__(self, width: int, heads: int, head_width: int, ff_width: int):
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.attention = T5Attention(width, heads, head_width)
        self.feed_forward_norm = nn.RMSNorm(width, eps=1e-6)
        self.feed_forward = T5FeedForward(width, ff_width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), bias)
        return x + self.feed_forward(self.feed_forward_norm(x))


def relative_position_buckets(n: int) -> Tensor:
    """Which of T5's 32 buckets the distance from token i to token j falls in, (n, n).

    16 buckets for each direction: one for each distance up to 7, then wider and wider ones, the last from 91 on.
    """
    distance = torch.arange(n)[None, :] - torch.arange(n)[:, None]                # j - i
    far = 8 + (torch.log(distance.abs().clamp(min=1) / 8) / math.log(128 / 8) * 8).long()
    bucket = torch.where(distance.abs() < 8, distance.abs(), far.clamp(max=15))
    return bucket + 16 * (distance > 0)


class TextEncoder(nn.Module):
    """psi: texts -> one embedding for each token.  The defaults are FLAN-T5-large's encoder (341 M parameters).

    A smaller one of the same architecture, made with `initialize` and a tokenizer of its own, serves small models.
    The encoder overflows in float16: use bfloat16 or float32.
    """

    PAD, END, MAX_TOKENS = 0, 1, 512

    def __init__(self, vocabulary: int = 32128, width: int = 1024, layers: int = 24, heads: int = 16,
                 head_width: int = 64, ff_width: int = 2816):
        super().__init__()
        self.tokenizer: sentencepiece.SentencePieceProcessor | None = None        # set with the weights
        self.embedding = nn.Embedding(vocabulary, width)
        self.relative_position_bias = nn.Embedding(32, heads)
        self.blocks = nn.ModuleList(T5Block(width, heads, head_width, ff_width) for _ in range(layers))
        self.final_norm = nn.RMSNorm(width, eps=1e-6)

    def initialize(self, generator: torch.Generator) -> None:
        """A start much as T5's: normal weights, of variance 1 / (a layer's inputs), for q over head_width too, 1 for
        the embedding, and 1 / heads, more than T5's, for the position bias."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:                                               # norms
                continue
            std = 1.0 if name == "embedding.weight" else parameter.shape[1] ** -0.5
            if name.endswith("attention.q.weight"):                     # in place of 1 / sqrt(head_width) at run time
                heads = self.relative_position_bias.weight.shape[1]
                std *= (parameter.shape[0] / heads) ** -0.5
            nn.init.normal_(parameter, 0.0, std, generator=generator)

    def tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Texts -> ids (B, N), each ending in </s> and padded with 0, and mask (B, N), True at real tokens.

        Texts of more than 512 tokens are cut there, with a warning; characters that have no token give one too.
        """
        rows = [self.tokenizer.encode(text) + [self.END] for text in texts]
        for i, row in enumerate(rows):
            if self.tokenizer.unk_id() in row:
                pieces = zip(self.tokenizer.encode(texts[i], out_type=str), row)
                unknown = sorted({piece for piece, token in pieces if token == self.tokenizer.unk_id()})
                # Without the text: Python gives a warning of the same words once.
                warnings.warn(f"the text encoder does not know {', '.join(unknown)[:100]!r}")
            if len(row) > self.MAX_TOKENS:
                warnings.warn(f'text "{texts[i][:40]}..." has {len(row)} tokens; all after {self.MAX_TOKENS} are cut')
                rows[i] = row[:self.MAX_TOKENS - 1] + [self.END]
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=self.PAD)    # (B, N)
        return ids, ids != self.PAD                      # no text has it: "<pad>" in one is read as characters

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids (B, N), mask (B, N) -> psi (B, N, d), of which the rows at padding tokens mean nothing."""
        buckets = relative_position_buckets(ids.shape[1]).to(ids.device)
        bias = self.relative_position_bias(buckets).permute(2, 0, 1)[None]        # (1, heads, N, N)
        bias = bias.masked_fill(~mask[:, None, None, :], torch.finfo(bias.dtype).min)        # (B, heads, N, N)
        x = self.embedding(ids)                                                   # (B, N, d)
        for block in self.blocks:
            x = block(x, bias)
        return self.final_norm(x).float()

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Texts -> psi (B, N, d) and mask (B, N), on the encoder's device."""
        ids, mask = (x.to(self.embedding.weight.device) for x in self.tokenize(texts))
        return self(ids, mask), mask

    def save(self, folder: str | Path) -> None:
        """Write text_encoder.pt and tokenizer.model into a checkpoint folder."""
        weights.replace_file(Path(folder) / "tokenizer.model",
                             lambda file: file.write(self.tokenizer.serialized_model_proto()))
        weights.save(self.state_dict(), Path(folder) / "text_encoder.pt")

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "TextEncoder":
        """The encoder of a FLAN-T5 of any size, from its Hugging Face folder; or that in Tango's
        `pytorch_model_main.bin`, with FLAN-T5's `spiece.model` beside it.

        Raises ValueError naming the file that is missing, damaged or of another model.
        """
        path = Path(path)
        encoder = weights.build(cls, *cls.published(path))
        encoder.tokenizer = read_tokenizer((path if path.is_dir() else path.parent) / "spiece.model",
                                           len(encoder.embedding.weight))
        return encoder

    @classmethod
    def published(cls, path: str | Path) -> weights.Published:
        """What `weights.build` takes to make the text encoder of a published file."""
        path = Path(path)
        tensors = {name: tensor for name, tensor in weights.under(weights.read(path), "text_encoder.", "").items()
                   if name.startswith(("shared.", "encoder."))}                   # the decoder is never read
        embedding = tensors.pop("encoder.embed_tokens.weight", None)              # the same as shared.weight
        if embedding is not None:
            tensors.setdefault("shared.weight", embedding)
        sizes = cls.sizes(tensors, path)
        if path.is_dir():
            config = weights.read_json(path / "config.json")
            weights.check_config({"feed_forward_proj": "relu"} | config, cls.transformers_config(sizes),
                                 path / "config.json")
        return sizes, tensors, path, T5_NAMES

    @staticmethod
    def sizes(tensors: weights.Weights, source: str | Path) -> dict:
        """The arguments of a TextEncoder, from tensors under transformers' names."""
        block = "encoder.block.0.layer.{}."
        bias = "SelfAttention.relative_attention_bias.weight"
        vocabulary, width = weights.shape_of(tensors, "shared.weight", 2, source)
        heads = weights.shape_of(tensors, block.format(0) + bias, 2, source)[1]
        inner = weights.shape_of(tensors, block.format(0) + "SelfAttention.q.weight", 2, source)[0]
        ff_width = weights.shape_of(tensors, block.format(1) + "DenseReluDense.wi_0.weight", 2, source)[0]
        return {"vocabulary": vocabulary, "width": width, "layers": weights.count(tensors, "encoder.block.{}."),
                "heads": heads, "head_width": inner // max(heads, 1), "ff_width": ff_width}

    @staticmethod
    def transformers_config(sizes: dict) -> dict:
        """What transformers' config.json says of these sizes, and of what is the same at every size."""
        return {"vocab_size": sizes["vocabulary"], "d_model": sizes["width"], "num_layers": sizes["layers"],
                "num_heads": sizes["heads"], "d_kv": sizes["head_width"], "d_ff": sizes["ff_width"],
                "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 32,
                "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6}


def read_tokenizer(path: str | Path, vocabulary: int) -> sentencepiece.SentencePieceProcessor:
    """A sentencepiece model file with T5's special tokens and at most `vocabulary` tokens.

    Raises ValueError naming the file if it is missing, damaged or another.
    """
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):
        raise ValueError(f"{path}: missing, damaged, or not a sentencepiece model") from None
    if tokenizer.vocab_size() > vocabulary or (tokenizer.pad_id(), tokenizer.eos_id()) != (0, 1):
        raise ValueError(f"{path}: not this text encoder's, which has at most {vocabulary} tokens, "
                         f"padding first and </s> second")
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# The whole system (Fig. 1)


@dataclass(frozen=True)
class Config:
    """The sizes of one SRC-gAudio.  Each dict holds what the constructor of the part takes."""

    preset: str
    vae: dict
    unet: dict
    vocoder: dict                                        # the strides follow from the rate
    text_encoder: dict | str                             # or the folder of a FLAN-T5
    seconds: float                                       # length of the clips that the LDM is trained on
    guidance: float = 3.0                                # w of Eq. (4), where no other is asked for; the paper's


# tiny and small attend at the two coarsest levels alone, to save time
PRESETS = {
    "tiny": Config(                                      # tests and first steps: minutes on a CPU
        preset="tiny",
        vae=dict(widths=(32, 32, 64), blocks=1, groups=8),
        unet=dict(widths=(32, 64, 64, 96), heads=(1, 2, 2, 3), cross_attention=(False, False, True, True),
                  context_width=64, blocks=1, groups=8),
        vocoder=dict(channels=64),
        text_encoder=dict(vocabulary=128, width=64, layers=2, heads=2, head_width=32, ff_width=128),
        seconds=2.56,
    ),
    "small": Config(                                     # a laptop or any GPU
        preset="small",
        vae=dict(widths=(32, 64, 128), blocks=1, groups=8),
        unet=dict(widths=(64, 96, 128, 192), heads=(2, 3, 4, 6), cross_attention=(False, False, True, True),
                  context_width=128, blocks=1, groups=8),
        vocoder=dict(channels=128),
        text_encoder=dict(vocabulary=1024, width=128, layers=4, heads=4, head_width=32, ff_width=256),
        seconds=4.8,
        guidance=1.2,                                    # more follows Sr less, and comes nearer to the recordings
    ),
    # Section III-B, but for where cross-attention sits (see UNet).
    "paper": Config(
        preset="paper",
        vae=dict(widths=(128, 256, 512), blocks=2),
        unet=dict(widths=(320, 640, 640, 1280), heads=(5, 10, 10, 20), cross_attention=(True, True, True, False),
                  context_width=1024, blocks=2),
        vocoder=dict(channels=1024),
        # FLAN-T5-large's
        text_encoder=dict(vocabulary=32128, width=1024, layers=24, heads=16, head_width=64, ff_width=2816),
        seconds=10.24,
    ),
}


def load_part(cls: type[nn.Module], arguments: dict, path: Path) -> nn.Module:
    """A module of these arguments, from the config.json beside the file `path`, with the weights of that file."""
    return weights.build(cls, arguments, weights.read(path), path, sizes_source=path.with_name("config.json"))


def check_widths(text_encoder: TextEncoder, unet: UNet, source: Path) -> None:
    """Raises ValueError if the text encoder's width d, which `source` names, is not that of the U-Net's condition."""
    width = text_encoder.embedding.weight.shape[1]
    if width != unet.context_width:
        raise ValueError(f"{source}: the text encoder's width is {width}, the U-Net's context_width "
                         f"{unet.context_width}; make them equal")


class SRCgAudio:
    """The parts of Fig. 1 and the way from a text to a wave.

    A checkpoint is a folder: config.json, tokenizer.model, text_encoder.pt, vae.pt, unet.pt, and vocoder_16000.pt and
    so on for the rates that have one.
    """

    def __init__(self, config: Config, text_encoder: TextEncoder, vae: VAE, unet: UNet, vocoders: dict[int, Generator]):
        self.config, self.schedule = config, NoiseSchedule()
        self.text_encoder, self.vae, self.unet, self.vocoders = text_encoder, vae, unet, vocoders
        self.to(torch.device("cpu"))

    @staticmethod
    def load_config(folder: str | Path) -> Config:
        """The config.json of a checkpoint folder.  Raises ValueError naming what is wrong with it."""
        path = Path(folder) / "config.json"
        if not Path(folder).is_dir():
            raise ValueError(f"{folder}: no such checkpoint folder; train.py makes one")
        try:
            config = Config(**weights.read_json(path))
        except TypeError as error:
            names = ", ".join(field.name for field in fields(Config))
            raise ValueError(f"{path}: not a model's configuration with {names} ({error})") from None
        if config.preset not in list(PRESETS):           # it may be a list, which is no key
            raise ValueError(f"{path}: the preset must be one of {', '.join(PRESETS)}, got {config.preset!r:.50}")
        if not isinstance(config.seconds, (int, float)) or not 0.1 <= config.seconds <= 60:
            raise ValueError(f"{path}: seconds must be from 0.1 to 60, got {config.seconds!r:.50}")
        if not isinstance(config.guidance, (int, float)) or not 0 <= config.guidance <= 100:
            raise ValueError(f"{path}: guidance must be from 0 to 100, got {config.guidance!r:.50}")
        if not all(isinstance(sizes, dict) for sizes in (config.vae, config.unet, config.vocoder)):
            raise ValueError(f"{path}: vae, unet and vocoder must each be an object with sizes")
        if not isinstance(config.unet.get("tokens", []), list):
            raise ValueError(f"{path}: the unet's tokens must be a list, got {config.unet['tokens']!r:.50}")
        if not isinstance(config.text_encoder, (dict, str)):
            raise ValueError(f"{path}: text_encoder must be an object with sizes, or the folder of a FLAN-T5")
        return config

    @staticmethod
    def save_config(config: Config, folder: str | Path) -> None:
        weights.save_json(asdict(config), Path(folder) / "config.json")

    @staticmethod
    def load_vae(folder: str | Path) -> VAE:
        return load_part(VAE, SRCgAudio.load_config(folder).vae, Path(folder) / "vae.pt")

    @staticmethod
    def load_unet(folder: str | Path) -> UNet:
        return load_part(UNet, SRCgAudio.load_config(folder).unet, Path(folder) / "unet.pt")

    @staticmethod
    def load_vocoder(folder: str | Path, rate: int) -> Generator:
        check_rate(rate)
        arguments = SRCgAudio.load_config(folder).vocoder | {"strides": STRIDES[rate]}
        return load_part(Generator, arguments, Path(folder) / f"vocoder_{rate}.pt")

    @staticmethod
    def load_text_encoder(folder: str | Path) -> TextEncoder:
        arguments = SRCgAudio.load_config(folder).text_encoder
        if isinstance(arguments, str):
            if not Path(arguments).exists():
                raise ValueError(f"{Path(folder) / 'config.json'}: text_encoder names {arguments}, which is not there; "
                                 f"a FLAN-T5 must stay where it is, or be named anew")
            return TextEncoder.from_pretrained(arguments)
        encoder = load_part(TextEncoder, arguments, Path(folder) / "text_encoder.pt")
        encoder.tokenizer = read_tokenizer(Path(folder) / "tokenizer.model", len(encoder.embedding.weight))
        return encoder

    @classmethod
    def load(cls, folder: str | Path, rates: list[int] | None = None) -> "SRCgAudio":
        """A checkpoint folder, with the vocoders of `rates`, or with all that are there.

        Raises ValueError naming the file that is missing, damaged or of another shape.
        """
        folder = Path(folder)
        config = cls.load_config(folder)
        if not (folder / "unet.pt").is_file():
            raise ValueError(f"{folder}: no diffusion model (unet.pt); `train.py ldm` trains one")
        there = [rate for rate in RATES if (folder / f"vocoder_{rate}.pt").is_file()]
        rates = there if rates is None else list(rates)
        for rate in rates:
            check_rate(rate)
            if rate not in there:
                raise ValueError(f"{folder}: no vocoder for {rate} Hz (vocoder_{rate}.pt); "
                                 f"`train.py vocoder --rates {rate}` trains one")
        text_encoder, unet = cls.load_text_encoder(folder), cls.load_unet(folder)
        check_widths(text_encoder, unet, folder / "config.json")
        return cls(config, text_encoder, cls.load_vae(folder), unet,
                   {rate: cls.load_vocoder(folder, rate) for rate in rates})

    def save(self, folder: str | Path) -> None:
        """Write the checkpoint folder that `load` reads.  Vocoders that are there, of rates this model lacks, stay.

        The parts must be those that `config` describes.  A FLAN-T5 that it names by its folder is not written.
        Raises ValueError if `load` would refuse what is written; the folder is then as it was.
        """
        with weights.replace_files(Path(folder)) as new:
            self.save_config(self.config, new)
            if isinstance(self.config.text_encoder, dict):         # a FLAN-T5 stays in its own folder
                self.text_encoder.save(new)
            weights.save(self.vae.state_dict(), new / "vae.pt")
            weights.save(self.unet.state_dict(), new / "unet.pt")
            for rate, vocoder in self.vocoders.items():
                weights.save(vocoder.state_dict(), new / f"vocoder_{rate}.pt")
            self.load(new)

    def to(self, device: torch.device | str, precision: str = "auto") -> "SRCgAudio":
        """Move all parts to a device and compute in `precision` from now on: auto, bf16 or fp32.

        Raises ValueError for others.  A later call without a precision sets auto again.
        """
        device = pick_device(str(device))
        for part in (self.text_encoder, self.vae, self.unet, *self.vocoders.values()):
            part.to(device)
        self.device, self.precision = device, pick_precision(device, precision)
        return self

    @torch.no_grad()
    def generate(self, prompts: list[str], rate: int, seconds: float | None = None, steps: int = 200,
                 guidance: float | None = None, seed: int = 0, progress: bool = False) -> Tensor:
        """Texts -> waves (B, round(seconds * rate)) in [-1, 1].

        rate: one of the four, in Hz.  seconds: 0.1 to 60; default: the length the model was trained on.
        steps: of DDIM, 1 to 1000.  guidance: w of Eq. (4), 0 to 100; 1 is none; default: the checkpoint's.  seed: item
        i starts from noise of seed + i, the same in any batch, on any device and at every rate.  progress: show a bar.
        Raises ValueError for anything out of range.
        """
        seconds = self.config.seconds if seconds is None else seconds
        check_rate(rate)
        if rate not in self.vocoders:
            raise ValueError(f"there is no vocoder for {rate} Hz in this checkpoint")
        mel = self.generate_mel(prompts, rate, seconds, steps, guidance, seed, progress)     # (B, T, 64)
        # In float32: bfloat16's rounding noise is 17 to 20 dB below the sound of a small vocoder, and above its highs.
        with autocast(self.device, torch.float32):
            wave = self.vocoders[rate](mel)                                       # (B, T * hop)
        return wave[:, :round(seconds * rate)]

    @torch.no_grad()                                     # in inference mode autocast would cast weights at each step
    def generate_mel(self, prompts: list[str], rate: int, seconds: float | None = None, steps: int = 200,
                     guidance: float | None = None, seed: int = 0, progress: bool = False) -> Tensor:
        """What `generate` gives the vocoder: log-mels (B, T, 64).  T is 100 * seconds, or a little more, since T/4
        must be a multiple of 8 for the U-Net; `generate` cuts the wave."""
        seconds = self.config.seconds if seconds is None else seconds
        guidance = self.config.guidance if guidance is None else guidance
        seed = operator.index(seed)                      # NumPy's integers too
        check_rate(rate)
        prompts = [] if isinstance(prompts, str) else list(prompts)              # a text is no list of its letters
        if not prompts or not all(isinstance(text, str) for text in prompts):
            raise ValueError("there is no prompt; prompts must be a list of texts, one at least")
        if not 0.1 <= seconds <= 60:
            raise ValueError(f"seconds must be from 0.1 to 60, got {seconds}")
        if not 0 <= guidance <= 100:
            raise ValueError(f"guidance must be from 0 to 100, got {guidance}")
        if not 0 <= seed < 2 ** 62:
            raise ValueError(f"the seed must be from 0 to 2^62 - 1, got {seed}")

        frames = round(seconds * FRAMES_PER_SECOND, 3)   # 2.24 * 100 is a little more than 224
        length = math.ceil(frames / 4 / self.unet.multiple) * self.unet.multiple             # of the latent, T/4
        bands = RATES[rate].n_mels // 4
        generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(len(prompts))]
        z_T = torch.stack([torch.randn((VAE.LATENT, length, bands), generator=generator, device="cpu")
                           for generator in generators]).to(self.device)          # (B, 8, T/4, 16)
        # Autocast keeps its bfloat16 copies of weights until its block ends: a block for each part frees them between.
        with autocast(self.device, self.precision):
            text, mask = self.text_encoder.encode([*prompts, ""])                 # (B + 1, N, d), (B + 1, N)
        null, null_mask = text[-1:].expand(len(prompts), -1, -1), mask[-1:].expand(len(prompts), -1)

        def predict_noise(z_t: Tensor, t: int) -> Tensor:
            return guided_noise(self.unet, self.schedule, z_t, t, rate, text[:-1], mask[:-1], null, null_mask, guidance)

        with autocast(self.device, self.precision):
            z_0 = self.schedule.ddim(predict_noise, z_T, steps, progress)
        with autocast(self.device, self.precision):
            return self.vae.decode(z_0 / self.vae.scale_factor)                   # (B, T, 64)


# ---------------------------------------------------------------------------------------------------------------------
# Devices, precision and errors


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA where there is one.  Raises ValueError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()             # a meta device holds no numbers
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"the device {name!r} can't be used ({weights.first_line(error)}); try --device cpu") from None
    return device


def pick_precision(device: torch.device, name: str = "auto") -> torch.dtype:
    """"bf16", "fp32", or "auto": bfloat16 where a GPU or an x86 processor multiplies it in hardware, else float32."""
    if name not in ("auto", "bf16", "fp32"):
        raise ValueError(f"precision must be auto, bf16 or fp32, got {name!r}")
    if name == "auto" and device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    if name == "auto":
        cpu = torch.cpu.get_capabilities()
        return torch.bfloat16 if cpu.get("amx_bf16") or cpu.get("avx512_bf16") else torch.float32
    return torch.bfloat16 if name == "bf16" else torch.float32


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """In here networks compute in `precision`; their weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16)


def exit_cleanly(main) -> None:
    """Run a command: a user's mistake ends in one line on stderr and status 2, Ctrl-C in status 130."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):               # a notebook's is no file
            stream.reconfigure(errors="backslashreplace")         # a prompt may have characters that the terminal lacks
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted; what was finished before is kept", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[-1]     # a worker's comes with its traceback
        print(f"error: {line.removeprefix('ValueError: ')}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        of_memory = ("can't allocate memory", "out of memory", "ALLOC_FAILED")   # the CPU's, CUDA's, its libraries'
        if isinstance(error, MemoryError) or any(words in str(error) for words in of_memory):
            line = "the memory is full; a smaller --batch takes less, and train.py has --accumulate"
        elif str(error).startswith("DataLoader worker ("):           # not what one raised: that is "Caught ..."
            line = "a process that reads data was killed, perhaps for want of memory; fewer --workers take less"
        else:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
