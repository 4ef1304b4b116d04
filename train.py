"""Training: captioned audio in, a checkpoint folder with a VAE, vocoders and the latent diffusion model out.

    python train.py vae vocoder ldm --data clips.csv --preset tiny --checkpoint runs/tiny

Sections II-B, II-C and III, Fig. 1 ("training").  The three jobs can run in one call or one by one into the same
folder; the LDM needs the VAE.  Each keeps the weights with the best validation loss, in moving average (EMA), and
writes its losses to JOB.csv.  All randomness comes from --seed: crops from (seed, epoch, item), noise from
(seed, step).
"""
import argparse
import copy
import csv
import io
import math
import operator
import shutil
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import weights
from data import Clip, find_clips
from srcgaudio import (FRAMES_PER_SECOND, PRESETS, RATES, Config, NoiseSchedule, SRCgAudio, TextEncoder, autocast,
                       check_rate, diffusion_loss, exit_cleanly, mel_spectrogram, pick_device, pick_precision)
from unet import UNet
from vae import VAE, sample_posterior, vae_loss
from vocoder import (STRIDES, Conv1d, ConvTranspose1d, Generator, discriminator_loss, discriminators, generator_loss,
                     initialize, mel_loss)

# ---------------------------------------------------------------------------------------------------------------------
# How each preset is trained


@dataclass(frozen=True)
class Settings:
    epochs: int                                          # passes over every clip at each of its rates
    batch: int
    lr: float                                            # falls linearly to zero
    frames: int = 0                                      # length of the random crops; the LDM takes whole clips
    long_epochs: int = 0                                 # the last ones: an eighth of the crops, eight times as long
    discriminators: tuple[int, int] = (0, 0)             # widths of the period and the scale discriminators
    validate_every: int = 1                              # epochs


SETTINGS = {
    "tiny": {
        "vae": Settings(epochs=20, batch=8, lr=2e-3, frames=24, long_epochs=2, validate_every=19),
        "vocoder": Settings(epochs=20, batch=8, lr=3e-3, frames=16, discriminators=(2, 8), validate_every=10),
        "ldm": Settings(epochs=40, batch=8, lr=1e-3, validate_every=10),
    },
    "small": {                                           # what fits an hour on two CPU cores; more epochs sound better
        "vae": Settings(epochs=8, batch=8, lr=2e-3, frames=48, long_epochs=1, validate_every=8),
        "vocoder": Settings(epochs=8, batch=8, lr=2e-3, frames=16, discriminators=(2, 8), validate_every=4),
        "ldm": Settings(epochs=4, batch=8, lr=1e-3, validate_every=4),
    },
    # 40 epochs: III-B.  The LDM's learning rate: Tango's published training command, as linear decay is.  Vocoder:
    # HiFi-GAN V1's batch and rate; its 8192 samples at 22 kHz are 0.37 s.  The rest is our choice.
    "paper": {
        "vae": Settings(epochs=40, batch=16, lr=5e-5, frames=512),
        "vocoder": Settings(epochs=40, batch=16, lr=2e-4, frames=40, discriminators=(32, 128)),
        "ldm": Settings(epochs=40, batch=32, lr=3e-5),
    },
}
KL_WEIGHT = 1e-4                                         # of the KL against the L1, both means
NULL_CAPTIONS = 0.1                                      # share of captions emptied, for Eq. (4)
EMA_DECAY = 0.999
CLIP_NORM = 1.0
LOG_EVERY = 20                                           # steps


@dataclass(frozen=True)
class Run:
    """What all jobs of one call share."""

    folder: Path                                         # the checkpoint
    config: Config
    train: list[Clip]
    val: list[Clip]
    rates: list[int]
    any_rate: bool                                       # train rates above a clip's own too (gAudio-FT, Table II)
    start: bool                                          # start from the weights in the folder
    train_text_encoder: bool
    seed: int
    device: torch.device
    precision: torch.dtype
    workers: int

    def items(self, clips: list[Clip], rates: list[int] | None = None) -> list[tuple[Clip, int]]:
        """Every clip at each of its rates, among the run's or those given."""
        rates = rates or self.rates
        items = [(clip, rate) for clip in clips for rate in rates if self.any_rate or clip.reaches(rate)]
        for rate in rates:
            if not any(r == rate for _, r in items):
                raise ValueError(f"no clip reaches {rate} Hz (the highest file is at {max(c.rate for c in clips)} Hz); "
                                 f"leave that rate out, or allow upsampling with --any-rate")
        return items


