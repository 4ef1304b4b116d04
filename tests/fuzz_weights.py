"""Thousands of corrupted weight files through the loaders.

    python tests/fuzz_weights.py [count]

Small files of each kind are truncated, flipped, overwritten and forged, and loaded in child processes.  Each must end
in a ValueError of one line that names the file, or in a whole model; never in another error, a crash, a hang, more
than 1 GiB or a half-loaded model.  Prints what happened, by kind; the exit status is 1 if anything went wrong.
"""
import collections
import io
import json
import os
import random
import re
import select
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import train
import weights
from srcgaudio import T5_NAMES, TextEncoder
from unet import DIFFUSERS_NAMES as UNET_NAMES
from unet import UNet
from vae import AUDIOLDM_NAMES, VAE
from vae import DIFFUSERS_NAMES as VAE_NAMES
from vocoder import DISCRIMINATOR_NAMES, Generator, Discriminators

SECONDS, GIBIBYTE = 60, 2 ** 30                          # allowed to one file
BATCH = 100                                              # files to a child


def load_into_an_existing_module(path: Path) -> torch.nn.Module:
    module = Generator(channels=32)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    try:
        weights.load(module, weights.read(path), path)
    except ValueError:
        assert all(tensor.equal(before[name]) for name, tensor in module.state_dict().items()), "half-loaded"
        raise
    return module


LOADERS = {
    "audioldm.ckpt": VAE.from_pretrained,
    "audioldm vocoder.ckpt": Generator.from_pretrained,
    "vae folder": VAE.from_pretrained,
    "vocoder folder": Generator.from_pretrained,
    "g_1": Generator.from_pretrained,
    "do_1": Discriminators.from_pretrained,
    "unet folder": UNet.from_pretrained,
    "pytorch_model_main.bin": UNet.from_pretrained,
    "flan-t5 folder": TextEncoder.from_pretrained,
    "flan-t5 shards": TextEncoder.from_pretrained,
    "vocoder_16000.pt": load_into_an_existing_module,
}


def make_samples(folder: Path) -> dict[str, Path]:
    """A small file or folder of each kind, as {kind: path}."""
    torch.manual_seed(0)
    vae, vocoder, disc = VAE((32, 32, 32), blocks=1), Generator(channels=32), Discriminators(1, 8)
    unet = UNet((32, 32), (1, 1), (True, False), context_width=32, blocks=1)
    encoder = TextEncoder(vocabulary=150, width=32, layers=2, heads=2, head_width=16, ff_width=32)
    tokenizer = train.train_tokenizer(["a dog barks", "rain falls on a roof", "the sea"], 128).serialized_model_proto()
    paths = {kind: folder / "samples" / kind.replace(" ", "_") for kind in LOADERS}
    paths["audioldm.ckpt"].parent.mkdir()
    for kind, path in paths.items():
        if "folder" in kind or "shards" in kind:
            path.mkdir()

    first_stage = weights.rename(vae.state_dict(), AUDIOLDM_NAMES, backwards=True)
    scale_factor = first_stage.pop("scale_factor")
    first_stage |= {f"vocoder.{name}": tensor for name, tensor in vocoder.state_dict().items()}
    state = {f"first_stage_model.{name}": tensor for name, tensor in first_stage.items()}
    torch.save({"state_dict": state | {"scale_factor": scale_factor}, "epoch": 1}, paths["audioldm.ckpt"])
    shutil.copy(paths["audioldm.ckpt"], paths["audioldm vocoder.ckpt"])

    tensors = weights.rename(vae.state_dict(), VAE_NAMES, backwards=True)
    del tensors["scale_factor"]
    weights.save_safetensors(tensors, paths["vae folder"] / "diffusion_pytorch_model.safetensors")
    weights.save_json({"scaling_factor": 0.9}, paths["vae folder"] / "config.json")

    tensors = {name.replace("ups.", "upsampler."): tensor for name, tensor in vocoder.state_dict().items()}
    weights.save_safetensors(tensors, paths["vocoder folder"] / "model.safetensors")
    weights.save_json({"upsample_rates": [5, 4, 2, 2, 2]}, paths["vocoder folder"] / "config.json")
    weights.save(vocoder.state_dict(), paths["vocoder_16000.pt"])
    normed = {}
    for name, tensor in vocoder.state_dict().items():
        if name.endswith("weight"):
            normed[name + "_g"], normed[name + "_v"] = tensor.flatten(1).norm(dim=1)[:, None, None], tensor
        else:
            normed[name] = tensor
    torch.save({"generator": normed}, paths["g_1"], _use_new_zipfile_serialization=False)
    torch.save(weights.rename(disc.state_dict(), DISCRIMINATOR_NAMES, backwards=True), paths["do_1"])

    tensors = weights.rename(unet.state_dict(), UNET_NAMES, backwards=True)
    tokens = {name: tensors.pop(name) for name in list(tensors) if "_token." in name}
    weights.save_safetensors(tensors, paths["unet folder"] / "diffusion_pytorch_model.safetensors")
    weights.save_safetensors(tokens, paths["unet folder"] / "condition_tokens.safetensors")
    weights.save_json({"attention_head_dim": [1, 1]}, paths["unet folder"] / "config.json")
    wide = UNet((64, 64), (1, 1), (True, False), context_width=32, blocks=1, tokens=())
    tensors = weights.rename(wide.state_dict(), UNET_NAMES, backwards=True)
    torch.save({f"unet.{name}": tensor for name, tensor in tensors.items()}, paths["pytorch_model_main.bin"])

    tensors = weights.rename(encoder.state_dict(), T5_NAMES, backwards=True)
    names = list(tensors)
    files = {name: f"model-0000{1 + 2 * i // len(names)}-of-00002.safetensors" for i, name in enumerate(names)}
    torch.save(tensors, paths["flan-t5 folder"] / "pytorch_model.bin")
    for file in set(files.values()):
        weights.save_safetensors({n: tensors[n] for n in names if files[n] == file}, paths["flan-t5 shards"] / file)
    weights.save_json({"weight_map": files}, paths["flan-t5 shards"] / "model.safetensors.index.json")
    for kind in ("flan-t5 folder", "flan-t5 shards"):
        (paths[kind] / "spiece.model").write_bytes(tokenizer)
        weights.save_json({"feed_forward_proj": "gated-gelu"}, paths[kind] / "config.json")
    return paths


