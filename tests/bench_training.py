"""What training the latent diffusion model costs.

    python tests/bench_training.py speed      # from the cache, against a loop that encodes at every step
    python tests/bench_training.py memory     # what a step at the paper's size keeps for the backward pass

`speed` trains the small preset on the test recordings (--data FILE for others), with both kinds of step in turn.  The
loop that encodes does as Tango's: for each step it reads the audio and runs the VAE's encoder and the text encoder.
"""
import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
import weights
from data import Clip
from srcgaudio import PRESETS, SRCgAudio, autocast, pick_device
from unet import UNet
from vae import VAE, sample_posterior

BLOCKS, STEPS, WARM_UP = 3, 8, 4                          # the warm-up also uses up what workers read ahead


class Audio(Dataset):
    """What the loop that encodes reads of each item: mel (T, 64), rate, caption."""

    def __init__(self, items: list[tuple[Clip, int]], seconds: float):
        self.items, self.mels = items, train.WholeClips(items, seconds)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int, str]:
        clip, rate = self.items[key[1]]
        return self.mels[key[1]], rate, clip.caption


def measure_speed(data: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = PRESETS["small"]
        SRCgAudio.save_config(config, Path(folder, "run"))
        weights.save(VAE(**config.vae).state_dict(), Path(folder, "run", "vae.pt"))
        sys.argv = ["train.py", "ldm", "--data", str(data), "--checkpoint", f"{folder}/run"]
        run = train.prepare(train.parse(), pick_device())
        settings = run.settings["ldm"]
        job = train.TrainLDM(run, settings)
        vae = SRCgAudio.load_vae(run.folder).to(run.device)
        plan = train.Plan(len(job.data.items), settings, run)

        @torch.no_grad()
        def encode(batch: tuple) -> tuple[torch.Tensor, ...]:
            mel, rate, captions = batch
            with autocast(run.device, run.precision):
                mean, logvar = vae.encode(mel.to(run.device))
                text, text_mask = job.text_encoder.to(run.device).encode(list(captions))
            z_0 = vae.scale_factor * sample_posterior(mean, logvar, torch.randn_like(mean))
            return z_0, torch.randn_like(z_0), torch.randint(0, 1000, (len(mel),)), rate, text, text_mask

        sides = {"from the cache": (job.data, job.data.collate, lambda batch: batch),
                 "encoding at every step": (Audio(job.data.items, config.seconds), None, encode)}
        times = {name: [] for name in sides}
        for _ in range(BLOCKS):
            for name, (data, collate, make_part) in sides.items():
                batches = run.batches(data, batch_sampler=plan.parts(0), collate_fn=collate)
                began = 0.0
                for step in range(WARM_UP + STEPS):
                    if step == WARM_UP:
                        began = time.perf_counter()
                    float(job.step([make_part(next(batches))])["loss"])
                times[name].append((time.perf_counter() - began) / STEPS)
                batches.close()
        rates = {name: settings.batch / statistics.median(seconds) for name, seconds in times.items()}
        for name, rate in rates.items():
            print(f"{name}: {rate:.2f} samples a second")
        print(f"ratio: {rates['from the cache'] / rates['encoding at every step']:.2f} ({run.device}, {run.precision}, "
              f"{torch.get_num_threads()} threads, {run.workers} workers, median of {BLOCKS} blocks of "
              f"{STEPS} steps of {settings.batch})")


def measure_memory() -> None:
    """Bytes that autograd keeps, in bfloat16, by hooks on every tensor that it saves; two batches give the slope."""
    unet = UNet().to(memory_format=torch.channels_last)
    for module in unet.modules():                        # autocast takes these in float32 on a GPU, not on a CPU
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    own = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}

    def kept(batch: int) -> float:
        storages = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            if x.untyped_storage().data_ptr() not in own:
                storages[x.untyped_storage().data_ptr()] = (x.untyped_storage().nbytes(), x)  # held: no address twice
            return x

        inputs = (torch.randn(batch, 8, 256, 16), torch.zeros(batch, dtype=torch.long), torch.randn(batch, 66, 1024),
                  torch.ones(batch, 66, dtype=torch.bool))
        with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            unet(*inputs)
        return sum(size for size, _ in storages.values()) / 2 ** 30

    weights_gib = sum(parameter.numel() for parameter in unet.parameters()) * 4 / 2 ** 30
    print(f"weights, gradients, EMA and AdamW's two moments: 5 x {weights_gib:.2f} = {5 * weights_gib:.2f} GiB")
    for title in ("", ", with --activation-checkpointing"):
        one, two = kept(1), kept(2)
        print(f"kept for the backward pass{title}: {two - one:.3f} GiB an item and {2 * one - two:.2f} GiB; "
              f"in all at batch 8: {5 * weights_gib + one + 7 * (two - one):.1f} GiB", flush=True)
        train.checkpoint_activations(unet)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["speed", "memory"])
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data" / "captions.csv")
    arguments = parser.parse_args()
    measure_speed(arguments.data) if arguments.what == "speed" else measure_memory()
