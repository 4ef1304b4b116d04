"""Ours against the libraries a user would take instead: diffusers, transformers, librosa.

    pip install diffusers transformers librosa       # no dependency of the project; without them ours runs alone
    python tests/bench.py unet vae text vocoder mel generate train --precision fp32
    python tests/bench.py unet generate --compile    # ours with torch.compile, the peers without
    python tests/bench.py memory                     # what generation takes beside its weights; ours alone

Both sides have the same weights, inputs, precision and threads, in one process, in turn; the peers have the layout that
is fastest for them.  Prints the median time of each, ours over theirs, the arithmetic (as torch counts it), the share
of the machine's own matrix rate in this precision (a 4096^3 product, measured in the same run) that ours reaches, and
how far the results are apart, relative to the largest value.
"""
import argparse
import importlib.util
import resource
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
import vae as vae_module
import weights
from srcgaudio import (PRESETS, T5_NAMES, NoiseSchedule, SRCgAudio, TextEncoder, autocast, guided_noise,
                       mel_spectrogram, pick_device)
from unet import DIFFUSERS_NAMES, UNet
from vae import VAE
from vocoder import STRIDES, TRANSFORMERS_NAMES, Generator

SECONDS = 10.24


def installed(*names: str) -> bool:
    return all(importlib.util.find_spec(name) for name in names)


def load(peer: nn.Module, ours: nn.Module, names: weights.Names) -> nn.Module:
    """The peer with our weights under its names; linear layers for our 1 x 1 convolutions where it has those."""
    shapes = {name: tensor.shape for name, tensor in peer.state_dict().items()}
    tensors = weights.rename(ours.state_dict(), names, backwards=True)
    missing, _ = peer.load_state_dict({name: tensor.reshape(shapes[name]) for name, tensor in tensors.items()
                                       if name in shapes}, strict=False)
    allowed = {"mean", "scale", "encoder.embed_tokens.weight"}       # unused, or the same as shared.weight
    assert set(missing) <= allowed, missing
    return peer


class Bench:
    def __init__(self, device: torch.device, precision: torch.dtype, repeats: int, compile: bool):
        self.device, self.precision, self.repeats, self.compile = device, precision, repeats, compile
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32     # products as convolutions
        a, b = (torch.randn(4096, 4096, device=device, dtype=precision) for _ in range(2))
        self.flops = 2 * 4096 ** 3 / self.time({"": lambda: a @ b})[""]
        print(f"{device}, {precision}, {torch.get_num_threads()} threads, 4096^3: {self.flops / 1e9:.0f} GFLOP/s")
        print("| | ours, s | peer, s | ours / peer | GFLOP | share of the matrix rate | difference |")
        print("|---" * 7 + "|")

    def time(self, sides: dict) -> dict[str, float]:
        """The median seconds of each side, run in turn after one round to warm up."""
        times = {name: [] for name in sides}
        for repeat in range(self.repeats + 1):
            for name, run in sides.items():
                began = time.perf_counter()
                run()
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                times[name].append(time.perf_counter() - began)
        return {name: statistics.median(values[1:]) for name, values in times.items()}

    def compare(self, title: str, ours, peer, training: bool = False) -> None:
        """A row of the table.  ours, peer: () -> the result; peer may be None."""
        def peer_in_its_precision():
            with torch.autocast(self.device.type, enabled=False):
                return peer()

        sides = {"ours": ours} | ({"peer": peer if training else peer_in_its_precision} if peer else {})
        # Sampling is under one autocast, which casts each weight once; each step of training has its own.
        with nullcontext() if training else autocast(self.device, self.precision):
            result = ours()                              # compiles, if it must
            with FlopCounterMode(display=False) as counter:
                ours()
            flop = counter.get_total_flops()
            times = self.time(sides)
        cells = [title, f"{times['ours']:.3f}", "", "", f"{flop / 1e9:.0f}",
                 f"{flop / times['ours'] / self.flops:.2f}", ""]
        if peer:
            cells[2:4] = f"{times['peer']:.3f}", f"{times['ours'] / times['peer']:.2f}"
            if isinstance(result, torch.Tensor):
                other = sides["peer"]().to(result.device)
                cells[6] = f"{((result - other).abs().max() / other.abs().max()).item():.1e}"
        print("| " + " | ".join(cells) + " |", flush=True)

    def prepare(self, network: nn.Module, peer: bool = False, image: bool = False) -> nn.Module:
        """A network on the device; the peers', which have no autocast of their own, in the precision."""
        network = network.eval().to(self.device, self.precision if peer else torch.float32)
        return network.to(memory_format=torch.channels_last) if image else network