# ---------------------------------------------------------------------------------------------------------------------
# Corruption


def corrupt(sample: Path, target: Path, seed: int) -> Path:
    """A copy of a sample with one of its files spoilt, always the same for the same seed."""
    rng = random.Random(f"{sample.name} {seed}")
    if sample.is_dir():
        shutil.copytree(sample, target, dirs_exist_ok=True)
        files = sorted(target.iterdir())
        path = rng.choices(files, [1 if file.name == "spiece.model" else 3 + 6 * (file.suffix != ".json")
                                   for file in files])[0]
    else:
        target = target.with_name(target.name + sample.suffix)
        path = Path(shutil.copy(sample, target))
    content = path.read_bytes()
    ways = [truncate, flip, overwrite]
    if path.suffix == ".safetensors":
        ways += [forge_header] * 3
    elif content[:2] == b"PK":
        ways += [forge_pickle] * 3
    path.write_bytes(rng.choice(ways)(content, rng))
    return target


def somewhere(length: int, rng: random.Random) -> int:
    """A position; those at the start and the end, where headers are, come more often."""
    near = min(length, rng.choice([64, 4096]))
    return rng.choice([rng.randrange(length), rng.randrange(near), length - 1 - rng.randrange(near)])


def truncate(content: bytes, rng: random.Random) -> bytes:
    return content[:somewhere(len(content), rng)]


def flip(content: bytes, rng: random.Random) -> bytes:
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 10, 100])):
        content[somewhere(len(content), rng)] ^= 1 << rng.randrange(8)
    return bytes(content)


def overwrite(content: bytes, rng: random.Random) -> bytes:
    begin, length = somewhere(len(content), rng), rng.choice([1, 4, 8, 100])
    return content[:begin] + rng.choice([bytes(length), b"\xff" * length, rng.randbytes(length)]) + \
        content[begin + rng.choice([0, length]):]


def forge_header(content: bytes, rng: random.Random) -> bytes:
    """A well-formed safetensors header that lies."""
    length = int.from_bytes(content[:8], "little")
    header, number = json.loads(content[8:8 + length]), lambda: rng.choice([-1, 0, 1, 2 ** 31, 2 ** 40, 2 ** 63, 1e9])
    name = rng.choice([name for name in header if name != "__metadata__"])
    lie = rng.randrange(8)
    if lie == 0:
        header[name]["shape"][rng.randrange(len(header[name]["shape"]) or 1):] = [number(), number()]
    elif lie == 1:
        header[name]["data_offsets"][rng.randrange(2)] = number()
    elif lie == 2:
        header[name]["dtype"] = rng.choice(["F64", "I8", "BOOL", "F16", "Q4", None, []])
    elif lie == 3:
        header[name] = rng.choice([None, [], 3, {"dtype": "F32"}, {"shape": [1], "data_offsets": [0, 4]}])
    elif lie == 4:
        header[name]["data_offsets"] = rng.choice(list(header.values())[1:])["data_offsets"]
    elif lie == 5:
        header[rng.choice(["extra", "", "a" * 1000, "a\nb"])] = header.pop(name)
    elif lie == 6:
        header[name]["shape"] = [10 ** 5] * rng.choice([2, 9, 5000])
    start = json.dumps(header).encode()
    length = number() if lie == 7 else len(start)
    return (int(length) % 2 ** 64).to_bytes(8, "little") + start + content[8 + int.from_bytes(content[:8], "little"):]


