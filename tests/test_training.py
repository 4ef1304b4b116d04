"""Training that can be trusted: the order of the data, exact resume, several processes, the cache, the paper's
regimes."""
import csv
import errno
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from conftest import CAPTIONS, HERE, few_clips, untrained
from test_paper import gaussian_noise

import train
import weights
from data import Cache
from srcgaudio import PRESETS, NoiseSchedule, SRCgAudio
from train import Muon, Plan, Settings, orthogonal, whiten, whiten_patches
from unet import UNet
from vae import VAE
from vocoder import Conv1d

ROOT = HERE.parent
JOBS = {"vae": "vae.pt", "vocoder": "vocoder_16000.pt", "ldm": "unet.pt"}


@pytest.fixture
def start(checkpoint, tmp_path):
    """A command that trains one job at 16 kHz on five recordings, from the untrained checkpoint, in float32 on any
    machine: how a batch is split changes what bfloat16 rounds."""
    def arguments(jobs: str, folder: Path, *more, data: Path | None = None, base: Path | None = checkpoint) -> list:
        return ["train.py", *jobs.split(), "--data", data or few_clips(tmp_path), "--rates", 16_000, "--checkpoint",
                folder, "--workers", 0, "--batch", 4, "--epochs", 8, "--precision", "fp32",
                *(["--start-from", base] if base else []), *more]
    return arguments


@pytest.fixture
def make(start, succeed, tmp_path, monkeypatch):
    """make(job, ...) -> what the command of `start` would train, before its first step; it saves into tmp_path / "run".
    """
    def made(job: str, *more, **sources):
        jobs = []
        monkeypatch.setattr("train.fit", lambda _, make_job, run: jobs.append(make_job(run, run.settings[job])))
        succeed(*start(job, tmp_path / "run", *more, **sources))
        return jobs[0]
    return made


@pytest.fixture
def stop(command, monkeypatch):
    """stop("train.py", ...): the same as `command`, ended by a Ctrl-C in the first step -> what it printed."""
    def stopped(*arguments) -> str:
        with monkeypatch.context() as stopping:
            stopping.setattr("train.Ema.update", lambda _, network, step: step or signal.raise_signal(signal.SIGINT))
            status, out, err = command(*arguments)
        assert status == 130, err
        return out + err
    return stopped


def losses(folder: Path, job: str) -> dict[tuple[str, str], float]:
    name = "vocoder_16000" if job == "vocoder" else job
    with open(folder / f"{name}.csv", newline="") as file:
        return {(row["step"], row["name"]): float(row["value"]) for row in csv.DictReader(file)}


def difference(folder: Path, other: Path, name: str) -> float:
    """The largest between the weights of two files."""
    a, b = weights.read(folder / name), weights.read(other / name)
    assert a.keys() == b.keys()
    return max((a[key].float() - b[key].float()).abs().max().item() for key in a)


# The order of the data


