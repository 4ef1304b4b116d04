"""Sampling: texts in, WAV files out.

    python sample.py "a dog barks" --rate 48000

Fig. 1 and Section III-B: DDIM with 200 steps, guidance scale 3 unless the checkpoint names another.  Prompts come
from the command line or from a file: one a line, or a CSV with the columns id and caption, whose ids name the files (as
a test set has them).
"""
import argparse
import importlib.util
import io
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import soundfile
from torch import Tensor

import weights
from data import by_column, digest, read_csv
from srcgaudio import RATES, SRCgAudio, exit_cleanly, mel_spectrogram, pick_device


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Turn texts into sound with a trained SRC-gAudio.")
    add = parser.add_argument
    add("prompts", nargs="*", help="the texts")
    add("--prompts-file", type=Path, metavar="FILE", help="a prompt a line, or a CSV with the columns id and caption")
    add("--checkpoint", type=Path, default=Path(__file__).parent / "small", metavar="FOLDER",
        help="default: the small model that comes with the code")
    add("--rate", type=parse_rate, nargs="+", action="extend", metavar="HZ",
        help="after the texts: one or several of 16000 (default), 24000, 32000, 48000")
    add("--seconds", type=float, help="default: the length the model was trained on")
    add("--steps", type=int, default=200, help="of DDIM, 1 to 1000 (default: 200, the paper's)")
    add("--guidance", type=float, help="w of Eq. (4) (default: the checkpoint's; the paper's is 3)")
    add("--seed", type=int, default=0, help="prompt i starts from the noise of seed + i")
    add("--batch", type=int, default=8, help="prompts at a time (default: 8)")
    add("--out", type=Path, default=Path("."), metavar="FOLDER", help="where the WAV files go")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace files that are there")
    existing.add_argument("--skip-existing", action="store_true",
        help="keep the WAV files that are there, without drawing them, and make the others, as after a stop")
    add("--spectrogram", action="store_true", help="also draw each as a PNG (takes matplotlib)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("--precision", default="auto", choices=["auto", "bf16", "fp32"])
    add("--compile", action="store_true",
        help="torch.compile the U-Net: starts minutes later; on the CPUs tried, steps were no faster")
    args = parser.parse_args()
    args.rate = list(dict.fromkeys(args.rate or [16_000]))             # each once
    return args


def parse_rate(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r:.60} is no rate in Hz; put the texts before --rate")
    return int(text)


def read_prompts(path: Path) -> list[tuple[str, str]]:
    """The (name, text) of each prompt in a file.  Raises ValueError naming the file and what is wrong with it."""
    if path.is_dir() or not path.exists():               # a pipe will do
        raise ValueError(f"{path}: no such file of prompts")
    if path.suffix.lower() in (".json", ".jsonl", ".tsv"):
        raise ValueError(f"{path}: prompts come one a line in a .txt, or in a .csv with the columns id and caption")
    if path.suffix.lower() == ".csv":
        columns, *lines = read_csv(path)
        if not {"id", "caption"} <= set(columns):
            raise ValueError(f"{path}: its first line must name the columns id and caption, with a comma between them")
        prompts = [(row["id"], row["caption"]) for row in by_column(columns, lines, path)]
        for name, text in prompts:
            if not re.fullmatch(r"[\w.-]+", name) or name.startswith(".") or len(name.encode()) > 200:
                raise ValueError(f"{path}: the id {name!r:.60} is no file name; use letters, digits, '_', '-' and '.', "
                                 f"200 bytes at most")
            if not text.strip():
                raise ValueError(f"{path}: the id {name} has no caption")
        for name, times in Counter(name for name, _ in prompts).items():
            if times > 1:
                raise ValueError(f"{path}: the id {name} stands {times} times; each names a file")
    else:
        try:
            texts = path.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not a text in UTF-8 ({error})") from None
        if {"id", "caption"} <= {cell.strip() for cell in re.split("[,;\t]", texts[0])}:
            raise ValueError(f"{path}: a CSV; give it a name that ends in .csv")
        prompts = [(slug(text), text.strip()) for text in texts if text.strip()]
    if not prompts:
        raise ValueError(f"{path}: no prompts in it")
    return prompts


def slug(text: str) -> str:
    """A file name for a prompt, of 60 bytes at most.  A long one is cut, and a digest tells it from others that begin
    like it."""
    name = re.sub(r"\W+", "_", text.lower()).strip("_").encode(errors="ignore")
    if len(name) > 60:
        name = name[:51] + b"_" + digest(text).hex()[:8].encode()
    return name.decode(errors="ignore") or "prompt"


def pick_prompts(args: argparse.Namespace) -> list[tuple[str, str]]:
    """The (name, text) of all prompts, the names made unique.  Raises ValueError if an output is there already."""
    if args.prompts and args.prompts_file:
        raise ValueError("texts and --prompts-file at once; name the one or the other")
    prompts = read_prompts(args.prompts_file) if args.prompts_file else [(slug(text), text) for text in args.prompts]
    if not prompts:
        raise ValueError('there is no prompt; say what to hear, such as: python sample.py "a dog barks"')
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file; name a folder")
    named = {}
    for name, text in prompts:
        if not text.strip():
            raise ValueError("a prompt is empty; say what to hear")
        if text.endswith((".txt", ".csv")) and os.path.isfile(text):
            raise ValueError(f"{text} is a file; --prompts-file reads prompts from one")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"the prompt {text!r:.60} is not in UTF-8") from None
        unique, count = name, 1
        while unique in named:
            count += 1
            unique = f"{name}_{count}"
        named[unique] = text
    for name in named:
        for rate in args.rate:
            for suffix in (".wav", ".png") if args.spectrogram else (".wav",):
                path = output_path(args.out, name, rate, suffix)
                if path.exists() and not args.overwrite and not args.skip_existing:
                    raise ValueError(f"{path} exists; name another --out, or say --overwrite or --skip-existing")
    return list(named.items())


