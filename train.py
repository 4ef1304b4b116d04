"""Training: captioned audio in, a checkpoint folder with a VAE, vocoders and the latent diffusion model out.

    python train.py vae vocoder ldm --data clips.csv --preset tiny --checkpoint runs/tiny
    torchrun --nproc_per_node=8 train.py ldm --data clips.csv --checkpoint runs/paper

Sections II-B, II-C and III, Fig. 1.  The three jobs can run in one call or one by one into the same folder; the LDM
needs the VAE.  Each validates a moving average (EMA) of its weights, keeps the best, and writes its losses to vae.csv,
vocoder_16000.csv and so on.

The paper takes AudioLDM's VAE as it is, trains HiFi-GANs, and the LDM on Eq. (3).  Not in the paper, but added here so
that small networks learn from a few hundred recordings: Muon, the whitened starts (`whiten_patches`, `whiten`), detail
and flicker in the VAE's loss, its latents' deviation of 0.3 and a decoder trained on DDIM's noise, vocoders without
discriminators, the balanced loss and rolled clips.  The preset paper uses none of them but those of the VAE, and these
only if it trains one.

The paper's part is the section on the latent diffusion model: `Latents`, `Objective`, `TrainLDM`.  Before it come the
loop of every job, the VAE and the vocoders; after it, the command line.

Every random draw is a function of --seed, the epoch and the item.  So a run that was stopped, by kill -9 even, goes on
from its last state as if it had never stopped, and how a batch is split over processes changes nothing but rounding.
"""
import argparse
import copy
import csv
import hashlib
import importlib.util
import io
import json
import math
import operator
import os
import shutil
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import weights
from data import Cache, Clip, digest, find_clips, read_array, read_rows
from srcgaudio import (FRAMES_PER_SECOND, PRESETS, RATES, Config, NoiseSchedule, SRCgAudio, TextEncoder, autocast,
                       check_rate, check_widths, diffusion_loss, exit_cleanly, load_part, mel_spectrogram, pick_device,
                       pick_precision)
from unet import ResBlock, Transformer, UNet
from vae import VAE, sample_posterior, vae_loss
from vocoder import (STRIDES, Conv1d, ConvTranspose1d, Discriminators, Generator, convergence_loss, discriminator_loss,
                     generator_loss, mel_loss, stft_loss)

# ---------------------------------------------------------------------------------------------------------------------
# How each preset is trained


@dataclass(frozen=True)
class Settings:
    epochs: int                                          # passes over every clip (LDM: caption) at its rates
    batch: int                                           # items of a step, over all processes
    lr: float                                            # falls linearly to zero
    frames: int = 0                                      # length of the random crops; the LDM takes whole clips
    discriminators: tuple[int, int] | None = None        # widths of the period and the scale ones; None: the vocoder
                                                         # learns from spectra alone
    muon: bool = False                                   # instead of AdamW
    balanced: bool = False                               # every t counts alike in the LDM's loss (`blind_loss`)
    rolled: bool = False                                 # the LDM's clips are rolled in time, at random
    validate_every: int = 1                              # epochs


SETTINGS = {
    "tiny": {
        "vae": Settings(epochs=20, batch=8, lr=2e-3, frames=24, muon=True, validate_every=10),
        "vocoder": Settings(epochs=20, batch=8, lr=3e-3, frames=16, discriminators=(2, 8), validate_every=10),
        "ldm": Settings(epochs=40, batch=8, lr=1e-3, validate_every=10),
    },
    "small": {                                           # the model in the box, on 238 recordings
        "vae": Settings(epochs=9, batch=8, lr=2e-3, frames=48, muon=True, validate_every=8),
        "vocoder": Settings(epochs=40, batch=2, lr=1e-3, frames=32, muon=True, validate_every=10),
        "ldm": Settings(epochs=18, batch=16, lr=1e-3, muon=True, balanced=True, rolled=True),
    },
    # LDM: epochs of III-B, learning rate and linear decay of Tango's published training command.  Vocoder: batch and
    # learning rate of HiFi-GAN V1, whose crops of 8192 samples at 22 kHz are 0.37 s long.  The rest is our choice.
    "paper": {
        "vae": Settings(epochs=40, batch=16, lr=5e-5, frames=512),
        "vocoder": Settings(epochs=40, batch=16, lr=2e-4, frames=40, discriminators=(32, 128)),
        "ldm": Settings(epochs=40, batch=32, lr=3e-5),
    },
}
KL_WEIGHT = 3e-4                                         # of the KL against the L1, both means
# Standard deviation of z_0.  Since alpha_bar_T is 0.005 and not 0, z_T still shows in training how loud a clip is; in
# sampling it is noise and shows nothing, so at a deviation of 1 all clips would come out much alike in level.  At 0.3
# it shows less: the signal-to-noise ratio is 11 times lower at every t.
LATENT_STD = 0.3
NULL_CAPTIONS = 0.1                                      # share of captions emptied, for Eq. (4)
EMA_DECAY = 0.999
CLIP_NORM = 1.0
LOG_EVERY = 20                                           # steps
LOG_HEADER = "step,name,value\n"

# ---------------------------------------------------------------------------------------------------------------------
# What all jobs of one call share


@dataclass(frozen=True)
class Run:
    folder: Path                                         # the checkpoint
    config: Config
    settings: dict[str, Settings]                        # of each job
    train: list[Clip]
    val: list[Clip]
    rates: list[int]
    any_rate: bool                                       # train rates above a clip's own too (gAudio-FT, Table II)
    start: Path | None                                   # the checkpoint whose weights are the start
    decoder_only: bool                                   # of the VAE
    train_text_encoder: bool
    tokenizer: sentencepiece.SentencePieceProcessor | None             # of a new text encoder
    seed: int
    device: torch.device
    precision: torch.dtype
    workers: int
    cache: Cache
    accumulate: int                                      # parts that a process takes its share of a batch in
    activation_checkpointing: bool
    save_minutes: float
    plot: bool

    def items(self, clips: list[Clip], rates: list[int] | None = None,
              per_recording: bool = False) -> list[tuple[Clip, int]]:
        """Every clip at each of its rates, among the run's or those given.

        per_recording: once, however many captions it has.
        """
        rates = rates or self.rates
        purpose = "validate" if clips is self.val else "train"
        if per_recording:
            clips = {clip.recording: clip for clip in clips}.values()
        items = [(clip, rate) for clip in clips for rate in rates if self.any_rate or clip.reaches(rate)]
        for rate in rates:
            if not any(of_item == rate for _, of_item in items):
                raise ValueError(f"no clip to {purpose} on reaches {rate} Hz (the highest file is at "
                                 f"{max(c.rate for c in clips)} Hz); leave that rate out, allow upsampling with "
                                 f"--any-rate, or name other clips (--data, --val-data)")
        return items

    def identity(self, name: str) -> dict[str, str]:
        """What must be the same for a run, named as in `fit`, to go on as if it had never stopped."""
        job = job_of(name)
        sizes = {"vae": self.config.vae, "vocoder": self.config.vocoder,
                 "ldm": [self.config.unet, self.config.text_encoder]}[job]
        # On another machine, or from another folder, the recordings have other paths.  The LDM alone reads captions.
        data = [[(clip.recording, clip.caption if job == "ldm" else "") for clip in clips]
                for clips in (self.train, self.val)]
        settings = self.settings[job]
        same = {"the data": digest(data).hex(), "--any-rate": str(self.any_rate),
                "--epochs": str(settings.epochs), "--batch": str(settings.batch), "--lr": str(settings.lr),
                "the preset's settings": str(replace(settings, epochs=0, batch=0, lr=0)),
                "the start": self.start.resolve().name if self.start else "none",
                "the rates": name if job == "vocoder" else str(self.rates),
                "the sizes": json.dumps([sizes, self.config.seconds]), "the seed": str(self.seed),
                "the precision": str(self.precision)}
        if job == "vae":
            same["--decoder-only"] = str(self.decoder_only)
        if job == "ldm":
            same["--train-text-encoder"] = str(self.train_text_encoder)
        return same

    def network(self, cls: type[nn.Module], arguments: dict, name: str) -> nn.Module:
        """A new network, or one with the weights of the file `name`, if the run is to start from a folder with it."""
        path = find_file(name, self.start)
        if not path:
            return cls(**arguments)
        say(f"starting from {path}")
        return load_part(cls, arguments, path)

    def mels(self, items: list[tuple[Clip, int]]) -> Iterator[Tensor]:
        """The log-mel (1, T, 64) of each item, whole."""
        return self.batches(WholeClips(items, self.config.seconds), batch_size=1)

    def batches(self, data: Dataset, **arguments) -> Iterator:
        """What a loader of `data` gives.  Its workers end with it: else a command that fails would wait for them."""
        loader = iter(DataLoader(data, num_workers=self.workers, worker_init_fn=ignore_signals, **arguments))
        try:
            yield from loader
        finally:
            if self.workers:
                loader._shutdown_workers()