@pytest.mark.parametrize("items, epochs, batch", [(10, 3, 4), (7, 2, 7), (5, 4, 16), (3, 1, 8)])
def test_an_epoch_is_every_item_once(items, epochs, batch):
    plan = Plan(items, Settings(epochs, batch, 1e-3), SimpleNamespace(seed=0))
    taken = [key for step in range(plan.steps) for key in plan.batch(step)]
    assert len(taken) == plan.steps * batch and plan.steps == max(1, items * epochs // batch)
    assert len(set(taken)) == len(taken)
    for epoch, count in Counter(epoch for epoch, _ in taken).items():
        assert count == items or epoch == taken[-1][0]
    assert sum(plan.validates(step) for step in range(1, plan.steps + 1)) <= epochs and plan.validates(plan.steps)


def test_processes_and_parts_share_each_batch(monkeypatch):
    taken = []
    monkeypatch.setattr("train.processes", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr("train.rank", lambda: rank)
        plan = Plan(50, Settings(2, 12, 1e-3), SimpleNamespace(seed=0, accumulate=2))
        parts = list(plan.parts(3))
        assert len(parts) == 2 * (plan.steps - 3) and all(len(part) == 2 for part in parts)
        taken += [key for part in parts[:2] for key in part]
    assert sorted(taken) == sorted(plan.batch(3))


def test_a_vocoder_is_trained_in_float32_as_it_generates(make, monkeypatch):
    job, computed = make("vocoder", "--precision", "bf16"), []
    job.network.conv_pre.register_forward_hook(lambda *_: computed.append(torch.is_autocast_enabled("cpu")))
    job.discriminators.mpd.register_forward_hook(lambda *_: computed.append(torch.is_autocast_enabled("cpu")))
    job.step([torch.stack(job.data.sample())])
    assert computed == [False, True, True, False, True, True]          # the discriminators' step, the generator's


def test_a_vocoder_learns_without_discriminators(start, succeed, tmp_path, monkeypatch):
    monkeypatch.setattr("train.LOG_EVERY", 1)
    settings = replace(train.SETTINGS["tiny"]["vocoder"], discriminators=None, muon=True)
    monkeypatch.setitem(train.SETTINGS["tiny"], "vocoder", settings)
    succeed(*start("vocoder", tmp_path / "run"))
    assert {name for _, name in losses(tmp_path / "run", "vocoder")} == {
        "train_loss", "train_mel", "train_gradient_norm", "val_loss"}
    assert (tmp_path / "run/vocoder_16000.pt").exists() and not (tmp_path / "run/discriminators_16000.pt").exists()


def test_muon_moves_all_directions_alike():
    torch.manual_seed(0)
    wide, tall = (torch.randn(2, rows, n) * torch.linspace(1, 9, n) for rows, n in ((8, 40), (40, 8)))
    for matrices in (wide, tall, torch.ones(3, 7, 1)):
        singular = torch.linalg.svdvals(orthogonal(matrices))
        assert singular.min() > 0.5 and singular.max() < 1.3
        # The nearest orthogonal matrix has the same singular vectors: U V^T, where the matrix is U S V^T.
        u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
        assert F.cosine_similarity(orthogonal(matrices).flatten(), (u @ vh).flatten(), dim=0) > 0.97
    weight, target = torch.nn.Parameter(torch.zeros(6, 4, 3)), torch.randn(6, 4, 3)
    muon = Muon([weight], 0.05)
    for _ in range(200):
        muon.zero_grad()
        (weight - target).square().mean().backward()
        muon.step()
    assert (weight - target).abs().max() < 0.2


def test_a_new_vocoder_hears_more_than_loudness():
    torch.manual_seed(0)
    mels = 0.5 * torch.randn(4000, 64) + 5 * torch.randn(4000, 1) - 6              # loudness has most of the variance
    components = torch.stack([5 * torch.ones(64), torch.tensor([1.0, -1.0] * 32) / 16])       # one deviation of two
    conv = Conv1d(64, 512, 7, padding=3)
    plain = (conv.weight.sum(2) @ components.T).std(0)
    whiten(conv, mels)
    whitened = (conv.weight.sum(2) @ components.T).std(0)
    assert plain[0] > 50 * plain[1] and whitened[0] < 12 * whitened[1]
    silent = conv(mels.mean(0)[None, :, None, None].expand(1, 64, 1, 9))[0, :, 0, 4]
    assert silent.abs().max() < 0.1                                                # it hears differences from the mean


def test_a_new_vae_sees_more_than_loudness():
    torch.manual_seed(0)
    rising = torch.tensor([-1.0, -1.0, 1.0, 1.0]).repeat(16)                       # over the bands of each 4 x 4 patch
    loudness, slope = (F.interpolate(torch.randn(32, 1, 8, 16), scale_factor=4.0)[:, 0] for _ in range(2))
    mels = 5 * loudness + 0.3 * slope * rising + 0.01 * torch.randn(32, 32, 64) - 6

    def heard(vae, change) -> float:
        """How much a change of all mels changes what comes to the encoder's last level."""
        early = torch.nn.Sequential(vae.encoder.conv_in, *vae.encoder.down[:2])
        return (early((mels + change)[:, None]) - early(mels[:, None])).std().item()

    for widths in ((32, 64, 128), (32, 32, 64)):
        vae = VAE(widths, blocks=1, groups=8)
        with torch.no_grad():
            plain = [heard(vae, change) for change in (5, 0.3 * rising)]           # one deviation of each
            whiten_patches(vae, mels)
            whitened = [heard(vae, change) for change in (5, 0.3 * rising)]
        assert plain[0] > 7 * plain[1] and whitened[0] < 6 * whitened[1], (plain, whitened)


# The LDM's data and its loss


class BlindGuess(torch.nn.Module):
    """The best noise for one who knows of z_0 that it is N(0, LATENT_STD^2), and no more."""

    predicts = "eps"

    def condition(self, *_):
        return None, None

    def forward(self, z_t, t, *_):
        guess = gaussian_noise(NoiseSchedule(), 0.0, train.LATENT_STD)
        return torch.stack([guess(z, index) for z, index in zip(z_t, t.tolist())])


@pytest.fixture
def latents(cache, clips):
    """latents(mean, logvar, epochs, scale_factor, **more) -> z_0, eps, t, rate and token ids of the one item in each
    epoch; the ids are [1], or [0] where the caption is emptied."""
    def draw(mean: torch.Tensor, logvar: float, epochs: int, scale_factor: float = 1.0, **more) -> list[tuple]:
        cache.add({b"latent": torch.stack([mean, torch.full_like(mean, logvar)]).numpy()})
        run, texts = SimpleNamespace(seed=0, cache=cache), {"": [0], clips[0].caption: [1]}
        data = train.Latents(run, [(clips[0], 24_000)], [cache.find(b"latent")], texts, scale_factor, **more)
        return list(zip(*(data[epoch, 0] for epoch in range(epochs))))
    return draw


def test_eq_3_takes_any_t_and_a_tenth_of_the_captions_empty(latents):
    z_0, eps, t, rate, text = latents(torch.full((8, 4, 16), 2.0), logvar=-2.0, epochs=2000, scale_factor=0.5)
    counts = np.histogram(t, 10, (0, 1000))[0]
    assert min(t) < 10 and max(t) > 989 and abs(counts - 200).max() < 60                     # 4 deviations are 54
    assert sum(ids.tolist() == [0] for ids in text) / 2000 == pytest.approx(0.1, abs=0.03)
    assert set(rate) == {24_000}
    noise, sampled = torch.stack(eps), 2 * torch.stack(z_0) - 2                   # N(0, 1), N(0, exp(logvar))
    for x, std in ((noise, 1.0), (sampled, math.exp(-1))):
        assert abs(x.mean()) < 0.01 * std and x.std() == pytest.approx(std, rel=0.01)
    assert abs((noise * sampled).mean()) < 0.01                                   # drawn apart


def test_validation_has_its_times_and_all_captions(latents):
    _, _, t, _, text = latents(torch.zeros(8, 4, 16), logvar=-2.0, epochs=100, times=torch.tensor([321]))
    assert set(t) == {321} and all(ids.tolist() == [1] for ids in text)


def test_times_of_validation_are_spread_evenly_at_each_rate(clips):
    items = [(clip, rate) for clip in clips for rate in (16_000, 48_000)]
    times = train.even_times(items, [16_000, 48_000])
    for k in (0, 1):
        assert torch.equal(times[k::2].sort()[0], ((torch.arange(len(clips)) + 0.5) * 1000 / len(clips)).long())
        assert not torch.equal(times[k::2], times[k::2].sort()[0])                # no class has the small ones


def test_a_rolled_latent_is_the_same_sound_begun_elsewhere(latents):
    mean = torch.arange(8 * 12 * 16).view(8, 12, 16) / 1000
    as_it_is, rolled = (latents(mean, logvar=-30.0, epochs=50, rolled=rolled)[0] for rolled in (False, True))
    assert all(torch.allclose(z_0, mean, atol=1e-3) for z_0 in as_it_is)
    begins = [next(i for i in range(12) if torch.allclose(z_0, mean.roll(i, dims=1), atol=1e-3)) for z_0 in rolled]
    assert set(begins) == set(range(12))


def test_a_balanced_loss_is_one_at_every_t_for_a_blind_guess():
    torch.manual_seed(0)
    times = torch.tensor([0, 30, 300, 900, 999])
    z_0, eps = train.LATENT_STD * torch.randn(5, 8, 256, 16), torch.randn(5, 8, 256, 16)
    inputs = z_0, eps, times, torch.full((5,), 16_000), torch.zeros(5, 1, 4), torch.ones(5, 1)
    plain, balanced = (train.Objective(BlindGuess(), None, std)(*inputs) for std in (None, train.LATENT_STD))
    assert torch.allclose(balanced, torch.ones(5), rtol=0.03) and plain[0] > 0.9 and plain[-1] < 1e-3


def test_a_halved_vae_is_trained_on_with_the_same_loss(make, tmp_path, monkeypatch, checkpoint):
    """float16 rounds the latent's scale."""
    halved, settings = shutil.copytree(checkpoint, tmp_path / "halved"), train.SETTINGS["tiny"]
    vae = dict(weights.read(checkpoint / "vae.pt"))
    weights.save(vae | {"scale_factor": torch.tensor(train.LATENT_STD).half()}, halved / "vae.pt")
    monkeypatch.setitem(train.SETTINGS, "tiny", settings | {"ldm": replace(settings["ldm"], balanced=True)})
    assert make("ldm", base=halved).network.std == train.LATENT_STD


def test_a_tokenizer_learns_from_more_captions_than_are_trained_on(start, succeed, refuse, tmp_path, checkpoint):
    folder = shutil.copytree(checkpoint, tmp_path / "start")
    (folder / "text_encoder.pt").unlink()
    (tmp_path / "more.csv").write_text("path,caption\na.wav," + 500 * "zithers jingle " + "\n")
    succeed(*start("ldm", tmp_path / "run", "--epochs", 1, "--tokenizer-captions", tmp_path / "more.csv", base=folder))
    tokenizer = SRCgAudio.load_text_encoder(tmp_path / "run").tokenizer
    assert tokenizer.unk_id() not in tokenizer.encode("zithers jingle")
    assert tokenizer.encode("Zithers JINGLE") == tokenizer.encode("zithers jingle")
    more = ["--tokenizer-captions", tmp_path / "more.csv", "--overwrite"]
    refuse(start("ldm", tmp_path / "run", *more, base=folder), "--tokenizer-captions", str(tmp_path / "run"))


def test_a_stopped_run_goes_on_from_another_folder_not_from_another_start(start, stop, succeed, refuse, tmp_path,
                                                                          checkpoint):
    arguments = start("vae", tmp_path / "run")
    stop(*arguments)
    another = shutil.copytree(checkpoint, tmp_path / "another")
    refuse(start("vae", tmp_path / "run", base=another), "vae_state.pt", "the start")
    recordings = shutil.copytree(CAPTIONS.parent, tmp_path / "moved")
    with open(few_clips(tmp_path), newline="") as file:
        rows = [f"{recordings / Path(row['path']).name},{row['caption']}" for row in csv.DictReader(file)]
    (tmp_path / "moved.csv").write_text("\n".join(["path,caption", *rows]))
    assert "vae goes on from step" in succeed(*start("vae", tmp_path / "run", data=tmp_path / "moved.csv"))


def test_tokens_of_other_captions_are_not_gone_on_with(start, stop, succeed, refuse, tmp_path, checkpoint):
    """A text encoder trained along has learnt what each token stands for."""
    folder = shutil.copytree(checkpoint, tmp_path / "start")
    (folder / "text_encoder.pt").unlink()
    (tmp_path / "more.csv").write_text("path,caption\n" + "a.wav,zithers jingle\n" * 9)
    arguments = start("ldm", tmp_path / "run", "--train-text-encoder", base=folder)
    stop(*arguments)
    refuse([*arguments, "--tokenizer-captions", tmp_path / "more.csv"], "ldm_state.pt", "the text encoder")
    succeed(*arguments)


# What is learnt and kept


class FakeJob:
    """A job of one weight, whose validation losses are 3, 1, 2, 1, 0.5 and 4."""

    identity = {}

    def __init__(self, run, settings):
        self.network = torch.nn.Linear(1, 1)
        self.ema, self.optimizer = train.Ema(self.network), torch.optim.SGD(self.network.parameters(), 1.0)
        self.kept = {"network": self.network, "ema": self.ema.network, "optimizer": self.optimizer}
        self.data = train.Crops(run, run.items(run.train), replace(settings, frames=4))
        self.losses, self.judged, self.saved, self.rates = [3.0, 1.0, 2.0, 1.0, 0.5, 4.0], 0, [], []

    def step(self, _parts):
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        return {"loss": torch.tensor(1.0)}

    def validate(self):
        self.judged += 1
        return {"loss": self.losses[self.judged - 1]}

    def save(self):
        self.saved.append(self.judged)


def test_the_weights_of_the_best_validation_are_kept_and_the_rate_falls_linearly(start, succeed, tmp_path, monkeypatch):
    """Section III-B, and Tango's training."""
    jobs, settings = [], train.SETTINGS["tiny"]
    monkeypatch.setitem(train.SETTINGS, "tiny", settings | {"ldm": replace(settings["ldm"], validate_every=1)})
    monkeypatch.setattr("train.TrainLDM", lambda *arguments: jobs.append(FakeJob(*arguments)) or jobs[0])
    succeed(*start("ldm", tmp_path / "run", "--epochs", 6, "--lr", 0.5))                     # 4 clips, a batch each
    job, = jobs
    assert job.saved == [1, 2, 5] and job.judged == 6
    assert job.rates == pytest.approx([0.5 * (1 - step / 6) for step in range(6)])


@pytest.mark.parametrize("job, file", JOBS.items())
def test_what_is_validated_and_saved_is_the_moving_average(make, tmp_path, job, file):
    training = make(job)
    with torch.no_grad():
        for parameter in training.network.parameters():
            parameter.fill_(math.nan)
        assert math.isfinite(training.validate()["loss"])
        training.save()
    assert all(tensor.isfinite().all() for tensor in weights.read(tmp_path / "run" / file).values())


def test_the_moving_average_is_one_of_the_weights_that_take_effect():
    network, expected = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 2)), torch.zeros(2, 3)
    ema = train.Ema(torch.nn.Linear(3, 2))               # as the vocoders', made before the weight norm
    ema.network.weight.zero_()
    for step in range(40):
        torch.nn.init.normal_(network.parametrizations.weight.original1)
        ema.update(network, step)
        decay = min(train.EMA_DECAY, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * network.weight.detach()
    assert torch.allclose(ema.network.weight, expected, atol=1e-5)


def test_a_gradient_is_no_longer_than_its_limit():
    network, target = torch.nn.Linear(2, 1, bias=False), torch.tensor([[300.0, -400.0]])
    before = network.weight.detach().clone()
    sgd = torch.optim.SGD(network.parameters(), 1.0)
    losses = train.descend(network, sgd, [1.0, 3.0], lambda part: {"loss": part * (network.weight * target).sum()})
    assert losses["gradient_norm"] == pytest.approx(1000)                         # that of the mean over both parts
    assert torch.allclose(network.weight, before - train.CLIP_NORM * target / 500, atol=1e-4)


def test_each_channel_of_a_trained_vaes_latents_has_the_deviation_1_before_the_scale(make, tmp_path):
    training = make("vae")
    waves = torch.stack([clip.read(rate, 0, PRESETS["tiny"].seconds) for clip, rate in training.data.items])
    training.save()
    vae = SRCgAudio.load_vae(tmp_path / "run")
    with torch.no_grad():
        z, _ = vae.encode(train.mel_spectrogram(waves, 16_000))                              # of all that is trained on
    assert z.mean((0, 2, 3)).abs().max() < 1e-3 and (z.std((0, 2, 3)) - 1).abs().max() < 1e-3
    assert vae.scale_factor.item() == pytest.approx(train.LATENT_STD)


# Stopped and started again


@pytest.mark.parametrize("job", JOBS)
def test_a_stopped_run_goes_on_as_if_it_had_not(start, command, succeed, tmp_path, monkeypatch, job):
    succeed(*start(job, tmp_path / "alone"))
    update, calls = train.Ema.update, []

    def stop_at_the_fifth_step(ema, network, step):
        calls.append(step)
        if len(calls) == 5:
            raise KeyboardInterrupt
        update(ema, network, step)

    monkeypatch.setattr("train.Ema.update", stop_at_the_fifth_step)
    assert command(*start(job, tmp_path / "stopped", "--save-minutes", 0))[0] == 130
    monkeypatch.undo()
    assert "goes on from step 4" in succeed(*start(job, tmp_path / "stopped"))
    assert difference(tmp_path / "alone", tmp_path / "stopped", JOBS[job]) == 0
    assert losses(tmp_path / "alone", job) == losses(tmp_path / "stopped", job)


def test_a_run_that_is_done_is_not_done_again(start, succeed, refuse, tmp_path):
    succeed(*start("vae", tmp_path / "run"))
    before = (tmp_path / "run" / "vae.pt").read_bytes()
    printed = succeed(*start("vae", tmp_path / "run"))
    assert "trained already" in printed and (tmp_path / "run" / "vae.pt").read_bytes() == before
    refuse(start("vae", tmp_path / "run", "--lr", 1e-3), "vae_state.pt", "values of: --lr;", "--overwrite")
    (tmp_path / "run" / "vae.pt").unlink()               # it would not be written again
    refuse(start("vae", tmp_path / "run"), "vae.pt is gone", "--overwrite")
    succeed(*start("vae", tmp_path / "run", "--overwrite", "--lr", 1e-3))
    assert (tmp_path / "run" / "vae.pt").read_bytes() != before


def test_a_stopped_run_that_overwrites_goes_on(start, command, succeed, tmp_path, monkeypatch):
    """Its later jobs' old weights do not stand in the way, nor do they stay beside a VAE that they do not know; a
    scheduler's second SIGTERM does not end it early."""
    folder = tmp_path / "run"
    jobs = start("vae ldm", folder, "--epochs", 4)
    succeed(*jobs)
    old = weights.read(folder / "unet.pt")
    monkeypatch.setattr("train.Ema.update", lambda *_: [signal.raise_signal(signal.SIGTERM) for _ in range(2)])
    status, out, err = command(*jobs, "--seed", 1, "--overwrite")
    assert status == 130 and "vae stopped after step 2" in out + err and (folder / "unet.pt").exists()
    monkeypatch.undo()
    with monkeypatch.context() as stopping:
        stopping.setattr("train.TrainLDM.__init__", lambda *_: signal.raise_signal(signal.SIGINT))
        status, out, err = command(*jobs, "--seed", 1)
        assert status == 130 and "vae goes on from step 2" in out + err and not (folder / "unet.pt").exists()
    succeed(*jobs, "--seed", 1)
    assert any((weights.read(folder / "unet.pt")[name] != tensor).any() for name, tensor in old.items())
    printed = succeed(*jobs, "--seed", 2, "--start-from", folder, "--overwrite")
    assert f"starting from {folder / 'unet.pt'}" in printed     # in other latents, but asked for


def test_a_refused_run_changes_nothing(start, succeed, refuse, tmp_path, checkpoint):
    """Neither the run that was stopped, nor the folder of another preset."""
    run = tmp_path / "run"
    succeed(*start("ldm", run, "--epochs", 1))
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    config = SRCgAudio.load_config(run)
    SRCgAudio.save_config(replace(config, seconds=1.28), run)
    refuse(start("ldm", run, "--epochs", 1), "ldm_state.pt", "the sizes")
    SRCgAudio.save_config(config, run)
    SRCgAudio.save_config(replace(SRCgAudio.load_config(checkpoint), preset="small"), tmp_path / "small")
    refuse(start("ldm", run, "--epochs", 1, "--overwrite", base=tmp_path / "small"), "'small'", "'tiny'")
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_a_vocoder_does_not_depend_on_the_other_rates_of_a_run(succeed, tmp_path):
    arguments = ["train.py", "vocoder", "--data", few_clips(tmp_path), "--preset", "tiny", "--epochs", 1,
                 "--workers", 0, "--checkpoint", tmp_path / "run", "--rates", 16_000]
    succeed(*arguments)
    assert "vocoder_16000 is trained already" in succeed(*arguments, 24_000)
    assert (tmp_path / "run" / "vocoder_24000_state.pt").exists()


@pytest.mark.parametrize("harm", ["truncated", "another program's"])
def test_a_damaged_state_is_named(start, refuse, tmp_path, harm):
    (tmp_path / "run").mkdir()
    if harm == "truncated":
        (tmp_path / "run" / "vae_state.pt").write_bytes(b"PK\x03\x04 and no more")
    else:
        torch.save({"step": 3}, tmp_path / "run" / "vae_state.pt")
    refuse(start("vae", tmp_path / "run"), "vae_state.pt", "damaged", "--overwrite")


def test_a_state_that_can_not_be_read_is_not_called_damaged(start, refuse, tmp_path, monkeypatch):
    read = weights.read_pytorch

    def deny(path):
        if path.name == "vae_state.pt":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path)

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "vae_state.pt").write_text("precious")
    monkeypatch.setattr("weights.read_pytorch", deny)
    err = refuse(start("vae", tmp_path / "run"), "cannot read", "vae_state.pt: Permission denied")
    assert "--overwrite" not in err
    with pytest.raises(OSError, match="cannot read .*vae_state.pt: Permission denied"):
        weights.read(tmp_path / "run" / "vae_state.pt")