class Ema:
    """A moving average of a network's weights, itself a network: what is validated and saved.

    `network` may carry weight norm that the average lacks: it follows the weights that take effect.
    """

    def __init__(self, network: nn.Module):
        self.network = copy.deepcopy(network).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        decay = min(EMA_DECAY, (1 + step) / (10 + step))           # short runs forget their start
        for name, average in self.network.named_parameters():
            average.lerp_(operator.attrgetter(name)(network), 1 - decay)


def ignore_interrupt(_worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)         # Ctrl-C is the main process's to handle


class Crops(Dataset):
    """Random crops of `frames` mel frames as waves (frames * hop,), each from (seed, epoch, item)."""

    def __init__(self, run: Run, items: list[tuple[Clip, int]], settings: Settings):
        self.run, self.items, self.settings = run, items, settings

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, i = key
        clip, rate = self.items[i]
        seconds = self.settings.frames * (8 if self.long(epoch) else 1) / FRAMES_PER_SECOND
        latest = max(0.0, clip.samples / clip.rate - seconds)
        start = np.random.default_rng((self.run.seed, epoch, i)).uniform(0, latest)
        return clip.read(rate, start, seconds), rate

    def long(self, epoch: int) -> bool:
        """Norms and attention of the VAE see the whole crop.  Short crops make many cheap steps, but with them alone
        it fails on whole clips."""
        return epoch >= self.settings.epochs - self.settings.long_epochs

    def batches(self, epoch: int, collate) -> DataLoader:
        """All items once, shuffled; `collate` makes a batch from a list of (wave, rate)."""
        batch = max(1, self.settings.batch // 8) if self.long(epoch) else self.settings.batch
        keys = [[(epoch, i) for i in chosen] for chosen in shuffled(len(self.items), batch, self.run.seed, epoch)]
        return DataLoader(self, batch_sampler=keys, num_workers=self.run.workers, collate_fn=collate,
                          worker_init_fn=ignore_interrupt)


def shuffled(items: int, batch: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The indices 0 to items - 1 in random order, cut into batches."""
    order = np.random.default_rng((seed, epoch)).permutation(items)
    return [order[i:i + batch] for i in range(0, items, batch)]


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One step of gradient descent, the gradient clipped."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], CLIP_NORM)
    optimizer.step()


def fit(job, run: Run) -> None:
    """The loop of every job: steps, validation, the best weights kept, a progress bar, a log of losses.

    job: name, settings, optimizers; batches(epoch) of known length; step(batch, noise) and validate(), each -> losses
    by name with "loss" among them; save(), which writes the weights that validate judged.
    """
    interrupted = False

    def interrupt(*_) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)              # workers that shut down can swallow the exception
    settings = job.settings
    total = sum(len(job.batches(epoch)) for epoch in range(settings.epochs))
    step, best = 0, math.inf
    with (open(run.folder / f"{job.name}.csv", "w", newline="", buffering=1) as file,
          tqdm(total=total, desc=job.name) as bar):
        log = csv.writer(file)
        log.writerow(["step", "name", "value"])
        for epoch in range(settings.epochs):
            for batch in job.batches(epoch):
                for optimizer in job.optimizers:
                    optimizer.param_groups[0]["lr"] = settings.lr * (1 - step / total)
                losses = job.step(batch, torch.Generator().manual_seed(run.seed * 2 ** 32 + step))
                loss = float(losses["loss"])
                if not math.isfinite(loss):
                    raise ValueError(f"the loss of {job.name} is {loss} at step {step}; what was saved before is kept; "
                                     f"a lower --lr may help")
                if interrupted:
                    raise KeyboardInterrupt
                job.ema.update(job.network, step)
                step += 1
                if step % LOG_EVERY == 0:
                    log.writerows([step, f"train_{name}", f"{float(value):.6f}"] for name, value in losses.items())
                bar.set_postfix(loss=f"{loss:.3f}", best=f"{best:.4f}", refresh=False)
                bar.update()
            if (epoch + 1) % settings.validate_every == 0 or epoch + 1 == settings.epochs:
                with torch.inference_mode():
                    losses = {name: float(value) for name, value in job.validate().items()}
                log.writerows([step, f"val_{name}", f"{value:.6f}"] for name, value in losses.items())
                bar.write(f"{job.name} step {step}, validation: "
                          + ", ".join(f"{name} {value:.4f}" for name, value in losses.items()))
                if losses["loss"] < best:
                    best = losses["loss"]
                    bar.set_postfix(loss=f"{loss:.3f}", best=f"{best:.4f}")
                    job.save()


def mean_by_rate(losses: dict[int, list[float]]) -> dict[str, float]:
    """The mean over the rates, as "loss", and each rate's own."""
    rates = {str(rate): sum(values) / len(values) for rate, values in losses.items()}
    return {"loss": sum(rates.values()) / len(rates)} | rates


# ---------------------------------------------------------------------------------------------------------------------
# The VAE: L1 + KL on mels of all rates


class TrainVAE:
    name = "vae"

    def __init__(self, run: Run, settings: Settings):
        self.run, self.settings = run, settings
        self.network = SRCgAudio.load_vae(run.folder) if run.start else VAE(**run.config.vae)
        self.network.to(run.device, memory_format=torch.channels_last).train()
        self.ema = Ema(self.network)
        self.optimizers = [torch.optim.AdamW(self.network.parameters(), settings.lr)]
        self.crops = Crops(run, run.items(run.train), settings)
        self.val_items = run.items(run.val)

    @staticmethod
    def collate(items: list[tuple[Tensor, int]]) -> Tensor:
        return torch.cat([mel_spectrogram(wave[None], rate) for wave, rate in items])        # (B, frames, 64)

    def batches(self, epoch: int) -> DataLoader:
        return self.crops.batches(epoch, self.collate)

    def step(self, mel: Tensor, noise: torch.Generator) -> dict[str, Tensor]:
        mel = mel.to(self.run.device)
        with autocast(self.run.device, self.run.precision):
            mean, logvar = self.network.encode(mel)                                          # (B, 8, T/4, 16) each
            eps = torch.randn(mean.shape, generator=noise).to(mean)
            decoded = self.network.decode(sample_posterior(mean, logvar, eps))               # (B, T, 64)
        loss, l1 = vae_loss(mel, decoded, mean, logvar, KL_WEIGHT)
        descend(loss, self.optimizers[0])
        return {"loss": loss.detach(), "l1": l1.detach()}

    def validate(self) -> dict[str, float]:
        """Log-mel L1 of encoding and decoding; also sets the scale factor."""
        losses, latents = {rate: [] for rate in self.run.rates}, []
        for clip, rate in tqdm(self.val_items, "validating", leave=False):
            mel = mel_spectrogram(clip.read(rate, 0, self.run.config.seconds)[None], rate).to(self.run.device)
            with autocast(self.run.device, self.run.precision):
                mean, logvar = self.ema.network.encode(mel)
                decoded = self.ema.network.decode(mean)
            latents.append(mean)
            losses[rate].append(mel_loss(mel, decoded).item())
        self.ema.network.scale_factor.fill_(1 / torch.cat(latents).std().item())
        return mean_by_rate(losses)

    def save(self) -> None:
        weights.save(self.ema.network.state_dict(), self.run.folder / "vae.pt")


# ---------------------------------------------------------------------------------------------------------------------
# A vocoder for one rate: HiFi-GAN


class TrainVocoder:
    def __init__(self, run: Run, settings: Settings, rate: int):
        self.run, self.settings, self.rate = run, settings, rate
        self.name = f"vocoder_{rate}"
        plain = Generator(strides=STRIDES[rate], **run.config.vocoder)
        initialize(plain)
        self.discriminators = discriminators(*settings.discriminators).to(run.device)
        if run.start:
            self.start_from_nearest(plain)
        self.ema = Ema(plain.to(run.device))             # plain weights: what is saved needs no weight norm
        self.network = plain.train()
        for module in list(plain.modules()):
            if isinstance(module, (Conv1d, ConvTranspose1d)):
                weight_norm(module)
        self.optimizers = [torch.optim.AdamW(network.parameters(), settings.lr, betas=(0.8, 0.99))
                           for network in (self.network, self.discriminators)]
        self.crops = Crops(run, run.items(run.train, [rate]), settings)
        self.val_items = run.items(run.val, [rate])

    def start_from_nearest(self, generator: Generator) -> None:
        """Start from this rate's vocoder in the checkpoint, or from the one of the nearest rate there."""
        there = [rate for rate in RATES if (self.run.folder / f"vocoder_{rate}.pt").is_file()]
        if not there:
            raise ValueError(f"{self.run.folder}: no vocoder to start from")
        nearest = min(there, key=lambda rate: abs(rate - self.rate))
        path = self.run.folder / f"vocoder_{nearest}.pt"
        weights.load(generator, weights.read(path), path)
        path = self.run.folder / f"discriminators_{nearest}.pt"
        if path.is_file():
            weights.load(self.discriminators, weights.read(path), path)

    @staticmethod
    def collate(items: list[tuple[Tensor, int]]) -> Tensor:
        return torch.stack([wave for wave, _ in items])                                      # (B, L)

    def batches(self, epoch: int) -> DataLoader:
        return self.crops.batches(epoch, self.collate)

    def judge(self, wave: Tensor) -> list[tuple[Tensor, list[Tensor]]]:
        return self.discriminators["mpd"](wave) + self.discriminators["msd"](wave)

    def step(self, wave: Tensor, noise: torch.Generator) -> dict[str, Tensor]:
        wave = wave.to(self.run.device)                                                      # (B, L)
        mel = mel_spectrogram(wave, self.rate)                                               # (B, L / hop, 64)
        with autocast(self.run.device, self.run.precision):
            generated = self.network(mel)                                                    # (B, L)
            loss_d = discriminator_loss(self.judge(wave), self.judge(generated.detach()))
        descend(loss_d, self.optimizers[1])

        mel_generated = mel_spectrogram(generated, self.rate)
        self.discriminators.requires_grad_(False)        # the generator's step needs no gradients of theirs
        with autocast(self.run.device, self.run.precision):
            loss = generator_loss(self.judge(wave), self.judge(generated), mel, mel_generated)
        descend(loss, self.optimizers[0])
        self.discriminators.requires_grad_(True)
        return {"loss": loss.detach(), "mel": mel_loss(mel, mel_generated).detach(), "discriminators": loss_d.detach()}

    def validate(self) -> dict[str, float]:
        """Log-mel L1 of copy-synthesis: real wave -> mel -> vocoder -> mel."""
        losses = []
        for clip, rate in tqdm(self.val_items, "validating", leave=False):
            mel = mel_spectrogram(clip.read(rate, 0, self.run.config.seconds)[None], rate).to(self.run.device)
            with autocast(self.run.device, self.run.precision):
                generated = self.ema.network(mel)
            losses.append(mel_loss(mel, mel_spectrogram(generated, rate)).item())
        return {"loss": sum(losses) / len(losses)}

    def save(self) -> None:
        """The generator, and the discriminators too, so that a training can go on from here."""
        weights.save(self.ema.network.state_dict(), self.run.folder / f"vocoder_{self.rate}.pt")
        weights.save(self.discriminators.state_dict(), self.run.folder / f"discriminators_{self.rate}.pt")


# ---------------------------------------------------------------------------------------------------------------------
# The latent diffusion model: Eq. (3) under the text and the rate


def train_tokenizer(captions: list[str], vocabulary: int) -> sentencepiece.SentencePieceProcessor:
    """A sentencepiece model with T5's special tokens: pad 0, </s> 1, unknown 2, no start token."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions), model_writer=model, vocab_size=vocabulary, hard_vocab_limit=False,
        character_coverage=1.0, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


class TrainLDM:
    name = "ldm"

    def __init__(self, run: Run, settings: Settings):
        self.run, self.settings = run, settings
        config, folder = run.config, run.folder
        if not (folder / "vae.pt").is_file():
            raise ValueError(f"{folder}: no vae.pt; the LDM lives in the latents of a VAE: train that first (job vae)")
        vae = SRCgAudio.load_vae(folder).to(run.device)
        if run.start or isinstance(config.text_encoder, str):
            self.text_encoder = SRCgAudio.load_text_encoder(folder)
        else:
            self.text_encoder = TextEncoder(**config.text_encoder)
            self.text_encoder.initialize(torch.Generator().manual_seed(run.seed))
            self.text_encoder.tokenizer = train_tokenizer(sorted({clip.caption for clip in run.train}),
                                                          config.text_encoder["vocabulary"])
        unet = SRCgAudio.load_unet(folder) if run.start else UNet(**config.unet)
        width = self.text_encoder.embedding.weight.shape[1]
        if width != unet.context_width:
            raise ValueError(f"the text encoder's width is {width}, the U-Net's context_width {unet.context_width}; "
                             f"make them equal in {folder / 'config.json'}")

        # What is trained: the U-Net, and the text encoder if it is trained along
        self.network = nn.ModuleDict({"unet": unet}).to(run.device, memory_format=torch.channels_last).train()
        self.text_encoder.to(run.device).requires_grad_(run.train_text_encoder)
        if run.train_text_encoder:
            self.network["text_encoder"] = self.text_encoder
        self.ema = Ema(self.network)
        self.optimizers = [torch.optim.AdamW(self.network.parameters(), settings.lr)]
        self.schedule = NoiseSchedule()

        self.train_items, self.val_items = run.items(run.train), run.items(run.val)
        self.train_latents = self.encode_clips(vae, self.train_items, "latents")
        self.val_latents = self.encode_clips(vae, self.val_items, "validation latents")
        self.scale_factor = vae.scale_factor
        captions = sorted({clip.caption for clip in run.train + run.val} | {""})
        self.psi = {} if run.train_text_encoder else self.encode_captions(captions)

    @torch.inference_mode()
    def encode_clips(self, vae: VAE, items: list[tuple[Clip, int]], title: str) -> Tensor:
        """Mean and logvar of each item, (items, 2, 8, T/4, 16) in half precision: the frozen VAE runs once."""
        latents = []
        for clip, rate in tqdm(items, title, leave=False):
            mel = mel_spectrogram(clip.read(rate, 0, self.run.config.seconds)[None], rate)    # (1, T, 64)
            with autocast(self.run.device, self.run.precision):
                mean, logvar = vae.encode(mel.to(self.run.device))
            latents.append(torch.stack([mean, logvar], dim=1).half().cpu())
        return torch.cat(latents)

    @torch.inference_mode()
    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        """psi of each caption, (N, d) without padding: the frozen text encoder runs once."""
        psi = {}
        for caption in tqdm(captions, "captions", leave=False):
            with autocast(self.run.device, self.run.precision):
                psi[caption] = self.text_encoder.encode([caption])[0][0]
        return psi

    def text(self, captions: list[str], text_encoder: TextEncoder) -> tuple[Tensor, Tensor]:
        """psi (B, N, d) and mask (B, N) of a batch."""
        if self.run.train_text_encoder:
            return text_encoder.encode(captions)
        rows = [self.psi[caption] for caption in captions]
        mask = [torch.ones(len(row), dtype=torch.bool, device=row.device) for row in rows]
        return pad_sequence(rows, batch_first=True), pad_sequence(mask, batch_first=True)

    def batches(self, epoch: int) -> list[np.ndarray]:
        return shuffled(len(self.train_items), self.settings.batch, self.run.seed, epoch)

    def losses(self, network: nn.ModuleDict, latents: Tensor, items: list[tuple[Clip, int]], captions: list[str],
               t: Tensor, noise: torch.Generator) -> Tensor:
        """Eq. (3) for each item of a batch, (B,).  latents: (B, 2, 8, T/4, 16) mean and logvar.  t: (B,)."""
        device = self.run.device
        mean, logvar = latents.float().unbind(dim=1)                                         # (B, 8, T/4, 16)
        z_0 = self.scale_factor.cpu() * sample_posterior(mean, logvar, torch.randn(mean.shape, generator=noise))
        eps = torch.randn(z_0.shape, generator=noise)
        rate = torch.tensor([rate for _, rate in items])
        with autocast(device, self.run.precision):
            text, text_mask = self.text(captions, network["text_encoder"] if self.run.train_text_encoder else None)
            return diffusion_loss(network["unet"], self.schedule, z_0.to(device), rate.to(device), text, text_mask,
                                  t.to(device), eps.to(device))

    def step(self, batch: np.ndarray, noise: torch.Generator) -> dict[str, Tensor]:
        items = [self.train_items[i] for i in batch]
        t = torch.randint(0, self.schedule.T, (len(batch),), generator=noise)                # t ~ Uniform(1, T)
        empty = torch.rand(len(batch), generator=noise) < NULL_CAPTIONS
        captions = ["" if null else clip.caption for (clip, _), null in zip(items, empty)]
        loss = self.losses(self.network, self.train_latents[batch], items, captions, t, noise).mean()
        descend(loss, self.optimizers[0])
        return {"loss": loss.detach()}

    def validate(self) -> dict[str, float]:
        """Eq. (3) with fixed noise, and times spread evenly over the items of each rate."""
        losses = {rate: [] for rate in self.run.rates}
        for rate in self.run.rates:
            indices = [i for i, item in enumerate(self.val_items) if item[1] == rate]
            t = (torch.arange(len(indices)) + 0.5) * self.schedule.T / len(indices)
            t = t[torch.randperm(len(t), generator=torch.Generator().manual_seed(0))]
            for k in tqdm(range(0, len(indices), self.settings.batch), "validating", leave=False):
                chosen = indices[k:k + self.settings.batch]
                items = [self.val_items[i] for i in chosen]
                captions = [clip.caption for clip, _ in items]
                noise = torch.Generator().manual_seed(k)
                losses[rate] += self.losses(self.ema.network, self.val_latents[chosen], items, captions,
                                            t[k:k + len(chosen)].long(), noise).tolist()
        return mean_by_rate(losses)

    def save(self) -> None:
        folder = self.run.folder
        encoder = self.ema.network["text_encoder"] if self.run.train_text_encoder else self.text_encoder
        if isinstance(self.run.config.text_encoder, dict):             # a FLAN-T5 stays in its own folder
            encoder.save(folder)
        weights.save(self.ema.network["unet"].state_dict(), folder / "unet.pt")


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train SRC-gAudio's VAE, vocoders and latent diffusion model.")
    add = parser.add_argument
    add("jobs", nargs="+", choices=["vae", "vocoder", "ldm"], help="what to train, in this order")
    add("--data", required=True, type=Path, help="a CSV with the columns path and caption, or (without ldm) a folder")
    add("--val-data", type=Path, help="the same for validation; without it every tenth clip is held out")
    add("--checkpoint", required=True, type=Path, metavar="FOLDER", help="where the weights go")
    add("--preset", choices=list(PRESETS), help="sizes and settings (default: those of the checkpoint, else small)")
    add("--rates", type=int, nargs="+", default=list(RATES), metavar="HZ", help="sampling rates (default: all four)")
    add("--any-rate", action="store_true", help="train clips at rates above their own too, upsampled")
    add("--start-from", type=Path, metavar="FOLDER",
        help="start from the weights of this checkpoint, copied; a vocoder may start from one of another rate")
    add("--flan-t5", type=Path, metavar="FOLDER", help="a FLAN-T5 for the LDM, instead of a small text encoder")
    add("--train-text-encoder", action="store_true", help="train the text encoder along with the U-Net")
    add("--epochs", type=int, help="instead of the preset's")
    add("--batch", type=int, help="instead of the preset's")
    add("--lr", type=float, help="instead of the preset's")
    add("--overwrite", action="store_true", help="replace weights that are there")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("--precision", default="auto", choices=["auto", "bf16", "fp32"])
    add("--workers", type=int, default=2, help="processes that read audio (default: 2)")
    return parser.parse_args()


def prepare(args: argparse.Namespace) -> Run:
    """Check everything that can be checked before the first step."""
    for rate in args.rates:
        check_rate(rate)
    for name in ("epochs", "batch", "lr"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} must be above 0, got {value}")
    if not 0 <= args.seed < 2 ** 31 or args.workers < 0:
        raise ValueError("--seed must be from 0 to 2^31 - 1 and --workers at least 0")
    folder = args.checkpoint
    outputs = [f"vocoder_{rate}.pt" for rate in args.rates] if "vocoder" in args.jobs else []
    outputs += [name for job, name in (("vae", "vae.pt"), ("ldm", "unet.pt")) if job in args.jobs]
    for name in outputs:
        if (folder / name).exists() and not args.overwrite:
            raise ValueError(f"{folder / name} exists; name another --checkpoint, or say --overwrite")

    if args.start_from:
        SRCgAudio.load_config(args.start_from)
        folder.mkdir(parents=True, exist_ok=True)
        for path in args.start_from.iterdir():
            if path.suffix in (".json", ".model", ".pt") and not (folder / path.name).exists():
                shutil.copy(path, folder)
    if (folder / "config.json").exists():
        config = SRCgAudio.load_config(folder)
        if args.preset not in (None, config.preset):
            raise ValueError(f"{folder} holds the preset {config.preset!r}, not {args.preset!r}; "
                             f"name another --checkpoint")
    else:
        config = PRESETS[args.preset or "small"]
    if args.flan_t5:
        encoder = TextEncoder.from_pretrained(args.flan_t5)            # fails here rather than after the VAE
        config = replace(config, text_encoder=str(args.flan_t5.resolve()),
                         unet=config.unet | {"context_width": encoder.embedding.weight.shape[1]})

    device = pick_device(args.device)
    precision = pick_precision(device, args.precision)
    captions = "ldm" in args.jobs
    train = find_clips(args.data, captions)
    if args.val_data:
        val = find_clips(args.val_data, captions)
    else:
        held_out = set(np.random.default_rng(args.seed).permutation(len(train))[:max(1, len(train) // 10)].tolist())
        val = [clip for i, clip in enumerate(train) if i in held_out]
        train = [clip for i, clip in enumerate(train) if i not in held_out]
        if not train:
            raise ValueError(f"{args.data}: one clip is too few; validation holds out another")
    print(f"{len(train)} clips to train on, {sum(c.samples / c.rate for c in train) / 3600:.2f} h; "
          f"{len(val)} to validate on; {device}, {precision}", flush=True)
    run = Run(folder, config, train, val, sorted(set(args.rates)), args.any_rate, bool(args.start_from),
              args.train_text_encoder, args.seed, device, precision, args.workers)
    run.items(train), run.items(val)
    SRCgAudio.save_config(config, folder)
    return run


def main() -> None:
    args = parse()
    run = prepare(args)
    torch.manual_seed(args.seed)                         # the networks' first weights
    for job in args.jobs:
        changes = {name: getattr(args, name) for name in ("epochs", "batch", "lr") if getattr(args, name) is not None}
        settings = replace(SETTINGS[run.config.preset][job], **changes)
        if job == "vae":
            fit(TrainVAE(run, settings), run)
        elif job == "vocoder":
            for rate in run.rates:
                fit(TrainVocoder(run, settings, rate), run)
        else:
            fit(TrainLDM(run, settings), run)
    print(f"the checkpoint is {run.folder}")


if __name__ == "__main__":
    exit_cleanly(main)