def find_file(name: str, *folders: Path | None) -> Path | None:
    """The file of this name in the first of these folders that has it."""
    return next((folder / name for folder in folders if folder and (folder / name).is_file()), None)


def ignore_signals(_worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):       # the main process handles these
        signal.signal(number, signal.SIG_IGN)


# ---------------------------------------------------------------------------------------------------------------------
# One process or several, which torchrun starts; each takes its share of every batch


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if processes() > 1:
        dist.barrier()


@contextmanager
def main_process_first() -> Iterator[None]:
    """Rank 0 runs this first; the others find its files."""
    if rank() > 0:
        barrier()
    yield
    if rank() == 0:
        barrier()


def distribute(network: nn.Module) -> nn.Module:
    """The same network; its gradients come out of backward() as means over all processes."""
    return DistributedDataParallel(network, gradient_as_bucket_view=True) if processes() > 1 else network


def mean_over_processes(values: dict[str, Tensor]) -> dict[str, float]:
    together = torch.stack([value.float() for value in values.values()])
    if processes() > 1:
        dist.all_reduce(together)
    return dict(zip(values, (together / processes()).tolist()))


def say(line: str) -> None:
    if rank() == 0:
        tqdm.write(line)


# ---------------------------------------------------------------------------------------------------------------------
# The loop of every job


class Plan:
    """Which items each step takes.  An epoch is all items once, in a new order; the row of epochs is cut into full
    batches."""

    def __init__(self, items: int, settings: Settings, run: Run):
        self.items, self.settings, self.run = items, settings, run
        self.steps = max(1, items * settings.epochs // settings.batch)

    def batch(self, step: int) -> list[tuple[int, int]]:
        """The (epoch, item) of each item."""
        first = step * self.settings.batch
        return [(i // self.items, int(shuffled(self.items, self.run.seed, i // self.items)[i % self.items]))
                for i in range(first, first + self.settings.batch)]

    def parts(self, first_step: int) -> Iterator[list[tuple[int, int]]]:
        """This process's share of the batches from `first_step` on, each in `accumulate` parts."""
        for step in range(first_step, self.steps):
            batch = self.batch(step)
            size = len(batch) // (processes() * self.run.accumulate)
            for part in range(self.run.accumulate):
                first = (part * processes() + rank()) * size
                yield batch[first:first + size]

    def validates(self, step: int) -> bool:
        """Whether validation is due after so many steps."""
        every = self.items * self.settings.validate_every
        before, after = (s * self.settings.batch // every for s in (step - 1, step))
        return step == self.steps or after > before


@lru_cache(maxsize=2)
def shuffled(items: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(items)


def sample_items(items: int, seed: int) -> list[int]:
    """Up to 256 of so many items, at random: enough to see what all are like."""
    return sorted(shuffled(items, seed, 0)[:256].tolist())


class Ema:
    """A moving average of a network's weights, itself a network: what is validated and saved.

    A network with weight norm is averaged without it: by the weights that take effect.
    """

    def __init__(self, network: nn.Module):
        self.network = copy.deepcopy(network).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        decay = min(EMA_DECAY, (1 + step) / (10 + step))           # short runs forget their start
        averages = dict(self.network.named_parameters())
        new = [operator.attrgetter(name)(network) for name in averages]
        torch._foreach_lerp_(list(averages.values()), new, 1 - decay)            # all in one: fewer kernels on a GPU


class Muon(torch.optim.Optimizer):
    """Each weight's momentum, as a matrix (first dimension by all others), is made orthogonal, so that a step moves all
    directions alike (Jordan 2024).  A vector is a matrix of one column: its momentum is scaled to one length; Jordan
    leaves those to Adam.

    Adam learns the directions of most variance first, in mels the loudness, and a rooster's harmonics late.
    torch.optim.Muon takes only matrices, no convolutions, one at a time, in bfloat16: for a small vocoder on a CPU
    that takes as long as the rest of the step.
    """

    def __init__(self, parameters, lr: float):
        super().__init__(parameters, {"lr": lr})
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["average"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self) -> None:
        lr, parameters = self.param_groups[0]["lr"], self.param_groups[0]["params"]
        gradients = [parameter.grad for parameter in parameters]
        averages = [self.state[parameter]["average"] for parameter in parameters]
        torch._foreach_lerp_(averages, gradients, 0.1)
        momenta = torch._foreach_lerp(gradients, averages, 0.9)        # Nesterov's
        by_shape = defaultdict(list)
        for parameter, momentum in zip(parameters, momenta):
            by_shape[parameter.shape].append((parameter, momentum.reshape(len(momentum), -1)))
        for shape, pairs in by_shape.items():
            alike, of_shape = zip(*pairs)
            matrices = orthogonal(torch.stack(of_shape))               # (B, m, n)
            size = 0.2 * max(matrices.shape[1:]) ** 0.5                # entries of some 0.2, as AdamW's (Liu 2025)
            torch._foreach_add_(alike, [matrix.view(shape) for matrix in matrices], alpha=-lr * size)


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices (B, m, n) with their singular values brought to 0.7 to 1.2, tiny ones to less, by Newton and Schulz's
    iteration with Jordan's coefficients."""
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonal(matrices.mT).mT
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        # x <- 3.4445 x + (2.0315 A A - 4.7750 A) x, where A = x x^T
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


def make_optimizer(network: nn.Module, settings: Settings, **adam) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if settings.muon:
        return Muon(parameters, settings.lr)
    return torch.optim.AdamW(parameters, settings.lr, fused=True, **adam)


def descend(network: nn.Module, optimizer: torch.optim.Optimizer, parts: list, losses_of) -> dict[str, Tensor]:
    """One step of gradient descent on the mean of losses_of(part)["loss"], the gradient clipped.

    network: what `distribute` returned.  Returns the means over the parts, and the gradient's norm.
    """
    optimizer.zero_grad(set_to_none=True)
    total = defaultdict(float)
    for i, part in enumerate(parts):
        later = processes() > 1 and i + 1 < len(parts)   # processes exchange gradients with the last part
        with network.no_sync() if later else nullcontext():
            losses = losses_of(part)
            (losses["loss"] / len(parts)).backward()
        for name, value in losses.items():
            total[name] += value.detach() / len(parts)
    norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], CLIP_NORM)
    optimizer.step()
    return dict(total) | {"gradient_norm": norm}


@contextmanager
def stop_when_asked() -> Iterator[Tensor]:
    """Ctrl-C and SIGTERM set the tensor yielded here: the loop ends after its step.  A second Ctrl-C ends it at once.

    A second SIGTERM is ignored: a cluster's scheduler may send one to each process and to torchrun, which passes it on.
    """
    asked = torch.zeros(())

    def ask(number: int, _frame) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.fill_(1)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def read_state(path: Path, identity: dict[str, str]) -> dict | None:
    """The state that a run of this identity left, if there is one.  Raises ValueError if it was another run's.

    An empty file is there between --overwrite and the first step of the job.
    """
    if not path.is_file() or path.stat().st_size == 0:
        return None
    try:
        state = weights.read_pytorch(path)
        known = state["identity"]
        different = [name for name, value in identity.items() if known.get(name) != value]
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:
        raise ValueError(f"{path}: damaged ({weights.first_line(error)}); begin anew with --overwrite") from None
    if different:
        raise ValueError(f"{path} is of a run with other values of: {', '.join(different)}; repeat its command to go "
                         f"on, name another --checkpoint, or begin anew with --overwrite")
    return state


def job_of(name: str) -> str:
    """"vocoder_16000" is a training of the job "vocoder"."""
    return name.split("_")[0]


def fit(name: str, make_job, run: Run) -> None:
    """The loop of every job: steps, validation, the best weights kept, a state to go on from, a log of losses.

    make_job(run, settings) -> a job, with
        data               what its batches are made of; data.items, data.collate
        network, ema       what is trained, and what is validated
        step(parts), validate()   -> losses by name, with "loss" among them
        save()             writes what validate judged
        kept               the networks and optimizers that make its state, by name
        identity           what else they depend on, by name
    """
    state_path, log_path = run.folder / f"{name}_state.pt", run.folder / f"{name}.csv"
    settings, identity = run.settings[job_of(name)], run.identity(name)
    state = read_state(state_path, identity)
    if state and not state["kept"]:                      # a run that is done keeps nothing to go on from
        say(f"{name} is trained already, {state['step']} steps; --overwrite trains it anew")
        return
    torch.manual_seed(run.seed)                          # the network's first weights
    job = make_job(run, settings)
    identity |= job.identity
    state = read_state(state_path, identity)             # refused, if what the job depends on has changed
    step, best, log_bytes = 0, math.inf, 0
    if state:
        step, best, log_bytes = state["step"], state["best"], state["log_bytes"]
        for key, part in job.kept.items():
            # A copy: the state lies mapped in a file that will be replaced, and an optimizer would hold on to it.
            part.load_state_dict(copy.deepcopy(state["kept"][key]))
        state = None
        say(f"{name} goes on from step {step}")
    plan = Plan(len(job.data.items), settings, run)

    def save_state() -> float:
        kept = {key: part.state_dict() for key, part in job.kept.items()} if step < plan.steps else {}
        weights.save({"identity": identity, "step": step, "best": best, "log_bytes": log_path.stat().st_size,
                      "kept": kept}, state_path)
        return time.monotonic()

    barrier()                                            # all have read the state before it is written again
    with (open_log(log_path, log_bytes) as file, stop_when_asked() as asked,
          closing(run.batches(job.data, batch_sampler=plan.parts(step), collate_fn=job.data.collate)) as batches,
          tqdm(total=plan.steps, initial=step, desc=name, disable=rank() > 0) as bar):
        log = csv.writer(file, lineterminator="\n")
        saved_at = save_state() if rank() == 0 else 0.0     # at step 0 too: the same start, however soon it is stopped
        while step < plan.steps:
            for part in job.kept.values():
                if isinstance(part, torch.optim.Optimizer):
                    part.param_groups[0]["lr"] = settings.lr * (1 - step / plan.steps)
            losses = job.step([next(batches) for _ in range(run.accumulate)])
            losses = mean_over_processes(losses | {"stop": asked.to(run.device)})
            stop = losses.pop("stop") > 0
            if not all(map(math.isfinite, losses.values())):
                raise ValueError(
                    f"{name}, step {step}: " + ", ".join(f"{key} is {value}" for key, value in losses.items())
                    + "; what was saved before is kept; a lower --lr may help, with --overwrite; the batch was "
                    + ", ".join(str(job.data.items[i][0].path) for _, i in plan.batch(step)))
            job.ema.update(job.network, step)
            step += 1
            if step == 1 or step % LOG_EVERY == 0:
                log.writerows([step, f"train_{key}", f"{value:.6f}"] for key, value in losses.items())
            bar.set_postfix(loss=f"{losses['loss']:.3f}", best=f"{best:.4f}", refresh=False)
            bar.update()

            validated = rank() == 0 and plan.validates(step)
            if validated:
                with torch.inference_mode():
                    losses = job.validate()
                if not math.isfinite(losses["loss"]):
                    raise ValueError(f"{name}, step {step}: the validation loss is {losses['loss']}; what was saved "
                                     f"before is kept; a lower --lr may help, with --overwrite")
                log.writerows([step, f"val_{key}", f"{value:.6f}"] for key, value in losses.items())
                say(f"{name} step {step}, validation: "
                    + ", ".join(f"{key} {value:.4f}" for key, value in losses.items()))
                if losses["loss"] < best:
                    best = losses["loss"]
                    job.save()
            if rank() == 0 and (validated or stop or time.monotonic() - saved_at > 60 * run.save_minutes):
                saved_at = save_state()
            if validated and run.plot:
                draw_losses(log_path)
            if stop:
                say(f"{name} stopped after step {step}; the same command, without --overwrite, goes on from there")
                barrier()                                # torchrun ends the others where one ends: let rank 0 save
                raise KeyboardInterrupt
        # Stop if asked while rank 0 validated; and wait: the next job reads its files.
        if mean_over_processes({"stop": asked.to(run.device)})["stop"] > 0:
            say(f"{name} is trained; the same command goes on with what is left")
            raise KeyboardInterrupt


def open_log(path: Path, size: int):
    """The file of losses, cut back to `size` bytes: what came after them comes again.  Only rank 0 keeps one."""
    if rank() > 0:
        return open(os.devnull, "w")
    file = open(path, "a", newline="", buffering=1)
    if file.truncate(min(size, file.tell())) == 0:
        file.write(LOG_HEADER)
    return file


def draw_losses(path: Path) -> None:
    """Draw a log of losses, as a .png beside it."""
    from matplotlib.figure import Figure

    curves = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            curves.setdefault(row["name"], []).append((int(row["step"]), float(row["value"])))
    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2), ("train", "val")):
        for name, points in curves.items():
            if name.startswith(kind):
                axes.plot(*zip(*points), marker="." if kind == "val" else "", label=name.removeprefix(f"{kind}_"))
        axes.set(title=f"{path.stem}, {kind}", xlabel="step", yscale="log")
        axes.legend()
    figure.savefig(path.with_suffix(".png"), dpi=100)


