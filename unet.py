"""The U-Net of eps_theta(z_t, t, c), and how the time step, the sampling rate and the text become its condition c.

Sections II-A and III-B, Fig. 1.  Stable Diffusion's U-Net at the paper's widths: four encoder blocks, a middle block
and four decoder blocks over the latent "image" (time x frequency), with cross-attention to c:

    condition   t (B,), rate (B,) in Hz, text (B, N, d) -> c (B, N + 2, d), c_mask (B, N + 2)
    forward     z_t (B, 8, T/4, 16), t (B,), c, c_mask -> predicted noise (B, 8, T/4, 16)

Images are kept in channels_last, where (B, C, H, W) already lies in memory as the list of tokens (B, H*W, C), so
going between convolution and attention moves no data on a CPU.
"""
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weights

# diffusers' name -> ours, read in both directions (weights.rename)
DIFFUSERS_NAMES = [
    ("attentions.{}.transformer_blocks.0.norm{}.", "attentions.{}.norm{}."),
    (".transformer_blocks.0.attn1.", ".self_attention."),
    (".transformer_blocks.0.attn2.", ".cross_attention."),
    (".transformer_blocks.0.ff.net.0.proj.", ".feed_forward.proj_in."),
    (".transformer_blocks.0.ff.net.2.", ".feed_forward.proj_out."),
    (".to_out.0.", ".to_out."),
    (".downsamplers.0.conv.", ".downsample."),
    (".upsamplers.0.conv.", ".upsample."),
]


def sinusoid(x: Tensor, width: int) -> Tensor:
    """The sinusoidal embedding of scalars, x (B,) -> (B, width): cosines, then sines, of periods from 2 pi up to
    2 pi 10,000^(1 - 2 / width)."""
    frequency = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=x.device) / (width // 2))
    angle = x.float()[:, None] * frequency                                        # (B, width / 2)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class TimeEmbedding(nn.Module):
    """t (B,) -> (B, width), for the residual blocks."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.channels = channels
        self.linear_1 = nn.Linear(channels, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(sinusoid(t, self.channels))))


class ResBlock(nn.Module):
    """A residual block conditioned on the time step, (B, C_in, H, W) and (B, d_t) -> (B, C_out, H, W)."""

    def __init__(self, c_in: int, c_out: int, time_width: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_width, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(C / heads)) V with several heads: Q from x (B, M, C), K and V from context (B, N, d)."""

    def __init__(self, channels: int, heads: int, context_width: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_width, channels, bias=False)
        self.to_v = nn.Linear(context_width, channels, bias=False)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (h.unflatten(2, (self.heads, -1)).transpose(1, 2)               # (B, heads, tokens, C / heads)
                   for h in (self.to_q(x), self.to_k(context), self.to_v(context)))
        if mask is not None:
            mask = mask.bool()[:, None, None, :]                                  # (B, 1, 1, N), True: attend
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)               # (B, heads, M, C / heads)
        return self.to_out(h.transpose(1, 2).flatten(2))                          # (B, M, C)


class FeedForward(nn.Module):
    """GEGLU, (B, M, C) -> (B, M, C): one half of a linear layer gates the other."""

    def __init__(self, channels: int):
        super().__init__()
        self.proj_in = nn.Linear(channels, 8 * channels)
        self.proj_out = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        h, gate = self.proj_in(x).chunk(2, dim=2)                                 # (B, M, 4 C) each
        return self.proj_out(h * F.gelu(gate))