def test_ctrl_c_while_a_job_is_last_validated_ends_the_run(start, command, succeed, tmp_path, monkeypatch):
    jobs = start("vae ldm", tmp_path / "run")
    validate = train.TrainVAE.validate
    with monkeypatch.context() as stopping:
        stopping.setattr("train.TrainVAE.validate", lambda job: signal.raise_signal(signal.SIGINT) or validate(job))
        status, out, err = command(*jobs, "--epochs", 1)
    assert status == 130 and "vae is trained; the same command goes on" in out + err
    assert not (tmp_path / "run" / "ldm_state.pt").exists()
    printed = succeed(*jobs, "--epochs", 1)
    assert "vae is trained already" in printed and (tmp_path / "run" / "unet.pt").exists()


def test_a_full_disk_keeps_the_last_state(start, stop, succeed, tmp_path):
    printed = stop(*start("vae", tmp_path / "run"))
    assert "stopped after step 2; the same command, without --overwrite, goes on" in printed
    state = tmp_path / "run" / "vae_state.pt"
    before = state.read_bytes()
    limit = len(before) // 2
    result = subprocess.run([sys.executable, *map(str, start("vae", tmp_path / "run"))], cwd=ROOT, capture_output=True,
                            text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert result.returncode == 2 and "error: " in result.stderr and "vae_state.pt" in result.stderr.splitlines()[-1]
    assert state.read_bytes() == before and not (tmp_path / "run" / "vae_state.pt.new").exists()
    succeed(*start("vae", tmp_path / "run"))


@pytest.mark.parametrize("job", ["vae", "ldm"])         # in a step, and while latents are made
def test_a_recording_that_vanishes_is_named(start, command, tmp_path, monkeypatch, job):
    clips = few_clips(tmp_path)
    for line in clips.read_text().splitlines()[1:]:
        shutil.copy(line.split(",")[0], tmp_path)
    clips.write_text(clips.read_text().replace(str(CAPTIONS.parent), str(tmp_path)))
    monkeypatch.setattr("train.report", lambda *_: [path.unlink() for path in tmp_path.rglob("*.ogg")])
    status, _, err = command(*start(job, tmp_path / "run", "--workers", 1, data=clips))
    assert status == 2 and "Traceback" not in err and err.splitlines()[-1].endswith(".ogg: no such audio file")
    assert not multiprocessing.active_children()         # or the command would wait for them at its end


@pytest.mark.parametrize("job", JOBS)
def test_a_loss_that_is_not_finite_stops_the_run(start, command, tmp_path, monkeypatch, job):
    loss = {"vae": "vae_loss", "vocoder": "generator_loss", "ldm": "diffusion_loss"}[job]
    right, calls = getattr(train, loss), []

    def break_at_the_third_step(*arguments):
        calls.append(0)
        value = right(*arguments)
        if len(calls) < 3:
            return value
        return {name: loss * torch.nan for name, loss in value.items()} if job == "vae" else value * torch.nan

    monkeypatch.setattr(f"train.{loss}", break_at_the_third_step)
    status, _, err = command(*start(job, tmp_path / "run", "--save-minutes", 0))
    assert status == 2 and "step 2: loss is nan" in err and len(re.findall(r"\.ogg", err.splitlines()[-1])) == 4
    state = torch.load(next((tmp_path / "run").glob("*_state.pt")), weights_only=True)
    assert state["step"] == 2 and all(tensor.isfinite().all() for tensor in state["kept"]["network"].values())


# A batch in parts, over processes, and with less memory

# At full speed Adam and a GAN amplify rounding.
SLOWER = {"vae": ["--batch", 16, "--epochs", 6, "--lr", 1e-5], "vocoder": ["--epochs", 3, "--lr", 1e-5], "ldm": []}


def same_losses(folder: Path, other: Path, job: str) -> None:
    a, b = losses(folder, job), losses(other, job)
    assert a.keys() == b.keys() and any(name == "train_loss" for _, name in a)
    for key, value in a.items():
        tolerance = 1e-3 if job == "vocoder" or "gradient_norm" in key[1] else 1e-5
        assert b[key] == pytest.approx(value, rel=tolerance, abs=2e-6), key


@pytest.mark.parametrize("job", JOBS)
def test_parts_change_only_rounding(start, succeed, tmp_path, job):
    more = ["--activation-checkpointing"] if job == "ldm" else []
    succeed(*start(job, tmp_path / "whole", *SLOWER[job]))
    succeed(*start(job, tmp_path / "parts", *SLOWER[job], "--accumulate", 2, *more))
    same_losses(tmp_path / "whole", tmp_path / "parts", job)


@pytest.mark.parametrize("job", JOBS)
def test_two_processes_train_as_one_does(start, succeed, tmp_path, job):
    succeed(*start(job, tmp_path / "one", *SLOWER[job]))
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
         *map(str, start(job, tmp_path / "two", *SLOWER[job], "--device", "cpu"))],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    assert (result.stdout + result.stderr).count("the checkpoint is") == 1
    same_losses(tmp_path / "one", tmp_path / "two", job)