def mean_by_rate(losses: dict[int, list[float]]) -> dict[str, float]:
    """The mean over the rates, as "loss", and each rate's own."""
    rates = {str(rate): sum(values) / len(values) for rate, values in losses.items()}
    return {"loss": sum(rates.values()) / len(rates)} | rates


class Crops(Dataset):
    """Random crops as waves (frames * hop,), each from (seed, epoch, item)."""

    collate = None                                       # PyTorch's own

    def __init__(self, run: Run, items: list[tuple[Clip, int]], settings: Settings):
        self.seed, self.items, self.seconds = run.seed, items, settings.frames / FRAMES_PER_SECOND

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        epoch, i = key
        clip, rate = self.items[i]
        latest = max(0.0, clip.samples / clip.rate - self.seconds)
        start = np.random.default_rng((self.seed, epoch, i)).uniform(0, latest)
        return clip.read(rate, start, self.seconds)

    def sample(self) -> list:
        """Crops of up to 256 items, drawn at random."""
        return [self[0, i] for i in sample_items(len(self.items), self.seed)]


class WholeClips(Dataset):
    """The log-mels (T, 64) of whole items, cut or filled with silence to the model's length."""

    def __init__(self, items: list[tuple[Clip, int]], seconds: float):
        self.items, self.seconds = items, seconds

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Tensor:
        clip, rate = self.items[i]
        return mel_spectrogram(clip.read(rate, 0, self.seconds)[None], rate)[0]


# ---------------------------------------------------------------------------------------------------------------------
# The VAE: L1, KL, detail and flicker, on mels of all rates


