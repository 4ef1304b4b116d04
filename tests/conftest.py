"""What the tests share: the golden data, an untrained tiny model, and a way to run the commands in this process."""
import csv
import os
import re
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""                  # what is compared bit for bit is promised for a CPU

import numpy as np
import pytest
import torch

import sample
import train
import weights
from data import Cache, Clip, find_clips
from srcgaudio import PRESETS, RATES, SRCgAudio, TextEncoder, exit_cleanly
from unet import UNet
from vae import VAE
from vocoder import STRIDES, Generator

HERE = Path(__file__).parent
CAPTIONS = HERE / "data" / "captions.csv"


def golden(name: str) -> dict[str, torch.Tensor]:
    """The arrays of a golden file as tensors."""
    with np.load(HERE / "golden" / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def error(computed: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    return ((computed - expected).abs().max() / expected.abs().max()).item()


def few_clips(folder, count: int = 5):
    """A CSV of the first `count` test recordings."""
    with open(CAPTIONS, newline="") as file:
        rows = list(csv.DictReader(file))[:count]
    path = folder / "clips.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "caption"])
        writer.writerows([CAPTIONS.parent / row["path"], row["caption"]] for row in rows)
    return path


BAR = re.compile("it/s|s/it")                            # of progress


def one_line(status: int, err: str, *parts: str) -> None:
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip() and not BAR.search(line)]
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), err
    assert all(part in lines[0] for part in parts), err


def untrained(seed: int = 0) -> SRCgAudio:
    """A tiny SRC-gAudio with random weights and vocoders for all rates, which computes in float32 on any machine."""
    torch.manual_seed(seed)
    config = PRESETS["tiny"]
    encoder = TextEncoder(**config.text_encoder)
    encoder.initialize(torch.Generator().manual_seed(seed))
    encoder.tokenizer = train.train_tokenizer(["a dog barks", "rain falls on a roof", "the sea"], 128)
    vocoders = {rate: Generator(STRIDES[rate], **config.vocoder) for rate in RATES}
    return SRCgAudio(config, encoder, VAE(**config.vae), UNet(**config.unet), vocoders).to("cpu", "fp32")


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture
def clips(cache) -> list[Clip]:
    """The test recordings."""
    return find_clips([[CAPTIONS]], cache)[0]


@pytest.fixture(scope="session")
def model() -> SRCgAudio:
    return untrained()


@pytest.fixture(scope="session")
def checkpoint(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save(folder)
    return folder


@pytest.fixture
def command(monkeypatch, capsys):
    """command("sample.py", "a dog", ...) -> (exit status, stdout, stderr)."""
    def run(script: str, *arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        status = 0
        try:
            exit_cleanly({"sample.py": sample.main, "train.py": train.main, "weights.py": weights.main}[script])
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err
    return run


@pytest.fixture
def succeed(command):
    """succeed("sample.py", "a dog", ...) -> what it printed."""
    def run(*arguments) -> str:
        status, out, err = command(*arguments)
        assert status == 0, err
        return out + err
    return run


@pytest.fixture
def refuse(command):
    """refuse(["sample.py", "a dog", ...], "part", ...) -> the one line, with these parts, that it must end in."""
    def run(arguments: list, *parts: str) -> str:
        status, _, err = command(*arguments)
        one_line(status, err, *parts)
        return err
    return run