# Frozen work done once


def fail(*_):
    raise AssertionError("what the cache has was computed again")


def test_latents_and_texts_are_computed_once(start, succeed, tmp_path, monkeypatch):
    cache = ["--cache", tmp_path / "cache"]
    succeed(*start("ldm", tmp_path / "one", *cache))
    monkeypatch.setattr("train.TrainLDM.encode_mel", fail)
    monkeypatch.setattr("train.TrainLDM.encode_caption", fail)
    succeed(*start("ldm", tmp_path / "two", *cache))
    assert difference(tmp_path / "one", tmp_path / "two", "unet.pt") == 0


def test_the_cache_is_what_the_networks_compute(make, checkpoint):
    data, model = make("ldm").data, SRCgAudio.load(checkpoint, [16_000])
    for i, (clip, rate) in enumerate(data.items):
        moments = train.read_array(data.arrays, data.places[i])
        mel = train.mel_spectrogram(clip.read(rate, 0, model.config.seconds)[None], rate)
        with torch.no_grad():
            expected = torch.cat(model.vae.encode(mel)).flatten()
            psi = model.text_encoder.encode([clip.caption])[0][0]
        assert (moments - expected).abs().max() < 1e-3 * expected.abs().max()
        *place, width = data.texts[clip.caption]
        kept = train.read_array(data.arrays, place).view(-1, width)
        assert (kept - psi).abs().max() < 2e-3 * psi.abs().max()