class MelCrops(Crops):
    """Random crops as log-mels (frames, 64), each with the noise (8, frames / 4, 16) for its latent."""

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        rate = self.items[key[1]][1]
        mel = mel_spectrogram(super().__getitem__(key)[None], rate)[0]
        random = np.random.default_rng((self.seed, *key, 1))
        eps = random.standard_normal((VAE.LATENT, len(mel) // 4, RATES[rate].n_mels // 4), np.float32)
        return mel, torch.from_numpy(eps)


@torch.no_grad()
def whiten_patches(vae: VAE, mels: Tensor) -> None:
    """Let an untrained VAE see mels (N, T, 64) as mixtures of the principal components of their 4 x 4 patches, brought
    to one scale.

    The first of them, loudness, has 97 % of the patches' variance: left to itself, a small VAE keeps little else.
    """
    encoder, n = vae.encoder, VAE.LATENT
    for name, layer in vae.named_modules():              # at first, residual blocks let their input through
        if name.endswith((".conv2", ".attention.proj_out")):
            layer.weight *= 0.1
            layer.bias.zero_()
    halve, halve_again = encoder.down[0].downsample.conv, encoder.down[1].downsample.conv
    encoder.conv_in.weight[0] = 0                        # channel 0: the mel
    encoder.conv_in.weight[0, 0, 1, 1] = 1
    encoder.conv_in.bias[0] = 0
    halve.weight[:4] = 0                                 # channels 0 to 3: patches of 2 x 2
    halve.weight[:4, 0, :2, :2] = torch.eye(4).view(4, 2, 2)
    halve.bias[:4] = 0
    shortcut = encoder.down[1].block[0].shortcut
    if isinstance(shortcut, nn.Conv2d):
        shortcut.weight[:4, :, 0, 0] = torch.eye(4, shortcut.in_channels)
        shortcut.bias[:4] = 0
    patches = F.pixel_unshuffle(F.pixel_unshuffle(mels[:, None], 2), 2)                      # (N, 16, T/4, 16)
    patches = patches.permute(0, 2, 3, 1).flatten(0, 2)                                      # (N * T/4 * 16, 16)
    variances, components = torch.linalg.eigh(patches.T.cov())
    whitened = components[:, -n:] / (variances[-n:] + 0.01).sqrt()                           # (16, 8); silence has none
    mixtures = torch.randn(len(halve_again.weight), n) @ whitened.T / n ** 0.5               # (C, 16)
    halve_again.weight *= 0.1
    halve_again.weight[:, :4, :2, :2] = mixtures.view(-1, 4, 2, 2)
    halve_again.bias.copy_(-mixtures @ patches.mean(0))
    vae.quant_conv.bias[n:] = -4                         # little noise at first
    vae.decoder.conv_out.bias.fill_(mels.mean())


class TrainVAE:
    identity = {}

    def __init__(self, run: Run, settings: Settings):
        self.run = run
        self.network = run.network(VAE, run.config.vae, "vae.pt")
        self.data = MelCrops(run, run.items(run.train, per_recording=True), settings)
        if not find_file("vae.pt", run.start):
            whiten_patches(self.network, torch.stack([mel for mel, _ in self.data.sample()]))
        self.network.to(run.device, memory_format=torch.channels_last).train()
        self.ddim_noise, self.flicker_weight = 0.0, 0.5
        if run.decoder_only:                             # the latents stay, and an LDM in them
            self.network.encoder.requires_grad_(False)
            self.network.quant_conv.requires_grad_(False)
            # DDIM ends at alpha_bar[0], not at 1: it leaves noise in z_0, at LATENT_STD a tenth of the latent's spread.
            # A decoder that has not met it turns it into flicker; one that has smooths away all that is as fine, so
            # flicker counts more here.
            alpha_bar = NoiseSchedule().alpha_bar[0].item()
            self.ddim_noise = (1 - alpha_bar) ** 0.5 / self.network.scale_factor.item()
            self.flicker_weight = 5.0
        self.ema = Ema(self.network)
        self.optimizer = make_optimizer(self.network, settings)
        self.kept = {"network": self.network, "ema": self.ema.network, "optimizer": self.optimizer}
        self.distributed = distribute(self.network)
        self.val_items = run.items(run.val, per_recording=True)

    def step(self, parts: list) -> dict[str, Tensor]:
        return descend(self.distributed, self.optimizer, parts, self.losses)

    def losses(self, part: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        mel, eps = (x.to(self.run.device) for x in part)               # (B, T, 64), (B, 8, T/4, 16)
        with autocast(self.run.device, self.run.precision):
            decoded, mean, logvar = self.distributed(mel, eps, self.ddim_noise)
        return vae_loss(mel, decoded, mean, logvar, KL_WEIGHT, self.flicker_weight)

    def validate(self) -> dict[str, float]:
        """Log-mel L1 of whole clips, decoded from the mean of q(z | mel), with the noise that DDIM leaves if the
        decoder is trained on it."""
        losses = {rate: [] for rate in self.run.rates}
        for (_, rate), mel in zip(tqdm(self.val_items, "validating", leave=False), self.run.mels(self.val_items)):
            mel = mel.to(self.run.device)                                                    # (1, T, 64)
            with autocast(self.run.device, self.run.precision):
                mean, _ = self.ema.network.encode(mel)
                noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0)).to(mean)
                decoded = self.ema.network.decode(mean + self.ddim_noise * noise)
            losses[rate].append(mel_loss(mel, decoded).item())
        return mean_by_rate(losses)

    @torch.no_grad()
    def save(self) -> None:
        vae = copy.deepcopy(self.ema.network)
        if not self.run.decoder_only:
            # Of whole clips, as the LDM takes them, with the silence that may follow; trained on are crops.
            items = [self.data.items[i] for i in sample_items(len(self.data.items), self.run.seed)]
            with autocast(self.run.device, self.run.precision):
                z = torch.cat([vae.encode(mel.to(self.run.device))[0] for mel in self.run.mels(items)])
            vae.normalize_latents(z.mean(dim=(0, 2, 3)), z.std(dim=(0, 2, 3)))               # z (N, 8, T/4, 16)
            vae.scale_factor.fill_(LATENT_STD)
        weights.save(vae.state_dict(), self.run.folder / "vae.pt")
        old, start = self.run.folder / "unet.pt", find_file("unet.pt", self.run.start)
        # That U-Net knows other latents.  It stays if the LDM, which comes next, is to start from it.
        if not self.run.decoder_only and not (start and start.resolve() == old.resolve()):
            old.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# A vocoder for one rate: HiFi-GAN


@torch.no_grad()
def whiten(conv: Conv1d, mels: Tensor) -> None:
    """Add mixtures of the principal components of mels (N, 64), brought to one scale, to a vocoder's first layer.

    The first of them, loudness, has most of a log-mel's variance; a network that sees little else is slow at the rest.
    """
    variances, components = torch.linalg.eigh(mels.T.cov())
    mixtures = torch.randn(conv.weight.shape[:2]) @ (components / (variances + 0.1).sqrt()).T         # (C, 64)
    conv.weight *= 0.4
    conv.weight[:, :, conv.kernel_size[0] // 2] += mixtures / mels.shape[1] ** 0.5
    conv.bias -= conv.weight.sum(2) @ mels.mean(0)


class TrainVocoder:
    """The generator computes in float32, as in SRCgAudio.generate: in bfloat16 it learns to make up for rounding noise,
    and without that noise is too quiet.  The discriminators compute in the run's precision."""

    identity = {}

    def __init__(self, rate: int, run: Run, settings: Settings):
        self.run, self.rate = run, rate
        self.data = Crops(run, run.items(run.train, [rate], per_recording=True), settings)
        self.val_items = run.items(run.val, [rate], per_recording=True)
        generator = Generator(**run.config.vocoder | {"strides": STRIDES[rate]})
        self.discriminators = None
        if settings.discriminators:
            self.discriminators = Discriminators(*settings.discriminators).to(run.device)
        started = self.start_from_nearest(generator)
        if not started and not settings.discriminators:
            whiten(generator.conv_pre, mel_spectrogram(torch.stack(self.data.sample()), rate).flatten(0, 1))
        self.ema = Ema(generator.to(run.device))         # before weight norm: what is saved needs none
        self.network = generator.train()
        for module in list(generator.modules()):
            if isinstance(module, (Conv1d, ConvTranspose1d)):
                weight_norm(module)
        self.optimizer = make_optimizer(self.network, settings, betas=(0.8, 0.99))
        self.kept = {"network": self.network, "ema": self.ema.network, "optimizer": self.optimizer}
        self.distributed = distribute(self.network)
        if self.discriminators:
            self.optimizer_d = make_optimizer(self.discriminators, settings, betas=(0.8, 0.99))
            self.kept |= {"discriminators": self.discriminators, "optimizer_d": self.optimizer_d}
            self.distributed_d = distribute(self.discriminators)

    def start_from_nearest(self, generator: Generator) -> bool:
        """Start from the vocoder of the nearest rate in the folder to start from, and from its discriminators: all
        rates have tensors of the same shapes.  Returns whether there was one."""
        for rate in sorted(RATES, key=lambda rate: abs(rate - self.rate)):
            if path := find_file(f"vocoder_{rate}.pt", self.run.start):
                say(f"vocoder_{self.rate} starts from {path}")
                weights.load(generator, weights.read(path), path)
                path = find_file(f"discriminators_{rate}.pt", self.run.start)
                if self.discriminators and path:
                    weights.load(self.discriminators, weights.read(path), path)
                return True
        return False

    def step(self, parts: list[Tensor]) -> dict[str, Tensor]:
        parts = [wave.to(self.run.device) for wave in parts]                                 # (B, L) each
        if not self.discriminators:
            return descend(self.distributed, self.optimizer, parts, self.spectral_losses)
        judging = descend(self.distributed_d, self.optimizer_d, parts, self.discriminator_losses)
        self.discriminators.requires_grad_(False)        # the generator's step needs no gradients of theirs
        losses = descend(self.distributed, self.optimizer, parts, self.generator_losses)
        self.discriminators.requires_grad_(True)
        return losses | {"discriminators": judging["loss"], "gradient_norm_d": judging["gradient_norm"]}

    def spectral_losses(self, wave: Tensor) -> dict[str, Tensor]:
        mel = mel_spectrogram(wave, self.rate)                                               # (B, L / hop, 64)
        generated = self.distributed(mel)                                                    # (B, L)
        mel_generated = mel_spectrogram(generated, self.rate)
        of_mel = mel_loss(mel, mel_generated)
        # A tone that stands out from the bands beside it adds little to the L1, so what stands out counts again.
        error = mel_generated - mel
        of_tones = (error - F.avg_pool1d(error, 7, 1, 3)).abs().mean()
        # A buzz of one pulse a hop has harmonics 100 Hz apart.  Most mel bands are wider and take it for noise; an STFT
        # resolves them, the better the longer its window.  A short window shows when a click comes.
        n_fft = RATES[self.rate].n_fft
        of_stft = (stft_loss(wave, generated, n_fft // 2) + stft_loss(wave, generated, 2 * n_fft)) / 2
        of_loud = convergence_loss(mel, mel_generated)
        return {"loss": of_mel + 4 * of_tones + of_stft / 2 + 4 * of_loud, "mel": of_mel}

    def discriminator_losses(self, wave: Tensor) -> dict[str, Tensor]:
        mel = mel_spectrogram(wave, self.rate)                                               # (B, L / hop, 64)
        with torch.no_grad():
            generated = self.network(mel)                                                    # (B, L)
        with autocast(self.run.device, self.run.precision):
            real, fake = self.distributed_d(wave, generated)
            return {"loss": discriminator_loss(real, fake)}

    def generator_losses(self, wave: Tensor) -> dict[str, Tensor]:
        mel = mel_spectrogram(wave, self.rate)                                               # (B, L / hop, 64)
        generated = self.distributed(mel)                                                    # (B, L)
        with autocast(self.run.device, self.run.precision):
            real, fake = self.discriminators(wave, generated)
        mel_generated = mel_spectrogram(generated, self.rate)
        return {"loss": generator_loss(real, fake, mel, mel_generated), "mel": mel_loss(mel, mel_generated)}

    def validate(self) -> dict[str, float]:
        """Log-mel L1 of copy-synthesis: real wave -> mel -> vocoder -> mel."""
        losses = []
        for mel in tqdm(self.run.mels(self.val_items), "validating", len(self.val_items), leave=False):
            mel = mel.to(self.run.device)                                                    # (1, T, 64)
            generated = self.ema.network(mel)            # in float32, as SRCgAudio.generate does
            losses.append(mel_loss(mel, mel_spectrogram(generated, self.rate)).item())
        return {"loss": sum(losses) / len(losses)}

    def save(self) -> None:
        weights.save(self.ema.network.state_dict(), self.run.folder / f"vocoder_{self.rate}.pt")
        if self.discriminators:                          # so that a training can go on from here
            weights.save(self.discriminators.state_dict(), self.run.folder / f"discriminators_{self.rate}.pt")


# ---------------------------------------------------------------------------------------------------------------------
# The latent diffusion model: Eq. (3) under the text and the rate


def train_tokenizer(captions: list[str], vocabulary: int) -> sentencepiece.SentencePieceProcessor:
    """A sentencepiece model with T5's special tokens: pad 0, </s> 1, unknown 2, no start token.  It folds case, as T5's
    does not: few captions have capitals, and none would teach what "A dog" is."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(captions), model_writer=model, vocab_size=vocabulary, hard_vocab_limit=False,
            max_sentence_length=2 ** 20, character_coverage=1.0, normalization_rule_name="nmt_nfkc_cf",
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    except RuntimeError:
        raise ValueError(f"no tokenizer of {vocabulary} tokens can be made of these captions: they have too many kinds "
                         f"of characters for it, or none that it can read; mend them, or take a larger --preset or "
                         f"--flan-t5") from None
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


class Latents(Dataset):
    """What Eq. (3) takes of each item: z_0 (8, T/4, 16), eps, t, rate, and psi (N, d) of its caption, or the caption's
    token ids (N,) where the text encoder is trained along.

    places: (items, 2), where the cache has each item's latent.  texts: caption -> [token ids], or where
    the cache has its psi: (start, size, d).  rolled: z_0 is shifted in time, circularly, at random; else a few
    hundred recordings are soon memorised.  times: each item's t, fixed, for validation, where no caption is
    emptied.  All that is random comes from (seed, epoch, item).
    """

    def __init__(self, run: Run, items: list[tuple[Clip, int]], places: np.ndarray, texts: dict, scale_factor: float,
                 rolled: bool = False, times: Tensor | None = None):
        self.seed, self.arrays, self.rolled = run.seed, run.cache.arrays, rolled
        self.items, self.places, self.texts, self.scale_factor, self.times = items, places, texts, scale_factor, times

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, int, int, Tensor]:
        epoch, i = key
        clip, rate = self.items[i]
        random = np.random.default_rng((self.seed, epoch, i))
        shape = (VAE.LATENT, -1, RATES[rate].n_mels // 4)
        mean, logvar = (part.view(shape) for part in read_array(self.arrays, self.places[i]).chunk(2))
        noise, eps = torch.from_numpy(random.standard_normal((2, *mean.shape), np.float32))
        z_0 = self.scale_factor * sample_posterior(mean, logvar, noise)           # (8, T/4, 16)
        if self.rolled:
            z_0 = z_0.roll(int(random.integers(z_0.shape[1])), dims=1)
        if self.times is None:
            t = int(random.integers(NoiseSchedule.T))                             # t ~ Uniform(1, T), counted from 0
            caption = "" if random.random() < NULL_CAPTIONS else clip.caption
        else:
            t, caption = int(self.times[i]), clip.caption
        text = self.texts[caption]                                                # token ids, or where psi lies
        text = torch.tensor(text) if isinstance(text, list) else read_array(self.arrays, text[:2]).view(-1, text[2])
        return z_0, eps, t, rate, text

    @staticmethod
    def collate(batch: list) -> tuple[Tensor, ...]:
        """-> z_0, eps (B, 8, T/4, 16), t, rate (B,), text (B, N, d) or (B, N), text_mask (B, N)."""
        z_0, eps, t, rate, texts = zip(*batch)
        mask = pad_sequence([torch.ones(len(text), dtype=torch.bool) for text in texts], batch_first=True)
        return (torch.stack(z_0), torch.stack(eps), torch.tensor(t), torch.tensor(rate),
                pad_sequence(texts, batch_first=True), mask)


def blind_loss(alpha_bar: Tensor, std: float) -> Tensor:
    """Eq. (3) for the best guess of eps from z_t, entry by entry, blind to the text, the rate and the neighbours,
    knowing nothing of z_0 but its standard deviation.

    With std = 0.3 it falls from 0.99 at the first t to 0.001 at t = 900: nearly all of Eq. (3) is about fine detail.
    At large t the outline is decided, that of a class at a rate, but it hardly counts, so a small network learns it
    late.  Divided by this, Eq. (3) counts at all t alike: the weights of Karras et al. 2022 (EDM), with t uniform.
    """
    signal = alpha_bar * std ** 2
    return signal / (signal + 1 - alpha_bar)


class Objective(nn.Module):
    """Eq. (3) as a module that holds all that is trained: the U-Net and, if it is trained along, the text encoder.

    std: of z_0, if all t are to count alike.
    """

    def __init__(self, unet: UNet, text_encoder: TextEncoder | None, std: float | None):
        super().__init__()
        self.unet, self.text_encoder, self.schedule, self.std = unet, text_encoder, NoiseSchedule(), std

    def forward(self, z_0: Tensor, eps: Tensor, t: Tensor, rate: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """Eq. (3) for each item of a batch, (B,), from what `Latents.collate` gives; balanced, over `blind_loss`."""
        psi = text if self.text_encoder is None else self.text_encoder(text, text_mask)      # (B, N, d)
        loss = diffusion_loss(self.unet, self.schedule, z_0, eps, t, rate, psi, text_mask)
        return loss / blind_loss(self.schedule.alpha_bar.to(z_0)[t], self.std) if self.std else loss


class TrainLDM:
    """clip -> `WholeClips`: mel -> `VAE.encode`: mean, logvar, kept in the cache -> `Latents`: z_0, eps, t, and psi(P)
    or, with probability 0.1, psi("") -> `Objective`: `diffusion_loss`, Eq. (3)."""

    def __init__(self, run: Run, settings: Settings):
        self.run, self.settings = run, settings
        config, folder = run.config, run.folder
        vae = SRCgAudio.load_vae(folder).to(run.device)
        self.text_encoder = self.make_text_encoder().to(run.device).requires_grad_(run.train_text_encoder)
        unet = run.network(UNet, config.unet, "unet.pt")
        check_widths(self.text_encoder, unet, folder / "config.json")
        scale_factor = vae.scale_factor.item()
        # z_0's standard deviation: for a VAE trained here, whose channels have 1, the factor itself (`weights.py halve`
        # rounds it); for AudioLDM's, 1, to which its factor scales.
        std = LATENT_STD if math.isclose(scale_factor, LATENT_STD, rel_tol=1e-3) else 1.0
        self.network = Objective(unet, self.text_encoder if run.train_text_encoder else None,
                                std if settings.balanced else None)
        self.network.to(run.device, memory_format=torch.channels_last).train()
        self.ema = Ema(self.network)
        self.optimizer = make_optimizer(self.network, settings)
        self.kept = {"network": self.network, "ema": self.ema.network, "optimizer": self.optimizer}
        if run.activation_checkpointing:                 # after the EMA's copy, which needs none
            checkpoint_activations(unet)
        self.distributed = distribute(self.network)

        # The frozen parts run once.  What they made is found again by what they made it from.
        vae_digest = latent_digest(vae)
        captions = sorted({clip.caption for clip in run.train + run.val} | {""})
        if run.train_text_encoder:                       # its weights change, but what a token stands for must not
            text_digest = digest(self.text_encoder.tokenizer.serialized_model_proto())
            # Lists, since each tensor would be an open file on its way to a worker that is not forked.
            texts = {caption: self.text_encoder.tokenize([caption])[0][0].tolist() for caption in captions}
        else:
            text_digest = network_digest(self.text_encoder)
            keys = [digest("psi", text_digest, run.precision, caption) for caption in captions]
            places = self.find_or_compute(captions, keys, iter, self.encode_caption, "captions")
            self.text_encoder.cpu()                      # 1.3 GiB of FLAN-T5-large
            texts = {caption: (int(start), int(size), unet.context_width)
                     for caption, (start, size) in zip(captions, places)}
        self.identity = {"the VAE": f"{vae_digest.hex()}, {scale_factor}", "the text encoder": text_digest.hex()}
        train, val = run.items(run.train), run.items(run.val)
        val = val * max(1, 10 * len(run.rates) // len(val))            # few clips come again, each time at another t
        keys = [digest("latent", vae_digest, run.precision, config.seconds, rate, clip.digest)
                for clip, rate in train + val]
        places = self.find_or_compute(train + val, keys, run.mels, partial(self.encode_mel, vae), "latents")
        self.data = Latents(run, train, places[:len(train)], texts, scale_factor, rolled=settings.rolled)
        self.val_data = Latents(run, val, places[len(train):], texts, scale_factor, times=even_times(val, run.rates))

    def make_text_encoder(self) -> TextEncoder:
        """A FLAN-T5; or the encoder of the checkpoint to start from, or of this one; or a new small one with its own
        tokenizer."""
        run, config = self.run, self.run.config
        if isinstance(config.text_encoder, str):
            return SRCgAudio.load_text_encoder(run.folder)
        if path := find_file("text_encoder.pt", run.start, run.folder):
            return SRCgAudio.load_text_encoder(path.parent)
        encoder = TextEncoder(**config.text_encoder)
        encoder.initialize(torch.Generator().manual_seed(run.seed))
        encoder.tokenizer = run.tokenizer
        return encoder

    def find_or_compute(self, items: list, keys: list[bytes], load, compute, title: str) -> np.ndarray:
        """Where the cache has each item's array, (items, 2): start and size.  What it lacks is added before:
        compute(x) of each x that load(missing items) yields."""
        cache, new = self.run.cache, {}
        with main_process_first(), torch.inference_mode():
            missing = {key: item for key, item in zip(keys, items) if cache.find(key) is None}
            for key, loaded in zip(missing, tqdm(load(list(missing.values())), title, len(missing), leave=False,
                                                 disable=not missing)):
                with autocast(self.run.device, self.run.precision):
                    new[key] = compute(loaded).float().cpu().numpy()
                if len(new) == 64:
                    cache.add(new)
                    new = {}
            cache.add(new)
        return np.array([cache.find(key) for key in keys])

    def encode_mel(self, vae: VAE, mel: Tensor) -> Tensor:
        return torch.cat(vae.encode(mel.to(self.run.device)))          # mean and logvar, (2, 8, T/4, 16)

    def encode_caption(self, caption: str) -> Tensor:
        return self.text_encoder.encode([caption])[0][0]                                     # (N, d)

    def step(self, parts: list) -> dict[str, Tensor]:
        return descend(self.distributed, self.optimizer, parts, self.losses)

    def losses(self, part: tuple[Tensor, ...]) -> dict[str, Tensor]:
        part = (x.to(self.run.device) for x in part)
        with autocast(self.run.device, self.run.precision):
            return {"loss": self.distributed(*part).mean()}

    def validate(self) -> dict[str, float]:
        """The loss with fixed noise, and times spread evenly over the items of each rate."""
        losses = {rate: [] for rate in self.run.rates}
        items = range(len(self.val_data.items))
        size = self.settings.batch // (processes() * self.run.accumulate)      # as many at once as training takes
        for first in tqdm(items[::size], "validating", leave=False):
            batch = [self.val_data[0, i] for i in items[first:first + size]]
            with autocast(self.run.device, self.run.precision):
                values = self.ema.network(*(x.to(self.run.device) for x in Latents.collate(batch)))
            for (*_, rate, _), value in zip(batch, values.tolist()):
                losses[rate].append(value)
        return mean_by_rate(losses)

    def save(self) -> None:
        encoder = self.ema.network.text_encoder or self.text_encoder
        if isinstance(self.run.config.text_encoder, dict):             # a FLAN-T5 stays in its own folder
            encoder.save(self.run.folder)
        weights.save(self.ema.network.unet.state_dict(), self.run.folder / "unet.pt")


def checkpoint_activations(unet: UNet) -> None:
    """Let blocks keep only their inputs for the backward pass, which computes the rest again."""
    for module in unet.modules():
        if isinstance(module, (ResBlock, Transformer)):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def network_digest(network: nn.Module) -> bytes:
    """Changes when any weight does, or a text encoder's tokenizer."""
    total = hashlib.blake2b(digest_size=16)
    for name, tensor in network.state_dict().items():
        total.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    if isinstance(network, TextEncoder):
        total.update(network.tokenizer.serialized_model_proto())
    return total.digest()


def latent_digest(vae: VAE) -> bytes:
    """Changes when the latents do; the decoder makes none."""
    return network_digest(nn.ModuleList([vae.encoder, vae.quant_conv]))


def latents_differ(*folders: Path) -> bool:
    """Whether the VAEs in these checkpoint folders make different latents; a U-Net knows those of only one."""
    return len({latent_digest(SRCgAudio.load_vae(path)) for path in folders if (path / "vae.pt").is_file()}) > 1


def even_times(items: list[tuple[Clip, int]], rates: list[int]) -> Tensor:
    """A t for each item: those of each rate are the middles of equal parts of 0 to T, in random order."""
    T, times = NoiseSchedule.T, torch.zeros(len(items), dtype=torch.long)
    for rate in rates:
        of_rate = [i for i, item in enumerate(items) if item[1] == rate]
        order = torch.randperm(len(of_rate), generator=torch.Generator().manual_seed(0))
        times[of_rate] = ((order + 0.5) * T / len(of_rate)).long()
    return times


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train SRC-gAudio's VAE, vocoders and latent diffusion model.")
    add = parser.add_argument
    add("jobs", nargs="+", choices=["vae", "vocoder", "ldm"], help="what to train; the VAE first, the LDM last")
    add("--data", required=True, type=Path, nargs="+", action="append", metavar="PATH",
        help="a caption file (path,caption or as AudioCaps, WavCaps, VGGSound and ESC-50 have them), then the folder "
             "with its audio if that is elsewhere; or, without ldm, a folder alone; several: --data for each")
    add("--val-data", type=Path, nargs="+", action="append", metavar="PATH",
        help="the same for validation; without it a tenth of the recordings is held out")
    add("--blacklist", type=Path, nargs="+", action="extend", default=[], metavar="FILE",
        help="WavCaps' lists of test clips, to be left out of --data")
    add("--checkpoint", required=True, type=Path, metavar="FOLDER", help="where the weights go")
    add("--preset", choices=list(PRESETS), help="sizes and settings (default: those of the checkpoint, else small)")
    add("--rates", type=int, nargs="+", action="extend", metavar="HZ", help="sampling rates (default: all four)")
    add("--no-rate-token", action="store_true", help="gAudio: a U-Net for one rate, which it is not told")
    add("--any-rate", action="store_true", help="train clips at rates above their own too, upsampled")
    add("--start-from", type=Path, metavar="FOLDER",
        help="start from the weights of this checkpoint; a vocoder may start from one of another rate")
    add("--flan-t5", type=Path, metavar="FOLDER", help="a FLAN-T5 for the LDM, instead of a small text encoder")
    add("--decoder-only", action="store_true",
        help="train the VAE's decoder alone, on latents with the noise that DDIM leaves: the latents stay as they are, "
             "and so does an LDM that was trained in them")
    add("--train-text-encoder", action="store_true", help="train the small text encoder along with the U-Net")
    add("--tokenizer-captions", type=Path, metavar="FILE",
        help="the small text encoder's tokenizer learns from this caption file's captions too")
    add("--epochs", type=int, help="instead of the preset's")
    add("--batch", type=int, help="items of a step, over all processes, instead of the preset's")
    add("--lr", type=float, help="instead of the preset's")
    add("--accumulate", type=int, default=1, metavar="PARTS", help="take each batch in so many parts, to save memory")
    add("--activation-checkpointing", action="store_true", help="LDM: compute activations twice, to save memory")
    add("--save-minutes", type=float, default=10, metavar="M", help="time between states to go on from (default: 10)")
    add("--cache", type=Path, metavar="FOLDER", help="of latents and text embeddings (default: beside the checkpoint)")
    add("--plot", action="store_true", help="draw the losses after each validation (takes matplotlib)")
    add("--overwrite", action="store_true",
        help="begin anew, where there are weights or a state to go on from; a text encoder that is there stays")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("--precision", default="auto", choices=["auto", "bf16", "fp32"])
    add("--workers", type=int, default=2,
        help="processes that read data, for each that trains (default: 2; a fast GPU waits for them)")
    args = parser.parse_args()
    args.rates = sorted(set(args.rates or RATES))        # each once
    args.cache = args.cache or args.checkpoint.parent / "cache"
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Raises ValueError for arguments that are wrong whatever the data holds."""
    for rate in args.rates:
        check_rate(rate)
    for folder in (args.checkpoint, args.cache):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file; name a folder")
    for name in ("epochs", "batch", "lr", "accumulate"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} must be above 0, got {value}")
    if not 0 <= args.seed < 2 ** 31 or args.workers < 0 or not args.save_minutes >= 0:
        raise ValueError("--seed must be from 0 to 2^31 - 1, --workers and --save-minutes at least 0")
    for job, names in (("vae", ["decoder_only"]),
                       ("ldm", ["no_rate_token", "flan_t5", "train_text_encoder", "tokenizer_captions"])):
        for name in names:
            if job not in args.jobs and getattr(args, name):
                raise ValueError(f"--{name.replace('_', '-')} is for the job {job}, which is not asked for")
    if args.decoder_only and not find_file("vae.pt", args.start_from):
        raise ValueError("--decoder-only goes on from a trained VAE; name its folder with --start-from")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot draws with matplotlib, which is not installed: pip install matplotlib")


def find_data(args: argparse.Namespace, cache: Cache) -> tuple[list[Clip], list[Clip], list[str]]:
    """The clips to train and to validate on, and a line for each that is left out."""
    train, left_out = find_reaching(args.data, args, cache, blacklists=args.blacklist)
    if args.val_data:
        val, left_out_of_val = find_reaching(args.val_data, args, cache, split="test")
        return train, val, left_out + left_out_of_val
    # A recording may have several captions.  Other seeds get the same tenth, and jobs of other clips much the same.
    recordings = sorted({clip.recording for clip in train}, key=digest)
    held_out = set(recordings[:max(1, len(recordings) // 10)])
    val = [clip for clip in train if clip.recording in held_out]
    train = [clip for clip in train if clip.recording not in held_out]
    if not train:
        raise ValueError(f"{args.data[0][0]}: one clip is too few; validation holds out another"
                         + "".join(f" (left out: {line})" for line in left_out[:1]))
    return train, val, left_out


def find_reaching(sources: list[list[Path]], args: argparse.Namespace, cache: Cache,
                  **more) -> tuple[list[Clip], list[str]]:
    """What `find_clips` finds, but the clips that reach none of the rates are left out too; unless none reaches any,
    which `Run.items` refuses."""
    clips, left_out = find_clips(sources, cache, captions="ldm" in args.jobs, progress=rank() == 0, **more)
    lowest = 0 if args.any_rate else min(args.rates)     # a clip that reaches any rate reaches that
    reaching = [clip for clip in clips if clip.reaches(lowest)]
    low = dict.fromkeys(f"{clip.path}: its {clip.rate} Hz reach none of the rates; --any-rate takes it"
                        for clip in clips if not clip.reaches(lowest))           # once, however many captions it has
    return (reaching, left_out + list(low)) if reaching else (clips, left_out)


def find_outputs(args: argparse.Namespace) -> dict[str, list[str]]:
    """The files of weights that each training, named as in `fit`, will write, that of the network first.  Raises
    ValueError where that would replace what is there unasked, or leave a U-Net without its VAE."""
    folder, outputs = args.checkpoint, {}
    if "vae" in args.jobs:
        outputs["vae"] = ["vae.pt"]
    if "vocoder" in args.jobs:
        outputs |= {f"vocoder_{rate}": [f"vocoder_{rate}.pt", f"discriminators_{rate}.pt"] for rate in args.rates}
    if "ldm" in args.jobs:
        outputs["ldm"] = ["unet.pt", "text_encoder.pt"] if args.train_text_encoder else ["unet.pt"]
    for name, files in outputs.items():
        for path in (folder / file for file in files):
            if path.exists() and not (folder / f"{name}_state.pt").exists() and not args.overwrite:
                raise ValueError(f"{path} exists; name another --checkpoint, or say --overwrite")
        log = folder / f"{name}.csv"                     # the user's captions may have this name
        if log.is_file() and log.read_bytes()[:len(LOG_HEADER)] not in (b"", LOG_HEADER.encode()):
            raise ValueError(f"{log} is no log of losses, and this run would write one there; name another "
                             f"--checkpoint")
    if "vae" in outputs and (folder / "unet.pt").exists():
        states = {} if args.overwrite else {name: read_state(folder / f"{name}_state.pt", {}) for name in outputs}
        vae_changes = not states.get("vae") or states["vae"]["kept"]
        unet_stays = "ldm" not in outputs or states.get("ldm")
        # unet.pt without vae.pt: an earlier run of this command copied it, and was stopped before it first saved a VAE.
        latents_stay = args.decoder_only and not latents_differ(folder, args.start_from)
        if vae_changes and unet_stays and not latents_stay:
            raise ValueError(f"{folder / 'unet.pt'} knows the latents only of the VAE it was trained with; name "
                             f"another --checkpoint, train both anew (vae ldm --overwrite), or keep the latents with "
                             f"--decoder-only --start-from {folder}")
    return outputs


def find_copies(args: argparse.Namespace, config: Config, outputs: dict[str, list[str]]) -> list[Path]:
    """What the folder to start from has, this checkpoint lacks, and this run does not make."""
    start_config = SRCgAudio.load_config(args.start_from)
    if start_config.preset != config.preset:
        raise ValueError(f"{args.start_from} holds the preset {start_config.preset!r}, {args.checkpoint} "
                         f"{config.preset!r}; start from another folder")
    not_copied = set().union(*outputs.values())
    if (start_config.unet, start_config.text_encoder) != (config.unet, config.text_encoder):
        not_copied.add("unet.pt")                        # config.json describes another
    new_latents = "vae" in args.jobs and not args.decoder_only
    if new_latents or latents_differ(args.checkpoint, args.start_from):
        not_copied.add("unet.pt")                        # of no use in another VAE's latents
        if "ldm" in args.jobs and (start := find_file("unet.pt", args.start_from)):
            say(f"{start}, the start, has learnt in the latents of another VAE")
    if args.no_rate_token:                               # a gAudio makes sound at its own rate alone
        not_copied |= {f"{part}_{rate}.pt" for part in ("vocoder", "discriminators")
                       for rate in RATES if rate not in args.rates}
    return [path for path in sorted(args.start_from.iterdir())
            if path.suffix in (".model", ".pt") and not path.name.endswith("_state.pt")
            and path.name not in not_copied and not (args.checkpoint / path.name).exists()]


def pick_config(args: argparse.Namespace) -> tuple[Config, Path]:
    """The sizes: those of the checkpoint, or of the one to start from, or the preset's; and the folder they are of."""
    source = args.checkpoint if (args.checkpoint / "config.json").exists() else args.start_from
    config = known = SRCgAudio.load_config(source) if source else PRESETS[args.preset or "small"]
    if args.preset not in (None, config.preset):
        raise ValueError(f"{source} holds the preset {config.preset!r}, not {args.preset!r}; name another folder")
    if args.flan_t5:
        encoder = TextEncoder.from_pretrained(args.flan_t5)            # fails here rather than after the VAE
        config = replace(config, text_encoder=str(args.flan_t5.resolve()),
                         unet=config.unet | {"context_width": encoder.embedding.weight.shape[1]})
    if args.no_rate_token:
        tokens = [name for name in config.unet.get("tokens", ["time", "rate"]) if name != "rate"]
        config = replace(config, unet=config.unet | {"tokens": tokens})
    if "ldm" in args.jobs and len(args.rates) > 1 and "rate" not in config.unet.get("tokens", ["rate"]):
        raise ValueError(f"the U-Net of {source or args.checkpoint} is not told the rate, so it can learn one alone; "
                         f"name it with --rates, or start from one that has the token (weights.py import --add-tokens)")
    if source == args.checkpoint and config != known and (source / "unet.pt").exists():
        # Until a new U-Net is saved, config.json must fit the old one.
        raise ValueError(f"{source / 'unet.pt'} was not trained with this --flan-t5 or --no-rate-token; name another "
                         f"--checkpoint")
    return config, source or args.checkpoint


def check_ldm(args: argparse.Namespace, config: Config) -> None:
    """Raises ValueError if there is no VAE for the LDM, or another text encoder than was asked for."""
    folder = args.checkpoint
    flan_t5 = config.text_encoder if isinstance(config.text_encoder, str) else None
    encoder = flan_t5 or find_file("text_encoder.pt", args.start_from, folder)
    if flan_t5 and args.train_text_encoder:
        raise ValueError("--train-text-encoder trains the small text encoder; a FLAN-T5 stays as it is")
    if config.preset == "paper" and not encoder:
        raise ValueError("the preset paper needs a pretrained FLAN-T5-large; name its folder with "
                         "--flan-t5")
    goes_on = (folder / "ldm_state.pt").exists() and not args.overwrite          # with an encoder of its own
    if args.tokenizer_captions and encoder and not goes_on:
        raise ValueError(f"--tokenizer-captions is for a new text encoder, but there is {encoder}")
    if "vae" not in args.jobs and not find_file("vae.pt", folder, args.start_from):
        raise ValueError(f"{folder}: no vae.pt; the LDM lives in the latents of a VAE: train that first (job vae)")


def check_networks(args: argparse.Namespace, config: Config, source: Path) -> None:
    """Raises ValueError if no networks of these sizes, which `source` names, can be made, if a clip is no whole latent
    for them, or if a file of weights that a job may start from is damaged or of other sizes."""
    parts = [("vae", "vae.pt", VAE, config.vae), ("ldm", "unet.pt", UNet, config.unet)]
    if isinstance(config.text_encoder, dict):            # a FLAN-T5 is checked where it is read
        parts.append(("ldm", "text_encoder.pt", TextEncoder, config.text_encoder))
    for rate in RATES:
        parts.append(("vocoder", f"vocoder_{rate}.pt", Generator, config.vocoder | {"strides": STRIDES[rate]}))
        widths, name = SETTINGS[config.preset]["vocoder"].discriminators, f"discriminators_{rate}.pt"
        if widths and find_file(name, args.start_from):  # only then: to make them takes a second
            parts.append(("vocoder", name, Discriminators, dict(zip(("mpd_channels", "msd_channels"), widths))))
    networks = {}                                        # file name -> network, of shapes alone
    for job, name, cls, sizes in parts:
        if job not in args.jobs:
            continue
        networks[name] = weights.skeleton(cls, sizes, source)
        if path := find_file(name, args.start_from):
            try:
                weights.check(networks[name], weights.read(path), path)
            except ValueError as error:
                raise ValueError(f"{error}; if {name} is taken out of the folder, training starts without it") from None
    if "text_encoder.pt" in networks:
        check_widths(networks["text_encoder.pt"], networks["unet.pt"], source)
    frames = 4 * (networks["unet.pt"].multiple if "ldm" in args.jobs else 1)       # of a mel, for a whole latent
    if {"vae", "ldm"} & set(args.jobs) and round(config.seconds * FRAMES_PER_SECOND) % frames:
        raise ValueError(f"{source}: seconds must be a multiple of {frames / FRAMES_PER_SECOND} for these networks, "
                         f"got {config.seconds}")


def make_tokenizer(args: argparse.Namespace, config: Config,
                   train: list[Clip]) -> sentencepiece.SentencePieceProcessor | None:
    """The tokenizer of a new small text encoder, if this run makes one."""
    if ("ldm" not in args.jobs or isinstance(config.text_encoder, str)
            or find_file("text_encoder.pt", args.start_from, args.checkpoint)):
        return None
    captions = {clip.caption for clip in train}
    if args.tokenizer_captions:
        rows = read_rows(args.tokenizer_captions, args.tokenizer_captions.parent, captions=True, split="train")
        captions |= {row.caption for row in rows}
    encoder = weights.skeleton(TextEncoder, config.text_encoder, args.checkpoint / "config.json")
    return train_tokenizer(sorted(captions), len(encoder.embedding.weight))


def pick_settings(args: argparse.Namespace, config: Config) -> dict[str, Settings]:
    """The preset's settings of each job, changed as the arguments say."""
    changes = {name: getattr(args, name) for name in ("epochs", "batch", "lr") if getattr(args, name) is not None}
    settings = {job: replace(SETTINGS[config.preset][job], **changes) for job in args.jobs}
    for job in args.jobs:
        if settings[job].batch % (processes() * args.accumulate):
            raise ValueError(f"{job}: a batch of {settings[job].batch} can't be shared by {processes()} processes in "
                             f"{args.accumulate} equal parts each; choose another --batch or --accumulate")
    return settings


def prepare(args: argparse.Namespace, device: torch.device) -> Run:
    """Check what can be checked before the first step; only then is anything but the cache written or deleted."""
    check_arguments(args)
    folder, outputs = args.checkpoint, find_outputs(args)
    config, source = pick_config(args)
    copies = find_copies(args, config, outputs) if args.start_from else []
    if "ldm" in args.jobs:
        check_ldm(args, config)
    check_networks(args, config, source / "config.json")
    settings = pick_settings(args, config)
    cache = Cache(args.cache)
    train, val, left_out = find_data(args, cache)
    run = Run(folder=folder, config=config, settings=settings, train=train, val=val, rates=args.rates,
              any_rate=args.any_rate, start=args.start_from, decoder_only=args.decoder_only,
              train_text_encoder=args.train_text_encoder, tokenizer=make_tokenizer(args, config, train), seed=args.seed,
              device=device, precision=pick_precision(device, args.precision), workers=args.workers, cache=cache,
              accumulate=args.accumulate, activation_checkpointing=args.activation_checkpointing,
              save_minutes=args.save_minutes, plot=args.plot)
    if not args.overwrite:
        for name, (file, *_) in outputs.items():         # refuses another run's state
            state = read_state(folder / f"{name}_state.pt", run.identity(name))
            if state and state["best"] < math.inf and not (folder / file).is_file():
                raise ValueError(f"{folder / file} is gone: the best weights of the run that {name}_state.pt resumes; "
                                 f"put it back, or begin anew with --overwrite")
    report(run, left_out)
    if rank() == 0:
        for path in copies:
            say(f"copying {path}")
            with open(path, "rb") as file:
                weights.replace_file(folder / path.name, partial(shutil.copyfileobj, file))
        SRCgAudio.save_config(config, folder)
        if args.overwrite:
            for name in outputs:
                (folder / f"{name}_state.pt").write_bytes(b"")         # the next time needs no --overwrite
    return run


def report(run: Run, left_out: list[str]) -> None:
    """Say what there is to train on, and what was left out and why."""
    for line in left_out[:20]:
        say(f"left out: {line}")
    if left_out[20:]:
        say(f"left out: {len(left_out) - 20} more")
    for name, clips in (("train", run.train), ("validate", run.val)):
        files = {clip.recording: clip.samples / clip.rate for clip in clips}
        rates = Counter(rate for _, rate in run.items(clips, per_recording="ldm" not in run.settings))
        say(f"to {name} on: {len(files)} clips, {sum(files.values()) / 3600:.2f} h, "
            f"{sum(bool(clip.caption) for clip in clips)} captions; "
            + ", ".join(f"{rates[rate]} at {rate} Hz" for rate in run.rates))
    both = {clip.recording for clip in run.train} & {clip.recording for clip in run.val}
    if both:
        example = next(clip.path for clip in run.val if clip.recording in both)
        say(f"warning: {len(both)} recordings are both trained and validated on, such as {example}")
    reasons = Counter(line.split(": ")[-1] for line in left_out)
    say(f"left out: {len(left_out)}" + "".join(f"; {n} {reason}" for reason, n in reasons.most_common(5))
        + f"; {run.device}, {run.precision}, {processes()} process" + "es" * (processes() > 1))


def main() -> None:
    args = parse()
    torchrun = "WORLD_SIZE" in os.environ                # it started this process, and others
    if torchrun and torch.cuda.is_available() and args.device in ("auto", "cuda"):
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    device = pick_device(args.device)
    if device.type == "cuda":
        # cuDNN's, which torch prefers on an H100, can give NaN gradients under a mask (pytorch issue 196678).
        torch.backends.cuda.enable_cudnn_sdp(False)
    if torchrun:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # The others may wait for rank 0 while it fills the cache or validates.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=7),
                                device_id=device if device.type == "cuda" else None)
    with main_process_first():
        run = prepare(args, device)
    if "vae" in args.jobs:
        fit("vae", TrainVAE, run)
    if "vocoder" in args.jobs:
        for rate in run.rates:
            fit(f"vocoder_{rate}", partial(TrainVocoder, rate), run)
    if "ldm" in args.jobs:
        fit("ldm", TrainLDM, run)
    say(f"the checkpoint is {run.folder}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    exit_cleanly(main)
