"""The README's map from the paper to the code, its commands and its sizes, held against the code."""
import argparse
import importlib
import inspect
import re
import shlex

import pytest
import torch
from conftest import HERE

import sample
import train
import weights
from srcgaudio import PRESETS, TextEncoder
from unet import UNet
from vae import VAE
from vocoder import Generator

README = (HERE.parent / "README.md").read_text(encoding="utf-8")
OF_SMALL = (HERE.parent / "small" / "README.md").read_text(encoding="utf-8")
PLACES = re.findall(r"`(\w+)\.py: ([\w.]+)`", README + OF_SMALL)


def find(module: str, name: str):
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("module, name", PLACES)
def test_every_place_of_the_map_exists(module, name):
    assert find(module, name) is not None


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_every_equation_stands_where_the_map_says(number):
    row = next(line for line in README.splitlines() if line.startswith(f"| Eq. ({number})"))
    (module, name), = re.findall(r"`(\w+)\.py: ([\w.]+)`", row)
    assert f"Eq. ({number})" in inspect.getsource(find(module, name))


@pytest.mark.parametrize("line", re.findall(r"(?:python|torchrun \S+) ((?:train|sample|weights)\.py [^#&\n`]+)",
                                            README))
def test_every_command_is_understood(line, monkeypatch):
    for name, value in reversed(re.findall(r'^(\w+)="(.*)"$', README, re.MULTILINE)):
        line = line.replace(f"${name}", value)
    script, *arguments = shlex.split(line)
    monkeypatch.setattr("sys.argv", [script, *arguments])
    parse = {"train.py": train.parse, "sample.py": sample.parse, "weights.py": weights.parse}[script]
    assert isinstance(parse(), argparse.Namespace)


@pytest.mark.parametrize("part, row", [("vae", "VAE"), ("unet", "U-Net"), ("vocoder", "one vocoder"),
                                       ("text_encoder", "text encoder")])
def test_the_sizes_are_the_presets(part, row):
    cls = {"vae": VAE, "unet": UNet, "vocoder": Generator, "text_encoder": TextEncoder}[part]
    cells = next(line for line in README.splitlines() if line.startswith(f"| {row} |")).split("|")[2:5]
    for preset, cell in zip(("tiny", "small", "paper"), cells):
        with torch.device("meta"):
            network = cls(**getattr(PRESETS[preset], part))
        millions = sum(p.numel() for p in network.parameters()) / 1e6
        assert float(re.match(r" ([\d.]+) M", cell)[1]) == pytest.approx(millions, abs=0.051)