def test_a_recording_is_one_item_however_many_captions_it_has_except_to_the_ldm(start, succeed, tmp_path, monkeypatch):
    counts = {}
    monkeypatch.setattr("train.fit", lambda name, make_job, run: counts.update(
        {name: len(make_job(run, run.settings[train.job_of(name)]).data.items)}))
    clips = few_clips(tmp_path)
    clips.write_text(clips.read_text() + "\n".join(
        line.split(",")[0] + ",another caption" for line in clips.read_text().splitlines()[1:]))
    for jobs in ("vae vocoder", "ldm"):
        succeed(*start(jobs, tmp_path / "run", "--val-data", clips, data=clips))
    assert counts == {"vae": 5, "vocoder_16000": 5, "ldm": 10}


def test_another_vae_or_recording_is_another_entry(start, succeed, tmp_path, monkeypatch):
    encode, encoded = train.TrainLDM.encode_mel, []
    monkeypatch.setattr("train.TrainLDM.encode_mel", lambda *arguments: encoded.append(1) or encode(*arguments))

    def train_ldm(**more) -> int:
        encoded.clear()
        succeed(*start("ldm", tmp_path / "run", "--epochs", 1, "--overwrite", **more))
        return len(encoded)

    assert train_ldm() == 5 and train_ldm() == 0
    vae = dict(weights.read(tmp_path / "run" / "vae.pt"))
    weights.save(vae | {"quant_conv.bias": vae["quant_conv.bias"] + 1}, tmp_path / "run" / "vae.pt")
    assert train_ldm() == 5
    clips = few_clips(tmp_path)
    path = clips.read_text().splitlines()[1].split(",")[0]
    shutil.copy(path, tmp_path / "copy.ogg")
    clips.write_text(clips.read_text().replace(path, "copy.ogg"))
    assert train_ldm(data=clips) == 1


def test_a_text_encoder_trained_along_keeps_its_text_out_of_the_cache(start, succeed, tmp_path, monkeypatch):
    monkeypatch.setattr("train.TrainLDM.encode_caption", fail)
    succeed(*start("ldm", tmp_path / "run", "--train-text-encoder"))


def test_a_text_encoder_trained_along_may_be_stopped_before_its_first_state(start, command, succeed, tmp_path,
                                                                            monkeypatch):
    """The start's is no copy of what the run writes, which would be refused the next time."""
    arguments = start("ldm", tmp_path / "run", "--train-text-encoder")
    with monkeypatch.context() as stopping:
        stopping.setattr("train.TrainLDM.find_or_compute", lambda *_: signal.raise_signal(signal.SIGINT))
        assert command(*arguments)[0] == 130
    succeed(*arguments)


# The paper's regimes