def forge_pickle(content: bytes, rng: random.Random) -> bytes:
    """A PyTorch archive whose pickle is spoilt and whose checksums are right, as only malice makes them."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            record = old.read(name)
            if name.endswith("data.pkl"):
                for _ in range(rng.choice([1, 1, 2, 8])):
                    if rng.random() < 0.5:               # a number: K (1 byte), M (2 bytes) or J (4 bytes)
                        places = [i for i, byte in enumerate(record[:-5]) if byte in b"KMJ"]
                        i = rng.choice(places)
                        size = {b"K": 1, b"M": 2, b"J": 4}[record[i:i + 1]]
                        forged = rng.choice([b"J\xff\xff\xff\x7f", b"J\x00\x00\x00\x80", b"K\x00",
                                             b"\x8a\x08" + b"\x7f" * 8])
                        record = record[:i] + forged + record[i + 1 + size:]
                    else:
                        i = rng.randrange(len(record))
                        record = record[:i] + rng.randbytes(1) + record[i + 1:]
            elif rng.random() < 0.02:
                continue                                 # a tensor's bytes are missing
            new.writestr(name, record[:rng.randrange(len(record) + 1)] if rng.random() < 0.02 else record)
    return file.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def outcome_of(kind: str, path: Path) -> tuple[str, str]:
    """("refused", message), ("loaded", ""), or what went wrong."""
    try:
        module = LOADERS[kind](path)
    except ValueError as error:
        message = str(error)
        clean = len(message.splitlines()) == 1 and len(message) < 2000 and path.name in message
        return ("refused" if clean else "unclear message"), message
    except Exception as error:
        return f"raised {type(error).__name__}", str(error)
    state = module.state_dict()
    whole = all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in state.values())
    sum(tensor.double().sum() for tensor in state.values())                       # every byte is there
    return ("loaded" if whole else "half-loaded"), ""


def peak_memory() -> int:
    """The most that this process has held, in bytes.  (getrusage counts its parent's, too.)"""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def child() -> None:
    """Loads what stdin lists, a JSON [kind, path] a line; answers with a JSON object a line."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    start = peak_memory()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        kind, path = json.loads(line)
        result, message = outcome_of(kind, Path(path))
        print(json.dumps({"kind": kind, "result": result, "message": message, "grown": peak_memory() - start}),
              flush=True)


def load_in_child(jobs: list[tuple[str, Path]]) -> list[dict]:
    """What became of each (kind, path), loaded in a child process, which is replaced if it crashes or hangs."""
    outcomes, process = [], None
    for kind, path in jobs:
        if process is None:
            process = subprocess.Popen([sys.executable, __file__, "--child"], stdin=subprocess.PIPE,
                                       stdout=subprocess.PIPE, env=os.environ | {"PYTHONFAULTHANDLER": "1"})
            assert process.stdout.readline(), "the child did not start"
        process.stdin.write(json.dumps([kind, str(path)]).encode() + b"\n")
        process.stdin.flush()
        answer = process.stdout.readline() if select.select([process.stdout], [], [], SECONDS)[0] else None
        if answer:
            outcome = json.loads(answer)
            if outcome["grown"] > GIBIBYTE:
                outcome["result"] = "took more than 1 GiB"
        else:
            process.kill()
            outcome = {"kind": kind, "grown": 0, "message": "",
                       "result": f"hung for {SECONDS} s" if answer is None else f"crashed ({process.wait()})"}
            process = None
        outcomes.append(outcome | {"path": str(path)})
    if process:
        process.stdin.close()
        process.wait()
    return outcomes


def main(count: int) -> int:
    results, grown, reasons = collections.Counter(), 0, collections.Counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        samples = make_samples(folder)
        kinds = list(samples)
        for kind, path in samples.items():               # untouched, each must load
            assert outcome_of(kind, path)[0] == "loaded", (kind, outcome_of(kind, path))
        for first in range(0, count, BATCH):
            (folder / "batch").mkdir()
            jobs = []
            for i in range(first, min(first + BATCH, count)):
                kind = kinds[i % len(kinds)]
                jobs.append((kind, corrupt(samples[kind], folder / "batch" / str(i), i)))
            for i, outcome in enumerate(load_in_child(jobs), start=first):
                results[outcome["kind"], outcome["result"]] += 1
                grown = max(grown, outcome["grown"])
                if outcome["result"] not in ("refused", "loaded"):
                    print(f"seed {i}: {outcome}")
                if outcome["result"] == "refused":
                    reasons[outcome["message"].split(": ", 1)[-1].split("(")[0][:25]] += 1
            shutil.rmtree(folder / "batch")
            print(f"{min(first + BATCH, count)} of {count}", file=sys.stderr)
    for kind in kinds:
        print(f"{kind:24s}", {result: n for (k, result), n in sorted(results.items()) if k == kind})
    bad = sum(n for (_, result), n in results.items() if result not in ("refused", "loaded"))
    print(f"{count} files: {sum(n for (_, r), n in results.items() if r == 'refused')} refused, "
          f"{sum(n for (_, r), n in results.items() if r == 'loaded')} loaded, {bad} bad; "
          f"at most {grown / 2 ** 20:.0f} MiB taken")
    print("refused because:", dict(reasons.most_common(12)))
    return bad > 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--child"]:
        child()
    else:
        sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000))