class Transformer(nn.Module):
    """Self-attention over the image, cross-attention to c, feed-forward; (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, heads: int, context_width: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.norm1 = nn.LayerNorm(channels)
        self.self_attention = Attention(channels, heads, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.cross_attention = Attention(channels, heads, context_width)
        self.norm3 = nn.LayerNorm(channels)
        self.feed_forward = FeedForward(channels)
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, c: Tensor, c_mask: Tensor) -> Tensor:
        h = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))                 # (B, H*W, C)
        h_norm = self.norm1(h)
        h = h + self.self_attention(h_norm, h_norm)
        h = h + self.cross_attention(self.norm2(h), c, c_mask)    # Section II-A: K and V are made from the condition
        h = h + self.feed_forward(self.norm3(h))
        return x + self.proj_out(h).transpose(1, 2).unflatten(2, x.shape[2:])


class DownBlock(nn.Module):
    """An encoder block, (B, C_in, H, W) -> (B, c_out, H/2, W/2).  Leaves each of its outputs in `skips`; the last block
    keeps the size.

    c_ins: channels that each residual block takes; each gives c_out, and a transformer follows where there are heads.
    """

    def __init__(self, c_ins: list[int], c_out: int, heads: int, context_width: int, time_width: int, groups: int,
                 last: bool):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(c_in, c_out, time_width, groups) for c_in in c_ins)
        self.attentions = nn.ModuleList(Transformer(c_out, heads, context_width, groups) for _ in c_ins if heads)
        self.downsample = None if last else nn.Conv2d(c_out, c_out, 3, stride=2, padding=1)

    def forward(self, h: Tensor, skips: list[Tensor], time: Tensor, c: Tensor, c_mask: Tensor) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            h = resnet(h, time)
            if self.attentions:
                h = self.attentions[i](h, c, c_mask)
            skips.append(h)
        if self.downsample is not None:
            h = self.downsample(h)                                                # (B, C, H/2, W/2)
            skips.append(h)
        return h


class MiddleBlock(nn.Module):
    """Residual block, transformer, residual block, (B, C, H, W) -> (B, C, H, W); the first alone where there are no
    heads, as in diffusers."""

    def __init__(self, channels: int, heads: int, context_width: int, time_width: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(channels, channels, time_width, groups) for _ in range(2 if heads else 1))
        self.attentions = nn.ModuleList([Transformer(channels, heads, context_width, groups)] if heads else [])

    def forward(self, h: Tensor, time: Tensor, c: Tensor, c_mask: Tensor) -> Tensor:
        h = self.resnets[0](h, time)
        if self.attentions:
            h = self.resnets[1](self.attentions[0](h, c, c_mask), time)
        return h


class UpBlock(nn.Module):
    """A decoder block, (B, C_in, H, W) -> (B, c_out, 2H, 2W).  Takes back what the encoder left in `skips`; the last
    block keeps the size.

    c_ins: channels that each residual block takes; each gives c_out, and a transformer follows where there are heads.
    """

    def __init__(self, c_ins: list[int], c_out: int, heads: int, context_width: int, time_width: int, groups: int,
                 last: bool):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(c_in, c_out, time_width, groups) for c_in in c_ins)
        self.attentions = nn.ModuleList(Transformer(c_out, heads, context_width, groups) for _ in c_ins if heads)
        self.upsample = None if last else nn.Conv2d(c_out, c_out, 3, padding=1)

    def forward(self, h: Tensor, skips: list[Tensor], time: Tensor, c: Tensor, c_mask: Tensor) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            h = resnet(torch.cat([h, skips.pop()], dim=1), time)
            if self.attentions:
                h = self.attentions[i](h, c, c_mask)
        if self.upsample is not None:
            h = self.upsample(F.interpolate(h, scale_factor=2.0, mode="nearest"))  # (B, C, 2H, 2W)
        return h


class UNet(nn.Module):
    """The network in eps_theta of Eq. (3).  The defaults are the paper's: 561.15 M parameters, in float32; for bfloat16
    there is autocast.

    widths: channels of the encoder blocks; the decoder has them in reverse.  Multiples of 32.
    heads: attention heads at each of these levels; the last number is the middle block's too.
    cross_attention: which levels attend to c, from the full latent resolution down; the others have no transformer.
        The default is Stable Diffusion's placement, which the paper's parameter count bears out; the paper's words,
        "the last three encoder blocks and the first three decoder blocks", are (False, True, True, True): 724.7 M,
        and without attention in the middle 658.1 M.
    cross_attention_middle: whether the middle block does; if not, it is one residual block, as in diffusers.
    context_width: d, the width of the text embedding and of the condition's tokens.
    tokens: which scalars become tokens of c.  SRC-gAudio ("time", "rate"), gAudio ("time",), Tango ().
    blocks: residual blocks of an encoder block (a decoder block has one more).
    groups: how many groups of channels each norm has.  A norm removes each group's mean: with two channels in a group
        little is left of the latent's own means, and they drift during sampling; so narrow networks take fewer groups.
    predicts: "eps"; or "v", as in Tango's network, which NoiseSchedule.eps_from_v turns into eps.
    """

    LATENT = 8

    def __init__(self, widths: tuple[int, ...] = (320, 640, 640, 1280), heads: tuple[int, ...] = (5, 10, 10, 20),
                 cross_attention: tuple[bool, ...] = (True, True, True, False), cross_attention_middle: bool = True,
                 context_width: int = 1024, tokens: tuple[str, ...] = ("time", "rate"), blocks: int = 2,
                 groups: int = 32, predicts: str = "eps"):
        super().__init__()
        levels = len(widths)
        if len(heads) != levels or len(cross_attention) != levels:
            raise ValueError(f"the U-Net's widths {tuple(widths)}, heads {tuple(heads)} and cross_attention "
                             f"{tuple(cross_attention)} must be equally many")
        if any(type(head) is not int or head < 1 or width % 32 or width % head for width, head in zip(widths, heads)):
            raise ValueError(f"the U-Net's widths {tuple(widths)} must be multiples of 32 and of the heads "
                             f"{tuple(heads)}")
        if type(groups) is not int or groups not in (1, 2, 4, 8, 16, 32):
            raise ValueError(f"the U-Net's groups must be 1, 2, 4, 8, 16 or 32, got {groups!r}")
        if context_width % 2:                            # a sinusoid has as many cosines as sines
            raise ValueError(f"the U-Net's context_width must be even, got {context_width}")
        if set(tokens) - {"time", "rate"}:
            raise ValueError(f'the U-Net\'s condition tokens are "time" and "rate", got {tuple(tokens)}')
        if predicts not in ("eps", "v"):
            raise ValueError(f'the U-Net predicts "eps" or "v", got {predicts!r}')
        self.predicts = predicts
        self.context_width = context_width
        self.multiple = 2 ** (levels - 1)                # the latent's sides must be multiples of this
        self.time_token = nn.Linear(context_width, context_width) if "time" in tokens else None
        self.rate_token = nn.Linear(context_width, context_width) if "rate" in tokens else None

        time_width = 4 * widths[0]
        self.time_embedding = TimeEmbedding(widths[0], time_width)
        self.conv_in = nn.Conv2d(self.LATENT, widths[0], 3, padding=1)
        heads_at = [head if attends else 0 for head, attends in zip(heads, cross_attention)]

        self.down_blocks = nn.ModuleList()
        # In the order of `skips` in forward.  Paper: 320 x 4, 640 x 6, 1280 x 2; a decoder block takes three of them.
        skip_channels = [widths[0]]
        c_in = widths[0]
        for level, width in enumerate(widths):
            c_ins = [c_in if i == 0 else width for i in range(blocks)]
            last = level == levels - 1
            self.down_blocks.append(DownBlock(c_ins, width, heads_at[level], context_width, time_width, groups, last))
            skip_channels += [width] * (blocks if last else blocks + 1)
            c_in = width

        self.mid_block = MiddleBlock(widths[-1], heads[-1] if cross_attention_middle else 0, context_width, time_width,
                                     groups)

        self.up_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            c_ins = [(c_in if i == 0 else width) + skip_channels.pop() for i in range(blocks + 1)]
            self.up_blocks.append(
                UpBlock(c_ins, width, heads_at[level], context_width, time_width, groups, last=level == 0))
            c_in = width

        self.conv_norm_out = nn.GroupNorm(groups, widths[0])
        self.conv_out = nn.Conv2d(widths[0], self.LATENT, 3, padding=1)

    def condition(self, t: Tensor, rate: Tensor, text: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """c = concat(psi(P), Sr) of Section II-A, with the time step beside the rate: [psi(P); t; Sr].

        t: (B,) diffusion steps.  rate: (B,) sampling rates in Hz, not only the four.
        text: (B, N, d) from the text encoder.  text_mask: (B, N), True at real tokens.
        Returns c (B, N + 2, d) and c_mask (B, N + 2), or fewer tokens where this network has fewer.
        """
        tokens = []
        if self.time_token is not None:
            tokens.append(self.time_token(sinusoid(t, self.context_width))[:, None])             # (B, 1, d)
        if self.rate_token is not None:                  # in kHz, so that near rates are alike; in Hz all are far apart
            tokens.append(self.rate_token(sinusoid(rate / 1000, self.context_width))[:, None])   # (B, 1, d)
        c = torch.cat([text, *tokens], dim=1)                                                    # (B, N + 2, d)
        return c, F.pad(text_mask, (0, len(tokens)), value=True)                                 # (B, N + 2)

    def forward(self, z_t: Tensor, t: Tensor, c: Tensor, c_mask: Tensor) -> Tensor:
        """The noise in z_t (or v), (B, 8, T/4, 16) -> the same shape; T/4 is a multiple of 8 (of 2^(levels - 1))."""
        if z_t.shape[2] % self.multiple or z_t.shape[3] % self.multiple:
            raise ValueError(f"the U-Net takes latents whose sides are multiples of {self.multiple}, "
                             f"got {z_t.shape[2]} x {z_t.shape[3]}")
        time = self.time_embedding(t)                                             # (B, d_t); t is in c as well
        h = self.conv_in(z_t.contiguous(memory_format=torch.channels_last))
        skips = [h]
        for block in self.down_blocks:
            h = block(h, skips, time, c, c_mask)
        h = self.mid_block(h, time, c, c_mask)
        for block in self.up_blocks:
            h = block(h, skips, time, c, c_mask)
        return self.conv_out(F.silu(self.conv_norm_out(h))).float()

    @classmethod
    def from_pretrained(cls, path: str | Path, add_tokens: tuple[str, ...] = ()) -> "UNet":
        """A diffusers `unet/` folder, or Tango's `pytorch_model_main.bin`.

        add_tokens: which of "time" and "rate" to add, untrained, where the file has none, to go on training with them.
        Raises ValueError naming the file if it is damaged or holds anything else.
        """
        return weights.build(cls, *cls.published(path, add_tokens))

    @classmethod
    def published(cls, path: str | Path, add_tokens: tuple[str, ...] = ()) -> weights.Published:
        """What `weights.build` takes to make the U-Net of a published file."""
        path = Path(path)
        everything = weights.read(path)
        tensors = weights.under(everything, "unet.", "")                          # Tango's text encoder is beside it
        predicts = "v" if any(name.startswith("unet.") for name in everything) else "eps"
        config = {}
        if path.is_dir():
            config = weights.read_json(path / "config.json")
            weights.check_config(config, {
                "act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5, "downsample_padding": 1,
                "center_input_sample": False, "mid_block_scale_factor": 1, "only_cross_attention": False,
                "time_embedding_act_fn": None, "timestep_post_act": None}, path / "config.json")
            if (path / "condition_tokens.safetensors").is_file():                 # ours, written by weights.py export
                tensors |= weights.read(path / "condition_tokens.safetensors")
            scheduler_path = path.parent / "scheduler" / "scheduler_config.json"
            scheduler = weights.read_json(scheduler_path) if scheduler_path.is_file() else {}
            predicts = "v" if scheduler.get("prediction_type") == "v_prediction" else "eps"
            weights.check_config(scheduler, {             # NoiseSchedule's
                "num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
                "beta_end": 0.012, "rescale_betas_zero_snr": False,
                "prediction_type": "v_prediction" if predicts == "v" else "epsilon"}, scheduler_path)

        levels = range(weights.count(tensors, "down_blocks.{}."))
        widths = [weights.shape_of(tensors, f"down_blocks.{i}.resnets.0.conv1.weight", 4, path)[0] for i in levels]
        # diffusers' name for the number of heads, and its default; Tango's file tells none: Stable Diffusion 2's
        heads = config.get("attention_head_dim", 8) if path.is_dir() else [width // 64 for width in widths]
        attends = [f"down_blocks.{i}.attentions.0.norm.weight" in tensors for i in levels]
        to_k = next((name for name in tensors if name.endswith(".attn2.to_k.weight")), "attn2.to_k.weight")
        context_width = weights.shape_of(tensors, to_k, 2, path)[1]
        for token in add_tokens:
            if f"{token}_token.weight" not in tensors:
                layer = nn.Linear(context_width, context_width)
                tensors |= {f"{token}_token.{name}": tensor for name, tensor in layer.state_dict().items()}
        sizes = {"widths": widths, "heads": heads if isinstance(heads, list) else [heads] * len(widths),
                 "cross_attention": attends, "cross_attention_middle": "mid_block.attentions.0.norm.weight" in tensors,
                 "context_width": context_width, "blocks": weights.count(tensors, "down_blocks.0.resnets.{}."),
                 "tokens": [token for token in ("time", "rate") if f"{token}_token.weight" in tensors],
                 "groups": config.get("norm_num_groups", 32), "predicts": predicts}
        return sizes, tensors, path, DIFFUSERS_NAMES
