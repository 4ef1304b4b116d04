"""Captioned audio: finding clips, reading and resampling them, cutting crops.

    find_clips    a CSV with `path` and `caption` columns, or a folder of audio files -> list of Clip
    read_audio    a file, or a part of it -> wave (L,) at any rate, mono
    resample      wave (L,) at one rate -> wave at another, band-limited

What is loaded is level-adjusted as AudioLDM does: zero mean and a peak of 0.5 over the whole clip.
"""
import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

SUFFIXES = {".wav", ".flac", ".ogg", ".mp3"}


@dataclass(frozen=True)
class Clip:
    """One recording.  mean and peak are those of its mono wave: what brings it to zero mean and a peak of 0.5."""

    path: Path
    caption: str
    rate: int                                            # of the file, Hz
    samples: int
    mean: float
    peak: float

    def reaches(self, rate: int) -> bool:
        """Whether the file has the highs of `rate`: 44.1 kHz counts as reaching 48 kHz."""
        return self.rate >= 0.9 * rate

    def read(self, rate: int, start: float = 0.0, seconds: float | None = None) -> Tensor:
        """The wave at `rate` with its level adjusted, (round(seconds * rate),), from `start` seconds on; without
        `seconds` to its end.  Silence follows where the file ends early."""
        if seconds is None:
            seconds = self.samples / self.rate - start
        margin = 0.05                                    # what the resampler wants to see on both sides
        first = max(0, int((start - margin) * self.rate))
        wave, _ = read_audio(self.path, first, math.ceil((seconds + 2 * margin) * self.rate))
        wave = resample((wave - self.mean) * (0.5 / self.peak), self.rate, rate)
        wave = wave[round((start - first / self.rate) * rate):][:round(seconds * rate)]
        return F.pad(wave, (0, round(seconds * rate) - len(wave)))