def output_path(folder: Path, name: str, rate: int, suffix: str) -> Path:
    return folder / f"{name}_{rate}{suffix}"


def write_wav(wave: Tensor, rate: int, path: Path) -> None:
    """A wave (L,) as 16-bit WAV, through a new file and a rename.  Nothing can clip: a vocoder ends in tanh."""
    sound = io.BytesIO()                                 # libsndfile's own errors of a full disk say little
    soundfile.write(sound, wave.numpy(), rate, subtype="PCM_16", format="WAV")
    weights.replace_file(path, lambda file: file.write(sound.getvalue()))


def draw(wave: Tensor, rate: int, title: str, path: Path) -> None:
    """The log-mel of a wave (L,) as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    mel = mel_spectrogram(wave[None], rate)[0]                                    # (T, 64)
    image = axes.imshow(mel.T.numpy(), origin="lower", aspect="auto", vmin=-11.5, vmax=2,
                        extent=(0, len(wave) / rate, 0, RATES[rate].n_mels))
    axes.set_title(f"{title} ({rate // 1000} kHz)", parse_math=False)             # a prompt may have a $ in it
    axes.set(xlabel="seconds", ylabel=f"mel band, 0 to {rate // 2000} kHz")
    figure.colorbar(image, label="log magnitude")
    figure.savefig(path, dpi=120)


def main() -> None:
    args = parse()
    if args.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {args.batch}")
    if args.spectrogram and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--spectrogram draws with matplotlib, which is not installed: pip install matplotlib")
    if args.compile and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise ValueError("--compile takes a C++ compiler, and g++ is not there: install it, or name another in CXX")
    prompts = pick_prompts(args)
    device = pick_device(args.device)
    model = SRCgAudio.load(args.checkpoint, args.rate).to(device, args.precision)
    if args.compile:
        model.unet.compile()
    args.out.mkdir(parents=True, exist_ok=True)
    if not os.access(args.out, os.W_OK):                 # rather now than after the first batch
        raise ValueError(f"--out {args.out} can't be written to; name another folder")
    for rate in args.rate:
        for first in range(0, len(prompts), args.batch):
            batch = prompts[first:first + args.batch]
            kept = [name for name, _ in batch
                    if args.skip_existing and output_path(args.out, name, rate, ".wav").exists()]
            if len(kept) == len(batch):
                print(f"{kept[0]} to {kept[-1]} at {rate} Hz: there already")
                continue
            # All of the batch: its item i starts from the noise of seed + first + i
            waves = model.generate([text for _, text in batch], rate, args.seconds, args.steps, args.guidance,
                                   args.seed + first, progress=True).cpu()                   # (B, samples)
            for (name, text), wave in zip(batch, waves):
                if name in kept:
                    continue
                path = output_path(args.out, name, rate, ".wav")
                if not wave.isfinite().all():
                    raise ValueError(f"{args.checkpoint}: the model generated NaN for {text!r}; its weights are broken")
                if args.spectrogram:
                    draw(wave, rate, text, output_path(args.out, name, rate, ".png"))
                write_wav(wave, rate, path)              # the last of the two: --skip-existing goes by it
                print(f"{path}: {text!r}, {len(wave) / rate:.2f} s at {rate} Hz, peak {wave.abs().max():.2f}",
                      flush=True)


if __name__ == "__main__":
    exit_cleanly(main)