def test_gaudio_is_not_told_its_rate(start, succeed, refuse, tmp_path, checkpoint):
    """II-C and III-D."""
    (tmp_path / "run").mkdir()
    for name in ("config.json", "vae.pt", "vocoder_16000.pt", "vocoder_24000.pt"):
        shutil.copy(checkpoint / name, tmp_path / "run")
    succeed(*start("ldm", tmp_path / "run", "--no-rate-token", base=None))
    names = weights.read(tmp_path / "run" / "unet.pt").keys()
    assert "time_token.weight" in names and "rate_token.weight" not in names
    assert SRCgAudio.load_unet(tmp_path / "run").rate_token is None
    config = SRCgAudio.load_config(tmp_path / "run")                     # nor is Tango's network told the time
    tango = UNet(**config.unet | {"tokens": []})
    weights.save(tango.state_dict(), tmp_path / "run" / "unet.pt")
    SRCgAudio.save_config(replace(config, unet=config.unet | {"tokens": []}), tmp_path / "run")
    succeed(*start("ldm", tmp_path / "more", "--no-rate-token", base=tmp_path / "run"))
    assert SRCgAudio.load_unet(tmp_path / "more").time_token is None
    assert [path.name for path in (tmp_path / "more").glob("vocoder_*.pt")] == ["vocoder_16000.pt"]
    refuse(start("ldm", tmp_path / "run", "--rates", 16_000, 24_000, "--overwrite", base=None), "not told the rate",
           "--rates")


def test_a_flan_t5_is_not_trained(start, refuse, tmp_path, checkpoint):
    shutil.copytree(checkpoint, tmp_path / "base")
    SRCgAudio.save_config(replace(SRCgAudio.load_config(checkpoint), text_encoder="flan-t5-large"), tmp_path / "base")
    refuse(start("ldm", tmp_path / "run", "--train-text-encoder", base=tmp_path / "base"), "--train-text-encoder",
           "FLAN-T5")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("jobs, changes, words", [
    ("vae", {"seconds": 2.5}, ["seconds must be a multiple of 0.04"]),
    ("vae ldm", {"seconds": 2.4}, ["seconds must be a multiple of 0.32"]),
    ("vae", {"vae": {"widths": [32, 64]}}, ["do not fit VAE"]),
    ("vae ldm", {"unet": {"widths": [32, 64], "height": 3}}, ["do not fit UNet", "height"]),
])
def test_sizes_that_can_not_be_are_named_before_anything_is_trained(start, refuse, tmp_path, checkpoint, jobs, changes,
                                                                    words):
    shutil.copytree(checkpoint, tmp_path / "odd")
    SRCgAudio.save_config(replace(SRCgAudio.load_config(checkpoint), **changes), tmp_path / "odd")
    refuse(start(jobs, tmp_path / "run", base=tmp_path / "odd"), *words)
    assert not (tmp_path / "run").exists()


def test_test_clips_are_left_out_of_the_training_alone(start, succeed, tmp_path):
    """WavCaps' blacklists hold AudioCaps' validation clips too."""
    for name in ("train", "val"):
        entries = [{"id": path.name, "caption": "a sound"} for path in sorted((HERE / "data").glob("*_4-*.ogg"))]
        (tmp_path / f"{name}.json").write_text(json.dumps({"data": entries}))
    blacklist = tmp_path / "blacklist.json"
    blacklist.write_text(json.dumps({"AudioSet": [entry["id"] for entry in entries[1:]]}))
    printed = succeed(*start("vae", tmp_path / "run", "--data", tmp_path / "train.json", HERE / "data", "--val-data",
                             tmp_path / "val.json", HERE / "data", "--blacklist", blacklist))
    assert f"validate on: {len(entries)} clips" in printed
    assert f"left out: {len(entries) - 1}; {len(entries) - 1} on a blacklist" in printed


def test_a_start_without_a_unet_gives_the_rest(start, succeed, tmp_path, checkpoint):
    (tmp_path / "base").mkdir()
    for path in checkpoint.iterdir():
        if path.name != "unet.pt":
            (tmp_path / "base" / path.name).write_bytes(path.read_bytes())
    succeed(*start("ldm", tmp_path / "run", base=tmp_path / "base"))
    assert difference(checkpoint, tmp_path / "run", "text_encoder.pt") == 0


def test_the_text_encoder_of_the_folder_stays(start, succeed, tmp_path, checkpoint):
    shutil.copytree(checkpoint, tmp_path / "run")
    (tmp_path / "run" / "unet.pt").unlink()
    succeed(*start("ldm", tmp_path / "run", "--seed", 1, base=None))   # a new one would not be that of seed 0
    assert difference(checkpoint, tmp_path / "run", "text_encoder.pt") == 0


def test_a_vocoder_without_another_starts_anew(start, succeed, tmp_path, checkpoint):
    shutil.copytree(checkpoint, tmp_path / "base", ignore=shutil.ignore_patterns("vocoder_*"))
    succeed(*start("vocoder", tmp_path / "run", base=tmp_path / "base"))
    assert (tmp_path / "run" / "vocoder_16000.pt").is_file()


def test_a_new_vae_takes_no_unet_of_another(start, succeed, tmp_path):
    succeed(*start("vae", tmp_path / "run"))
    assert not (tmp_path / "run" / "unet.pt").exists()


def test_a_vae_does_not_change_under_a_unet(start, command, succeed, refuse, tmp_path, monkeypatch):
    """Neither when it goes on after an LDM was trained beside it, nor when it is gone and trained anew."""
    run = tmp_path / "run"
    vae, both = start("vae", run), start("vae ldm", run, "--epochs", 1)
    with monkeypatch.context() as stopping:
        stopping.setattr("train.Ema.update", lambda _, network, step: step == 3 and signal.raise_signal(signal.SIGINT))
        assert command(*vae)[0] == 130
    weights.save(untrained(seed=1).vae.state_dict(), run / "vae.pt")   # as a validation would have left it
    succeed(*start("ldm", run, "--epochs", 1))
    before = (run / "vae.pt").read_bytes()
    refuse(vae, "unet.pt knows the latents", "vae ldm --overwrite")
    assert (run / "vae.pt").read_bytes() == before
    (run / "vae.pt").unlink()
    (run / "vae_state.pt").unlink()
    refuse(both, "unet.pt knows the latents", "vae ldm --overwrite")
    succeed(*both, "--overwrite")


def test_a_unet_of_other_tokens_is_not_copied(start, succeed, tmp_path, checkpoint):
    config = SRCgAudio.load_config(checkpoint)
    SRCgAudio.save_config(replace(config, unet=config.unet | {"tokens": ["time"]}), tmp_path / "run")
    succeed(*start("vocoder", tmp_path / "run", "--epochs", 1))
    assert (tmp_path / "run" / "vae.pt").exists() and not (tmp_path / "run" / "unet.pt").exists()