def diffusers_unet(ours: UNet, arguments: dict) -> nn.Module:
    from diffusers import UNet2DConditionModel
    attends = arguments["cross_attention"]
    return load(UNet2DConditionModel(
        in_channels=8, out_channels=8, block_out_channels=arguments["widths"], attention_head_dim=arguments["heads"],
        cross_attention_dim=arguments["context_width"], layers_per_block=arguments["blocks"],
        norm_num_groups=arguments.get("groups", 32), use_linear_projection=True,
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)]), ours, DIFFUSERS_NAMES)


def diffusers_vae(ours: VAE) -> nn.Module:
    from diffusers import AutoencoderKL
    return load(AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=8, block_out_channels=(128, 256, 512), layers_per_block=2,
        norm_num_groups=32, down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3),
        ours, vae_module.DIFFUSERS_NAMES)


def transformers_vocoder(ours: Generator) -> nn.Module:
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig
    return load(SpeechT5HifiGan(SpeechT5HifiGanConfig(
        model_in_dim=64, sampling_rate=16000, upsample_initial_channel=1024, upsample_rates=[5, 4, 2, 2, 2],
        upsample_kernel_sizes=[16, 16, 8, 4, 4], normalize_before=False)), ours, TRANSFORMERS_NAMES)


def bench_unet(bench: Bench, peers: bool) -> None:
    """One guided step at the paper's size: a batch of two, 66 tokens, latent 8 x 256 x 16."""
    arguments = PRESETS["paper"].unet
    ours = UNet(**arguments)
    peer = bench.prepare(diffusers_unet(ours, arguments), peer=True, image=True) if peers else None
    ours = bench.prepare(ours, image=True)
    if bench.compile:
        ours.compile()
    z, c = torch.randn(2, 8, 256, 16, device=bench.device), torch.randn(2, 66, 1024, device=bench.device)
    t, mask = torch.full((2,), 500, device=bench.device), torch.ones(2, 66, dtype=torch.bool, device=bench.device)
    z_peer = z.to(bench.precision).contiguous(memory_format=torch.channels_last)
    bench.compare("U-Net, a guided step", lambda: ours(z, t, c, mask),
                  peers and (lambda: peer(z_peer, t, c.to(bench.precision)).sample.float()))


def bench_vae(bench: Bench, peers: bool) -> None:
    ours = VAE()
    peer = bench.prepare(diffusers_vae(ours), peer=True, image=True) if peers else None
    ours = bench.prepare(ours, image=True)
    z = torch.randn(1, 8, 256, 16, device=bench.device)
    z_peer = z.to(bench.precision).contiguous(memory_format=torch.channels_last)
    bench.compare("VAE, decoding 10.24 s", lambda: ours.decode(z),
                  peers and (lambda: peer.decode(z_peer).sample[:, 0].float()))