def read_audio(path: str | Path, first: int = 0, samples: int = -1) -> tuple[Tensor, int]:
    """A file's wave (L,), its channels averaged, and its rate in Hz; or `samples` of it from sample `first` on.

    Raises ValueError naming the file if it is missing, empty, truncated or not audio, or holds NaN or inf.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such audio file")
    try:
        with soundfile.SoundFile(path) as file:
            promised = file.frames
            whole = first == 0 and samples < 0
            file.seek(min(first, promised))
            wave, rate = file.read(samples, dtype="float32", always_2d=True), file.samplerate
            truncated = whole and (len(wave) < promised or ends_early(path, file.extra_info))
    except (soundfile.SoundFileError, RuntimeError) as error:
        reason = "it is empty" if path.stat().st_size == 0 else str(error).split(": ")[-1].strip().rstrip(".")
        raise ValueError(f"{path}: not readable audio, or truncated ({reason})") from None
    if truncated:
        raise ValueError(f"{path}: truncated; the file ends before its audio does: copy it anew, or leave it out")
    if whole and len(wave) == 0:
        raise ValueError(f"{path}: holds no samples")
    if not np.isfinite(wave).all():
        raise ValueError(f"{path}: holds samples that are NaN or infinite")
    return torch.from_numpy(wave.mean(axis=1)), rate     # (L,)


def ends_early(path: Path, log: str) -> bool:
    """Whether a WAV or Ogg file was cut off, which libsndfile reads without a word."""
    if path.suffix.lower() == ".ogg":                    # the last page of a stream carries an end mark
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 2 ** 17))
            tail = file.read()
        page = tail.rfind(b"OggS")
        return page < 0 or page + 5 >= len(tail) or not tail[page + 5] & 4
    # libsndfile's log says "data : 1000 (should be 500)"; a stream of unknown length promises 2^32 - 1
    return any("(should be" in line and line.startswith("data") and "4294967295" not in line
               for line in log.splitlines())


def resample(wave: Tensor, rate: int, new_rate: int) -> Tensor:
    """Windowed-sinc resampling, (L,) at `rate` -> (ceil(L * new_rate / rate),) at `new_rate`.

    The low-pass is flat to 0.9 of the lower Nyquist frequency and more than 80 dB down from there on that it would
    alias.  Output n lies at input time n * rate / new_rate; with the ratio reduced to down / up, outputs n and n + up
    take the same filter, so each of the `up` phases is a convolution with stride `down`.
    """
    if rate == new_rate:
        return wave
    divisor = math.gcd(rate, new_rate)
    down, up = rate // divisor, new_rate // divisor
    cutoff = 0.95 * min(1, up / down)                    # in units of the input's Nyquist frequency
    half = math.ceil(60 / min(1, up / down))             # half the filter's length, in input samples
    length = math.ceil(len(wave) * up / down)
    blocks = math.ceil(length / up)                      # of `up` outputs each, from `down` inputs
    x = F.pad(wave, (half, blocks * down + half - len(wave) + down))[None, None]
    out = torch.empty(blocks, up)
    for first in range(0, up, 64):                       # neighbouring phases share most of their inputs
        phase = torch.arange(first, min(first + 64, up))
        time = phase.double() * down / up                # of each output, in input samples
        start = int(time[0])
        taps = torch.arange(start - half, math.ceil(time[-1]) + half + 1)
        distance = taps - time[:, None]                  # (phases, taps)
        window = torch.special.i0(9.0 * (1 - (distance / (half + 1)) ** 2).clamp(min=0).sqrt())
        window = window * (distance.abs() <= half + 1) / torch.special.i0(torch.tensor(9.0, dtype=torch.float64))
        kernel = (cutoff * torch.sinc(cutoff * distance) * window).float()
        span = x[..., start:start + (blocks - 1) * down + len(taps)]
        out[:, phase] = F.conv1d(span, kernel[:, None], stride=down)[0].T
    return out.flatten()[:length]


def find_clips(source: str | Path, captions: bool = True) -> list[Clip]:
    """The clips of a CSV with the columns `path` (relative to the CSV) and `caption`, or of a folder.

    Reads every file once: a bad one is better found now than after an hour.  Raises ValueError naming the file and,
    in a CSV, its line.  captions: whether the job needs them; a folder has none.
    """
    source = Path(source)
    if source.is_dir():
        if captions:
            raise ValueError(f"{source}: a folder has no captions; give a CSV with the columns path and caption")
        rows = [(path, "") for path in sorted(source.rglob("*")) if path.suffix.lower() in SUFFIXES]
    elif source.is_file():
        rows = read_captions(source, captions)
    else:
        raise ValueError(f"{source}: no such CSV or folder")
    if not rows:
        raise ValueError(f"{source}: no clips in it ({', '.join(sorted(SUFFIXES))} files)")
    with tqdm(rows, f"reading {source.name}", leave=False) as bar:
        return [inspect(path, caption) for path, caption in bar]


def read_captions(path: Path, captions: bool) -> list[tuple[Path, str]]:
    """The (audio path, caption) rows of a CSV."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            for column in ("path", "caption") if captions else ("path",):
                if column not in columns:
                    raise ValueError(f"{path}: no column `{column}` in its first line ({','.join(columns)[:80]})")
            rows = []
            for row in reader:
                if not row["path"] or captions and not (row["caption"] or "").strip():
                    raise ValueError(f"{path}, line {reader.line_num}: a path or a caption is missing")
                rows.append((path.parent / row["path"], (row.get("caption") or "").strip()))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV in UTF-8 ({error})") from None
    if not rows:
        raise ValueError(f"{path}: the caption file has no rows; each is an audio file's path and its caption")
    return rows


def inspect(path: Path, caption: str) -> Clip:
    wave, rate = read_audio(path)
    mean = wave.double().mean().item()
    peak = (wave.double() - mean).abs().max().item()
    if peak < 1e-4:                                      # -80 dB
        raise ValueError(f"{path}: silent; leave it out")
    return Clip(path, caption, rate, len(wave), mean, peak)