def test_more_characters_than_tokens_are_named(start, refuse, tmp_path, checkpoint):
    clips, many = few_clips(tmp_path), "".join(map(chr, range(0x4E00, 0x4E00 + 300)))
    paths = [line.split(",")[0] for line in clips.read_text().splitlines()[1:]]
    clips.write_text("\n".join(["path,caption", *(f"{path},{many}" for path in paths)]), encoding="utf-8")
    shutil.copytree(checkpoint, tmp_path / "base", ignore=shutil.ignore_patterns("text_encoder.pt"))
    refuse(start("ldm", tmp_path / "run", data=clips, base=tmp_path / "base"), "128 tokens", "kinds of characters",
           "--flan-t5")
    assert not (tmp_path / "run").exists()


def test_a_decoder_trained_alone_leaves_the_latents(start, succeed, tmp_path, checkpoint):
    succeed(*start("vae", tmp_path / "run", "--decoder-only"))
    before, after = (weights.read(folder / "vae.pt") for folder in (checkpoint, tmp_path / "run"))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}
    for name in ("vae.pt", "vae_state.pt"):              # a run stopped early has unet.pt already, and no vae.pt
        (tmp_path / "run" / name).unlink()
    succeed(*start("vae", tmp_path / "run", "--decoder-only"))


def test_a_decoder_of_other_latents_replaces_none(start, refuse, tmp_path, checkpoint):
    folder = shutil.copytree(checkpoint, tmp_path / "other")
    vae = dict(weights.read(folder / "vae.pt"))
    weights.save(vae | {"quant_conv.bias": vae["quant_conv.bias"] + 1}, folder / "vae.pt")
    refuse(start("vae", folder, "--decoder-only", "--overwrite"), "unet.pt knows the latents", f"--start-from {folder}")


def test_a_unet_is_not_copied_beside_a_vae_of_other_latents(start, succeed, tmp_path, checkpoint):
    vae = dict(weights.read(checkpoint / "vae.pt"))
    for folder, moved in (("same", 0), ("other", 1)):
        SRCgAudio.save_config(SRCgAudio.load_config(checkpoint), tmp_path / folder)
        weights.save(vae | {"quant_conv.bias": vae["quant_conv.bias"] + moved}, tmp_path / folder / "vae.pt")
        succeed(*start("vocoder", tmp_path / folder, "--epochs", 1))
        assert (tmp_path / folder / "unet.pt").exists() == (folder == "same")
    printed = succeed(*start("ldm", tmp_path / "other", "--epochs", 1))            # but it may be the start
    assert "unet.pt, the start, has learnt in the latents of another VAE" in printed


def test_a_start_that_does_not_fit_is_named_before_the_first_step(start, refuse, tmp_path):
    refuse(start("vae ldm", tmp_path / "run", "--no-rate-token"), "unet.pt: unknown tensor rate_token",
           "training starts without it")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("job, file", [("vae", "vae.pt"), ("vocoder", "vocoder_48000.pt"),
                                       ("vocoder", "discriminators_16000.pt")])
def test_a_damaged_start_leaves_the_state_of_a_stopped_run(start, refuse, tmp_path, checkpoint, job, file):
    name = {"vocoder": "vocoder_16000"}.get(job, job)
    base, state = shutil.copytree(checkpoint, tmp_path / "base"), tmp_path / "run" / f"{name}_state.pt"
    weights.save({"another": torch.zeros(1)}, base / file)
    SRCgAudio.save_config(SRCgAudio.load_config(checkpoint), tmp_path / "run")
    state.write_bytes(b"a state")
    refuse(start(job, tmp_path / "run", "--overwrite", base=base), f"base/{file}")
    assert state.read_bytes() == b"a state"


def test_a_file_of_the_user_named_like_a_log_is_kept(start, refuse, tmp_path, checkpoint):
    run = shutil.copytree(checkpoint, tmp_path / "run")
    captions = Path(shutil.copy(few_clips(tmp_path), run / "ldm.csv"))
    before = captions.read_bytes()
    refuse(start("ldm", run, "--overwrite"), "ldm.csv is no log")
    assert captions.read_bytes() == before


def test_a_unet_keeps_the_config_that_it_was_trained_with(start, refuse, tmp_path, checkpoint):
    run = shutil.copytree(checkpoint, tmp_path / "run")
    base = shutil.copytree(checkpoint, tmp_path / "base")
    (base / "unet.pt").unlink()
    refuse(start("ldm", run, "--no-rate-token", "--overwrite", base=base),
           "unet.pt was not trained with this", "--no-rate-token")
    SRCgAudio.load(run)


@pytest.mark.parametrize("change, parts", [
    ({"layer": 2}, ["TextEncoder", "layer"]), ({"width": 32}, ["width is 32", "context_width 64"])])
def test_a_text_encoder_that_does_not_fit_is_named_before_the_first_step(refuse, tmp_path, change, parts):
    config = PRESETS["tiny"]
    SRCgAudio.save_config(replace(config, text_encoder=config.text_encoder | change), tmp_path / "run")
    refuse(["train.py", "vae", "ldm", "--data", few_clips(tmp_path), "--checkpoint", tmp_path / "run"],
           "config.json", *parts)
    assert not (tmp_path / "run/vae_state.pt").exists()


def test_a_start_whose_text_encoder_has_other_sizes_is_named_before_the_first_step(start, refuse, tmp_path, checkpoint):
    config = SRCgAudio.load_config(checkpoint)
    SRCgAudio.save_config(replace(config, text_encoder=config.text_encoder | {"vocabulary": 150}), tmp_path / "run")
    shutil.copy(checkpoint / "vae.pt", tmp_path / "run")
    refuse(start("ldm", tmp_path / "run"), "text_encoder.pt: tensor embedding.weight has shape (128, 64)", "(150, 64)")


def test_a_job_goes_on_though_what_others_depend_on_has_changed(start, stop, succeed, tmp_path):
    stop(*start("vocoder", tmp_path / "run"))
    config = SRCgAudio.load_config(tmp_path / "run")
    other = replace(config, guidance=2.0, unet=config.unet | {"tokens": ["time"]})
    SRCgAudio.save_config(other, tmp_path / "run")
    assert "vocoder_16000 goes on from step 2" in succeed(*start("vocoder", tmp_path / "run"))


def test_jobs_hold_out_the_same_recordings(tmp_path, clips):
    """Whether some have no caption or not, so that the VAE does not learn from what the LDM is validated on."""
    held_out = []
    for captions in (lambda i: "a dog", lambda i: "a dog" if i else ""):
        lines = [f"{clip.path},{captions(i)}" for i, clip in enumerate(clips)]
        (tmp_path / "clips.csv").write_text("\n".join(["path,caption", *lines]))
        args = SimpleNamespace(data=[[tmp_path / "clips.csv"]], val_data=None, blacklist=[], jobs=["ldm"],
                               rates=[16_000], any_rate=False)
        train_clips, val, _ = train.find_data(args, Cache(tmp_path / "cache"))
        held_out.append({clip.path for clip in val})
        assert not held_out[-1] & {clip.path for clip in train_clips}
    a, b = held_out
    assert len(a) == 2 and len(b) == 1 and b <= a        # a tenth of 20 and of 19