def bench_text(bench: Bench, peers: bool) -> None:
    ours = TextEncoder()
    ours.initialize(torch.Generator().manual_seed(0))
    peer = None
    if peers:
        from transformers import T5Config, T5EncoderModel
        sizes = TextEncoder.sizes(weights.rename(ours.state_dict(), T5_NAMES, backwards=True), "ours")
        peer = bench.prepare(load(T5EncoderModel(T5Config(**TextEncoder.transformers_config(sizes))), ours, T5_NAMES),
                             peer=True)
    ours = bench.prepare(ours)
    ids = torch.randint(3, 32000, (16, 24), generator=torch.Generator().manual_seed(0)).to(bench.device)
    mask = torch.ones(16, 24, dtype=torch.bool, device=bench.device)
    bench.compare("FLAN-T5-large, 16 prompts of 24 tokens", lambda: ours(ids, mask),
                  peers and (lambda: peer(input_ids=ids, attention_mask=mask).last_hidden_state.float()))


def bench_vocoder(bench: Bench, peers: bool) -> None:
    ours = Generator()
    peer = bench.prepare(transformers_vocoder(ours), peer=True) if peers else None
    ours = bench.prepare(ours)
    mel = torch.randn(1, 1024, 64, device=bench.device)
    bench.compare("vocoder, 10.24 s at 16 kHz", lambda: ours(mel),
                  peers and (lambda: peer(mel.to(bench.precision)).float()[:, :16 * 10240]))


def bench_mel(bench: Bench, peers: bool) -> None:
    wave = 0.1 * torch.randn(1, round(SECONDS * 16_000))

    def librosas() -> torch.Tensor:
        import librosa
        import numpy as np
        mel = librosa.feature.melspectrogram(y=wave[0].numpy(), sr=16_000, n_fft=1024, hop_length=160, n_mels=64,
                                             power=1.0, pad_mode="reflect")
        return torch.from_numpy(np.log(np.maximum(mel, 1e-5)).T)[None, :1024]

    bench.compare("mel, 10.24 s at 16 kHz", lambda: mel_spectrogram(wave, 16_000), librosas if peers else None)


def bench_train(bench: Bench, peers: bool) -> None:
    """A step of the small preset's U-Net: forward, backward, AdamW, EMA; batch 16."""
    arguments = PRESETS["small"].unet
    schedule = NoiseSchedule()
    ours = UNet(**arguments).to(bench.device, memory_format=torch.channels_last)
    sides = {"ours": ours}
    if peers:
        sides["peer"] = diffusers_unet(ours, arguments).to(bench.device, memory_format=torch.channels_last)
    z, eps = (torch.randn(16, 8, 120, 16, device=bench.device) for _ in range(2))
    c = torch.randn(16, 10, arguments["context_width"], device=bench.device)
    t = torch.arange(16, device=bench.device) * 60
    mask = torch.ones(16, 10, dtype=torch.bool, device=bench.device)
    z_t = schedule.add_noise(z, eps, t)
    steps = {}
    for name, network in sides.items():
        network.train()
        optimizer = torch.optim.AdamW(network.parameters(), 1e-4, fused=True)

        def step(name=name, network=network, ema=train.Ema(network), optimizer=optimizer) -> None:
            def losses(_part) -> dict:
                with autocast(bench.device, bench.precision):
                    if name == "ours":
                        predicted = network(z_t, t, c, mask)
                    else:
                        predicted = network(z_t, t, c, encoder_attention_mask=mask).sample
                return {"loss": (eps - predicted).square().mean()}
            train.descend(network, optimizer, [None], losses)
            ema.update(network, 0)
        steps[name] = step
    with torch.enable_grad():
        bench.compare("small U-Net, a training step of 16", steps["ours"], steps.get("peer"), training=True)


def bench_generate(bench: Bench, peers: bool) -> None:
    """From text embeddings to a wave at the paper's size, w = 3; 2 steps of DDIM stand for 200."""
    arguments, schedule, steps = PRESETS["paper"].unet, NoiseSchedule(), 2
    unet, decoder, vocoder = UNet(**arguments), VAE(), Generator()
    if peers:
        from diffusers import DDIMScheduler
        peer_unet = bench.prepare(diffusers_unet(unet, arguments), peer=True, image=True)
        peer_vae = bench.prepare(diffusers_vae(decoder), peer=True, image=True)
        peer_vocoder = bench.prepare(transformers_vocoder(vocoder), peer=True)
        scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                                  set_alpha_to_one=False, clip_sample=False)
    unet, decoder = bench.prepare(unet, image=True), bench.prepare(decoder, image=True)
    vocoder = bench.prepare(vocoder)
    if bench.compile:
        unet.compile()
    z_T = torch.randn(1, 8, 256, 16, device=bench.device)
    text, null = (torch.randn(1, 64, 1024, device=bench.device) for _ in range(2))
    mask = torch.ones(1, 64, dtype=torch.bool, device=bench.device)

    def ours() -> torch.Tensor:
        z_0 = schedule.ddim(lambda z_t, t: guided_noise(unet, schedule, z_t, t, 16_000, text, mask, null, mask, 3.0),
                            z_T, steps)
        return vocoder(decoder.decode(z_0))

    def peer() -> torch.Tensor:
        z_t = z_T.to(bench.precision)
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            both = torch.full((2,), int(t), device=bench.device)
            c, _ = unet.condition(both, torch.full_like(both, 16_000), torch.cat([text, null]), torch.cat([mask, mask]))
            latent = torch.cat([z_t, z_t]).contiguous(memory_format=torch.channels_last)
            eps, eps_null = peer_unet(latent, both, c.to(bench.precision)).sample.chunk(2)
            z_t = scheduler.step(eps_null + 3.0 * (eps - eps_null), t, z_t).prev_sample
        mel = peer_vae.decode(z_t.contiguous(memory_format=torch.channels_last)).sample[:, 0]
        return peer_vocoder(mel).float()[:, :16 * 10240]

    bench.compare(f"generation, {steps} steps", ours, peer if peers else None)


def bench_memory(bench: Bench, _peers: bool) -> None:
    """One prompt, 10.24 s at 48 kHz, at the paper's size; 2 steps of DDIM take as much as 200.  A peak is the whole
    process's, so nothing else may run in it."""
    config = PRESETS["paper"]
    encoder = TextEncoder(**config.text_encoder)
    encoder.tokenizer = train.train_tokenizer(["a dog barks", "rain on a roof"], 40)
    vocoder = Generator(strides=STRIDES[48_000], **config.vocoder)
    model = SRCgAudio(config, encoder, VAE(**config.vae), UNet(**config.unet), {48_000: vocoder})
    for part in (model.unet, model.vae):
        part.to(memory_format=torch.channels_last)
    model.to(bench.device, "bf16" if bench.precision == torch.bfloat16 else "fp32")
    networks = nn.ModuleList([encoder, model.vae, model.unet, vocoder])
    weighs = sum(tensor.numel() * tensor.itemsize for tensor in networks.state_dict().values())
    model.generate(["a dog barks"], 48_000, steps=2)
    peak = (torch.cuda.max_memory_allocated(bench.device) if bench.device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)              # Linux counts in KiB
    print(f"weights {weighs / 2 ** 30:.2f} GiB, at most {peak / 2 ** 30:.2f} GiB in use")


PARTS = {"unet": (bench_unet, "diffusers"), "vae": (bench_vae, "diffusers"), "text": (bench_text, "transformers"),
         "vocoder": (bench_vocoder, "transformers"), "mel": (bench_mel, "librosa"),
         "generate": (bench_generate, "diffusers transformers"), "train": (bench_train, "diffusers"),
         "memory": (bench_memory, "")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=list(PARTS))
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    if "memory" in args.parts and len(args.parts) > 1:
        parser.error("memory is measured alone")
    torch.manual_seed(0)
    precision = torch.bfloat16 if args.precision == "bf16" else torch.float32
    bench = Bench(pick_device(args.device), precision, args.repeats, args.compile)
    for part in args.parts:
        run, names = PARTS[part]
        with torch.no_grad():
            run(bench, installed(*names.split()))


if __name__ == "__main__":
    main()