def test_recordings_of_one_name_are_not_held_out_together(tmp_path, clips):
    lines = ["path,caption"]
    for i, clip in enumerate(clips):                     # ten students hand in two recordings each
        path = tmp_path / f"student{i // 2}" / ("dog.ogg", "rain.ogg")[i % 2]
        path.parent.mkdir(exist_ok=True)
        shutil.copy(clip.path, path)
        again = path.parent / ".." / path.parent.name / path.name                # the same file, spelled otherwise
        lines += [f"{path},one", f"{again},the same"]
    (tmp_path / "clips.csv").write_text("\n".join(lines))
    args = SimpleNamespace(data=[[tmp_path / "clips.csv"]], val_data=None, blacklist=[], jobs=["ldm"], rates=[16_000],
                           any_rate=False)
    train_clips, val, _ = train.find_data(args, Cache(tmp_path / "cache"))
    assert len(val) == 4 and len(train_clips) == 36 and len({clip.path.resolve() for clip in val}) == 2
    assert not {clip.path.resolve() for clip in val} & {clip.path.resolve() for clip in train_clips}


def test_clips_below_all_rates_are_named(start, succeed, tmp_path):
    soundfile.write(tmp_path / "low.wav", np.random.default_rng(0).uniform(-0.5, 0.5, 8000), 8000)
    for more, left_out, clips in ([], 1, 4), (["--any-rate"], 0, 5):
        arguments = start("vocoder", tmp_path / f"run{left_out}", *more, "--epochs", 1)
        with open(tmp_path / "clips.csv", "a") as file:
            file.write("low.wav,a hum\n")
        printed = succeed(*arguments)
        assert f"to train on: {clips} clips" in printed and f"left out: {left_out}" in printed
        assert ("low.wav: its 8000 Hz reach none of the rates" in printed) == bool(left_out)


def test_a_clip_stays_for_the_lowest_rate_alone(cache, tmp_path):
    for rate in (8000, 16_000, 48_000):
        soundfile.write(tmp_path / f"{rate}.wav", np.random.default_rng(0).uniform(-0.5, 0.5, rate), rate)
    arguments = SimpleNamespace(jobs=["vae"], rates=[16_000, 48_000], any_rate=False)
    clips, (line,) = train.find_reaching([[tmp_path]], arguments, cache)
    assert [clip.rate for clip in clips] == [16_000, 48_000] and "8000.wav: its 8000 Hz reach none" in line


def test_a_log_is_cut_back_to_where_the_state_was_saved(tmp_path):
    path = tmp_path / "vae.csv"
    for kept, value in (0, 2), (100, 4), (len(train.LOG_HEADER), 3):
        with train.open_log(path, kept) as file:
            file.write(f"1,train_loss,{value}\n")
    assert path.read_text() == train.LOG_HEADER + "1,train_loss,3\n"


@pytest.mark.parametrize("recordings", [1, 65, 238, 1000])
def test_some_items_are_of_all_rates(recordings):
    drawn = train.sample_items(4 * recordings, seed=0)
    assert len(set(drawn)) == min(256, 4 * recordings) and {i % 4 for i in drawn} == {0, 1, 2, 3}


def test_few_clips_are_validated_on_at_several_times(make):
    times = make("ldm").val_data.times
    assert sorted(times.tolist()) == [50 + 100 * i for i in range(10)]           # one clip, at one rate


def test_a_vocoder_goes_on_when_a_caption_is_mended(start, stop, succeed, tmp_path):
    stop(*start("vocoder", tmp_path / "run"))
    arguments = start("vocoder", tmp_path / "run")
    captions = (tmp_path / "clips.csv").read_text()
    (tmp_path / "clips.csv").write_text(captions.replace("an infant cries", "a child cries"))
    assert "goes on from step" in succeed(*arguments)


def test_a_vae_may_begin_with_silence():
    vae = VAE(widths=(32, 32, 64), blocks=1, groups=8)
    whiten_patches(vae, torch.full((2, 24, 64), -11.5))
    assert all(parameter.isfinite().all() and parameter.abs().max() < 1e3 for parameter in vae.parameters())


def test_a_vocoder_starts_from_no_weights_that_it_replaces(start, succeed, tmp_path, checkpoint):
    folder = shutil.copytree(checkpoint, tmp_path / "good")
    (folder / "vocoder_16000.pt").unlink()
    for again in (), ("--overwrite",):
        printed = succeed(*start("vocoder", tmp_path / "run", *again, base=folder))
        assert f"starts from {folder / 'vocoder_24000.pt'}" in printed


def test_an_ldm_goes_on_after_the_decoder_was_trained_on(start, stop, succeed, tmp_path, monkeypatch):
    stop(*start("ldm", tmp_path / "run"))
    succeed(*start("vae", tmp_path / "run", "--decoder-only", "--overwrite"))
    monkeypatch.setattr("train.TrainLDM.encode_mel", fail)               # the latents in the cache serve on
    assert "ldm goes on from step 2" in succeed(*start("ldm", tmp_path / "run"))


def test_a_decoder_trained_alone_meets_the_noise_that_ddim_leaves(start, succeed, tmp_path, monkeypatch):
    met, forward, schedule = [], VAE.forward, NoiseSchedule()
    monkeypatch.setattr(VAE, "forward", lambda *inputs: met.append(inputs) or forward(*inputs))
    succeed(*start("vae", tmp_path / "run", "--decoder-only"))
    vae, mel, eps, ddim_noise = met[0]
    # All the data one point, 0: the noise in z_t is known, and what DDIM ends with is what it leaves.
    left = schedule.ddim(lambda z_t, t: z_t / (1 - schedule.alpha_bar[t]) ** 0.5, torch.ones(1), 50)
    assert ddim_noise * vae.scale_factor.item() == pytest.approx(left.item(), rel=0.01)
    monkeypatch.setattr(VAE, "decode", lambda _, z: z)
    z, mean, logvar = forward(vae, mel, eps, ddim_noise)
    assert torch.allclose(z - mean, (logvar.exp() + ddim_noise ** 2).sqrt() * eps, atol=1e-5)


def test_a_run_says_what_it_trains_on(start, succeed, tmp_path):
    clips = few_clips(tmp_path)
    clips.write_text(clips.read_text() + "gone.wav,a lost dog\ntext.ogg,a dog\n")
    (tmp_path / "text.ogg").write_text("no audio")
    printed = succeed(*start("vae", tmp_path / "run", "--epochs", 1, "--rates", 16_000, 48_000, data=clips))
    for part in ("gone.wav: no such audio file", "text.ogg: not readable", "to train on: 4 clips, 0.01 h, 4 captions",
                 "4 at 16000 Hz, 4 at 48000 Hz", "to validate on: 1 clips", "left out: 2"):
        assert part in printed, part


def test_losses_as_a_picture(start, succeed, refuse, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refuse(start("vae", tmp_path / "run", "--plot"), "pip install matplotlib")
    monkeypatch.undo()
    pytest.importorskip("matplotlib", reason="drawing is optional")
    succeed(*start("vae", tmp_path / "run", "--plot"))
    assert (tmp_path / "run" / "vae.png").read_bytes().startswith(b"\x89PNG")
