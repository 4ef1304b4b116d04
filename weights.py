"""Weight files: reading published ones, renaming, loading into a module, writing.

    python weights.py import --checkpoint runs/tango --unet tango/pytorch_model_main.bin --vae ...
    python weights.py export --checkpoint runs/mine --out exported
    python weights.py halve --checkpoint runs/mine --out mine

`import` makes a checkpoint folder from published files, `export` writes U-Net, VAE and text encoder as folders that
diffusers and transformers open, `halve` copies a checkpoint with its weights in float16, without what only training
needs.  Elsewhere weights are flat dicts of tensors with dotted names.

A weight file comes from a stranger.  Nothing here runs code from one, every size is checked against the file before
memory is taken for it, and files are memory-mapped, except those of PyTorch before 1.6: tensors that nobody needs are
never read.
"""
import argparse
import inspect
import io
import json
import math
import mmap
import os
import pickletools
import re
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

Weights = dict[str, Tensor]
Names = list[tuple[str, str]]                            # published name -> ours, see `rename`
Published = tuple[dict, Weights, Path, Names]            # sizes, tensors, their source, names: what `build` takes

# ---------------------------------------------------------------------------------------------------------------------
# Reading

# The files of a Hugging Face folder, the best first; each may be in shards, with an index of that name + .index.json
FOLDER_FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin",
                "diffusion_pytorch_model.bin")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}                            # safetensors' names
LARGEST_JSON = 2 ** 23                                   # bytes; the header of FLAN-T5-XXL has 10^5

# All that a file of plain tensors calls by name.  weights_only allows more, such as bytearray(2 ** 40).
PICKLED = re.compile(r"collections OrderedDict|torch\._utils _rebuild_(tensor|tensor_v2|parameter)|"
                     r"torch (Double|Float|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage")


def read(path: str | Path) -> Weights:
    """The tensors of a PyTorch file, a .safetensors file, or a Hugging Face folder with either, in shards or not.

    Dicts within dicts become dotted names: {"generator": {"a": x}} -> "generator.a".  Raises ValueError naming the file
    if it is missing, damaged or no such.
    """
    path = Path(path)
    if not path.is_dir():
        return read_file(path)
    for name in FOLDER_FILES:
        if (path / name).is_file():
            return read_file(path / name)
        if (path / f"{name}.index.json").is_file():
            return read_shards(path / f"{name}.index.json")
    raise ValueError(f"{path}: no weights in this folder; expected {', '.join(FOLDER_FILES)}, or shards with an index")


def read_file(path: Path) -> Weights:
    if not path.is_file():
        raise ValueError(f"{path}: no such weight file")
    try:
        tensors = read_safetensors(path) if path.suffix == ".safetensors" else flatten(read_pytorch(path))
        if not all(name.isprintable() and len(name) < 500 for name in tensors):
            raise ValueError("a tensor's name is not printable")
        return tensors
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:                           # whatever the parsers stumble over
        raise ValueError(f"{path}: damaged, or not a weight file ({first_line(error)})") from None


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def read_shards(index: Path) -> Weights:
    """The tensors that an index.json, {"weight_map": {name: file}}, finds in the files beside it."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(
            isinstance(file, str) and re.fullmatch(r"\w[\w.-]*", file) for file in files.values()):
        raise ValueError(f"{index}: its weight_map must give each tensor the name of a file in this folder")
    shards = {file: read_file(index.parent / file) for file in sorted(set(files.values()))}
    for name, file in files.items():
        if name not in shards[file]:
            raise ValueError(f"{index.parent / file}: tensor {name} is missing, which {index.name} says is here")
    return {name: shards[file][name] for name, file in files.items()}


def read_pytorch(path: Path) -> object:
    """What torch.save wrote: a zip archive with a pickle in it or, before 1.6, five pickles and then the bytes."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"           # what torch.load goes by, too
        file.seek(0)
        if zipped:
            with zipfile.ZipFile(file) as archive:
                for entry in archive.infolist():
                    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size:
                        raise ValueError(f"{entry.filename} is compressed or larger than the file")
                    if entry.filename.lower().endswith("data.pkl"):
                        check_pickle(io.BytesIO(archive.read(entry)))
        else:
            for _ in range(5):
                check_pickle(file)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def check_pickle(file: io.BufferedIOBase) -> None:
    """Read the next pickle without running it.  Raises ValueError if it calls anything that makes no plain tensor."""
    for operation, argument, _ in pickletools.genops(file):
        if "GLOBAL" in operation.name and not PICKLED.fullmatch(argument or ""):
            raise ValueError(f"it calls {(argument or 'code').replace(' ', '.')}, which weights alone do not "
                             f"need; if you trust it, torch.save its state dict alone")


def flatten(content: object) -> Weights:
    """The tensors in dicts within dicts, under dotted names; anything else is left out, and so are tensors that claim
    more entries than the file has bytes for them."""
    flat, seen = {}, set()

    def visit(value: object, name: str) -> None:
        if isinstance(value, Tensor):
            if value.numel() * value.itemsize <= value.untyped_storage().nbytes():
                flat[name] = value.detach()
        elif isinstance(value, dict) and id(value) not in seen:          # a forged dict may hold itself
            seen.add(id(value))
            for key, part in value.items():
                visit(part, f"{name}.{key}" if name else str(key))

    visit(content, "")
    return flat


def read_safetensors(path: Path) -> Weights:
    """8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, then the tensors without gaps."""
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    length = int.from_bytes(mapped[:8], "little")
    if length > min(len(mapped) - 8, LARGEST_JSON):
        raise ValueError(f"the header should have {length} bytes, the file has {len(mapped)}")
    header = json.loads(mapped[8:8 + length])
    header.pop("__metadata__", None)

    data = 8 + length                                    # where the tensors start
    for name, entry in header.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"tensor {name} needs dtype, shape and data_offsets")
        shape, offsets = entry["shape"], entry["data_offsets"]
        if str(entry["dtype"]) not in DTYPES:
            raise ValueError(f"tensor {name} has the unknown dtype {entry['dtype']}")
        if not (type(shape) is type(offsets) is list and len(shape) <= 8 and len(offsets) == 2
                and all(type(n) is int and 0 <= n <= len(mapped) for n in shape + offsets)):
            raise ValueError(f"tensor {name} has the shape {shape} at {offsets} in a file of {len(mapped)} bytes")

    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, entries, (begin, stop) = DTYPES[entry["dtype"]], math.prod(entry["shape"]), entry["data_offsets"]
        if begin != end or stop - begin != entries * dtype.itemsize or data + stop > len(mapped):
            raise ValueError(f"tensor {name} lies at {begin} to {stop}; {entries} entries of {dtype} were expected "
                             f"from {end}, in {len(mapped) - data} bytes")
        tensor = torch.frombuffer(mapped, dtype=dtype, count=entries, offset=data + begin) if entries \
            else torch.empty(0, dtype=dtype)
        tensors[name], end = tensor.view(entry["shape"]), stop
    if data + end != len(mapped):
        raise ValueError(f"{len(mapped) - data - end} bytes belong to no tensor")
    return tensors


def read_json(path: Path, largest: int = LARGEST_JSON) -> dict:
    """A JSON object from a file.  Raises ValueError naming the file if it is missing, no such or too large."""
    try:
        if path.stat().st_size > largest:
            raise ValueError("too large")
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("not an object")
        return content
    except FileNotFoundError:
        raise ValueError(f"{path}: missing") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, or not a JSON object ({first_line(error)})") from None


def check_config(config: dict, expected: dict, path: Path) -> None:
    """Raise ValueError where `config`, read from `path`, says something else than `expected`."""
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise ValueError(f"{path}: {name} is {str(config[name])[:100]}, expected {value}")


# ---------------------------------------------------------------------------------------------------------------------
# Published names and sizes


def under(weights: Weights, *prefixes: str) -> Weights:
    """The entries under the first of `prefixes` that any name starts with, that prefix taken off.  "" takes all."""
    for prefix in prefixes:
        found = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        if found:
            return found
    return {}


def rename(weights: Weights, names: Names, backwards: bool = False) -> Weights:
    """Published names to ours, or backwards: each (published, ours) pair replaces a part of the name, in order.

    {} stands for a number: ("resnets.{}.", "block.{}.").
    """
    pairs = [(ours, published) for published, ours in reversed(names)] if backwards else names
    patterns = [(re.compile(re.escape(old).replace(r"\{\}", r"(\d+)")), new) for old, new in pairs]
    renamed = {}
    for name, tensor in weights.items():
        for pattern, new in patterns:
            name = pattern.sub(lambda match: new.format(*match.groups()), name)
        renamed[name] = tensor
    return renamed


def fold_weight_norm(weights: Weights, source: str | Path) -> Weights:
    """Weight norm stores w as a length g and a direction v for each output: w = g v / |v|.  Here is w, under "weight".

    Takes the names weight_g, weight_v and those of torch's parametrizations.
    """
    weights = rename(weights, [(".parametrizations.weight.original0", ".weight_g"),
                               (".parametrizations.weight.original1", ".weight_v")])
    folded = {name: tensor for name, tensor in weights.items() if not name.endswith((".weight_g", ".weight_v"))}
    for name, v in weights.items():
        if name.endswith(".weight_v"):
            g_shape = shape_of(weights, name[:-1] + "g", v.ndim, source)
            if v.ndim < 2 or g_shape != v.shape[:1] + (1,) * (v.ndim - 1):
                raise ValueError(f"{source}: tensor {name[:-1]}g has shape {g_shape}, expected one entry for each row "
                                 f"of {name}, {tuple(v.shape)}")
            norm = v.float().flatten(1).norm(dim=1).view(g_shape)
            folded[name.removesuffix("_v")] = v.float() * (weights[name[:-1] + "g"].float() / norm)
    return folded


def count(weights: Weights, pattern: str) -> int:
    """How many numbers stand at {} among the names that start with `pattern`, such as "blocks.{}."; at most 100."""
    numbered = re.compile(re.escape(pattern).replace(r"\{\}", r"(\d+)"))
    return min(100, len({match[1] for match in map(numbered.match, weights) if match}))


def shape_of(weights: Weights, name: str, dimensions: int, source: str | Path) -> tuple[int, ...]:
    """The shape of a tensor that tells a model's size.  Raises ValueError if it is missing or has other dimensions."""
    if name not in weights:
        raise ValueError(f"{source}: tensor {name} is missing; this file holds another model")
    if weights[name].ndim != dimensions:
        raise ValueError(f"{source}: tensor {name} has shape {tuple(weights[name].shape)}, "
                         f"expected {dimensions} dimensions; this file holds another model")
    return tuple(weights[name].shape)


# ---------------------------------------------------------------------------------------------------------------------
# Into a module


def check(module: nn.Module, weights: Weights, source: str | Path, names: Names = ()) -> Weights:
    """The module's own tensors, by the names that `weights` should have for them, which `names` renames to ours.

    Raises ValueError naming `source` and the first tensor that is missing, unknown or of another shape.
    """
    expected = rename(module.state_dict(), names, backwards=True)
    for name, tensor in expected.items():
        if name not in weights:
            raise ValueError(f"{source}: tensor {name} is missing; this file holds another model")
        if weights[name].shape != tensor.shape:
            raise ValueError(f"{source}: tensor {name} has shape {tuple(weights[name].shape)}, "
                             f"expected {tuple(tensor.shape)}; this file holds a model of another size")
    for name in weights:
        if name not in expected:
            raise ValueError(f"{source}: unknown tensor {name}; this file holds another model")
    return expected


def load(module: nn.Module, weights: Weights, source: str | Path, names: Names = ()) -> None:
    """Put every tensor in its place, copied, once `check` has passed them all; in a `skeleton`, as float32."""
    copies = {name: weights[name].to("cpu" if tensor.is_meta else tensor.device, torch.float32, copy=True)
              for name, tensor in check(module, weights, source, names).items()}
    state = module.state_dict()                          # an optimizer may hold parameters that are there: they stay
    module.load_state_dict(dict(zip(state, copies.values())), assign=any(tensor.is_meta for tensor in state.values()))


def skeleton(module_class, arguments: dict, source: str | Path, most: int = 1000) -> nn.Module:
    """The module that `arguments` describe, of shapes alone: it takes no memory.

    most: layers, blocks or widths that it may have; a forged number of them would be built without end.
    Raises ValueError naming `source`, which holds the arguments.
    """
    try:
        if (any(not 1 <= arguments.get(name, 1) <= most for name in ("layers", "blocks"))
                or len(arguments.get("widths", ())) > most):
            raise ValueError(f"layers, blocks or widths are more than {most}, or none")
        with torch.device("meta"):
            return module_class(**arguments)
    except Exception as error:                           # sizes from a file can be anything
        raise ValueError(f"{source}: these sizes do not fit {module_class.__name__} ({first_line(error)})") from None


def build(module_class, arguments: dict, weights: Weights, source: str | Path, names: Names = (),
          sizes_source: Path | None = None) -> nn.Module:
    """A module made with `arguments`, which `sizes_source` holds if `source` does not, and filled by `load`."""
    module = skeleton(module_class, arguments, sizes_source or source, most=len(weights))    # each has tensors there
    load(module, weights, source, names)
    return module.eval().to(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def replace_file(path: str | Path, write) -> None:
    """Let write(file) fill a new file, sync it, and rename it: a full disk or a kill leaves the old file intact.  Makes
    the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    try:
        with open(new, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {first_line(error)}") from None
    except RuntimeError as error:                        # torch's, which says little
        raise OSError(f"cannot write {path}; is the disk full? ({first_line(error)})") from None
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def replace_files(folder: Path) -> Iterator[Path]:
    """A new folder inside `folder`.  When all its files are written, they move up: a full disk leaves the old ones
    there."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="new_", dir=folder) as new:
        yield Path(new)
        for path in Path(new).iterdir():
            os.replace(path, folder / path.name)


def save(content: object, path: str | Path) -> None:
    """Write a PyTorch file."""
    replace_file(path, lambda file: torch.save(content, file))


def save_safetensors(weights: Weights, path: str | Path) -> None:
    """Write a .safetensors file, as float32."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in weights.items():
        begin, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    start = json.dumps(header).encode()
    start += b" " * (-len(start) % 8)                    # so that the tensors lie at multiples of 8

    def write(file: io.BufferedIOBase) -> None:
        file.write(len(start).to_bytes(8, "little") + start)
        for tensor in weights.values():
            file.write(tensor.float().cpu().contiguous().numpy().tobytes())

    replace_file(path, write)


def save_json(content: dict, path: Path) -> None:
    replace_file(path, lambda file: file.write((json.dumps(content, indent=2) + "\n").encode()))


# ---------------------------------------------------------------------------------------------------------------------
# The command line.  Imports the other modules, which import this one, only here.


def import_checkpoint(args: argparse.Namespace) -> None:
    """Make a checkpoint folder, or complete one, from published files.  All are read before anything is written."""
    from srcgaudio import PRESETS, RATES, SRCgAudio, TextEncoder, check_rate, check_widths
    from unet import UNet
    from vae import VAE
    from vocoder import KERNELS, STRIDES, Discriminators, Generator

    folder = args.checkpoint
    config = SRCgAudio.load_config(folder) if (folder / "config.json").exists() else PRESETS["paper"]
    parts = {}                                           # file name -> module
    if args.vae:
        sizes, *rest = VAE.published(args.vae)
        config = replace(config, vae=sizes)
        parts["vae.pt"] = build(VAE, sizes, *rest)
    for option, files in (("--vocoder", args.vocoder), ("--discriminators", args.discriminators)):
        rates = [rate for rate, _ in files]
        for rate in rates:
            check_rate(rate)
            if rates.count(rate) > 1:
                raise ValueError(f"{option} {rate} is there twice; name one file for each rate")
    for rate, path in args.vocoder:
        sizes, *rest = Generator.published(path, STRIDES[rate])
        channels = {"channels": sizes["channels"]}
        if sizes != channels | {"strides": STRIDES[rate], "kernels": KERNELS, "n_mels": RATES[rate].n_mels}:
            raise ValueError(f"{path}: a vocoder with {sizes} does not serve {rate} Hz here")
        others = {file.name for file in folder.glob("vocoder_*.pt")} | parts.keys()
        if channels != config.vocoder and any(re.match(f"vocoder_(?!{rate})", name) for name in others):
            raise ValueError(f"{path}: it has {channels}, the other vocoders of this checkpoint {config.vocoder}")
        config = replace(config, vocoder=channels)
        parts[f"vocoder_{rate}.pt"] = build(Generator, sizes, *rest)
    for rate, path in args.discriminators:
        parts[f"discriminators_{rate}.pt"] = Discriminators.from_pretrained(path)
    if args.flan_t5:
        encoder = TextEncoder.from_pretrained(args.flan_t5)
        if not args.unet:
            if (folder / "unet.pt").exists():
                check_widths(encoder, SRCgAudio.load_unet(folder), args.flan_t5)
            config = replace(config, unet=config.unet | {"context_width": encoder.embedding.weight.shape[1]})
        if args.flan_t5.is_dir():                        # a FLAN-T5 stays in its own folder
            config = replace(config, text_encoder=str(args.flan_t5.resolve()))
        else:
            config = replace(config, text_encoder=TextEncoder.published(args.flan_t5)[0])
            parts["text_encoder.pt"] = encoder
    if args.unet:
        torch.manual_seed(0)                             # the weights of --add-tokens are the same each time
        sizes, *rest = UNet.published(args.unet, ("time", "rate") if args.add_tokens else ())
        config = replace(config, unet=sizes)
        parts["unet.pt"] = build(UNet, sizes, *rest)
        if args.flan_t5 or isinstance(config.text_encoder, str) or (folder / "text_encoder.pt").exists():
            encoder = encoder if args.flan_t5 else SRCgAudio.load_text_encoder(folder)
            check_widths(encoder, parts["unet.pt"], args.unet)

    if not parts and not args.flan_t5:
        raise ValueError("there is nothing to import; name a --vae, --vocoder, --discriminators, --flan-t5 or --unet")
    for name in [*parts, "text_encoder.pt"] if args.flan_t5 else parts:
        if (folder / name).exists() and not args.overwrite:
            raise ValueError(f"{folder / name} exists; name another --checkpoint, or say --overwrite")
    if "vae.pt" in parts and "unet.pt" not in parts and (folder / "vae.pt").exists() and (folder / "unet.pt").exists():
        raise ValueError(f"{folder / 'unet.pt'} knows the latents only of the VAE beside it; import both, or name "
                         f"another --checkpoint")
    with replace_files(folder) as new:
        SRCgAudio.save_config(config, new)
        for name, part in parts.items():
            if name == "text_encoder.pt":
                part.save(new)
            else:
                save(part.state_dict(), new / name)
    print(f"{folder}: config.json{''.join(f', {name}' for name in parts)}")


def export_checkpoint(args: argparse.Namespace) -> None:
    """Write U-Net, VAE and text encoder of a checkpoint as folders that diffusers and transformers open."""
    from srcgaudio import T5_NAMES, NoiseSchedule, SRCgAudio, TextEncoder
    from unet import DIFFUSERS_NAMES as UNET_NAMES
    from unet import UNet
    from vae import DIFFUSERS_NAMES as VAE_NAMES
    from vae import VAE

    def sizes_of(module_class, arguments: dict) -> dict:
        bound = inspect.signature(module_class).bind(**arguments)
        bound.apply_defaults()
        return bound.arguments

    config = SRCgAudio.load_config(args.checkpoint)
    out = {name: args.out / name for name in ("unet", "scheduler", "vae", "text_encoder")}
    for folder in out.values():
        if folder.exists() and not args.overwrite:
            raise ValueError(f"{folder} exists; name another --out, or say --overwrite")

    unet, vae = SRCgAudio.load_unet(args.checkpoint), SRCgAudio.load_vae(args.checkpoint)
    encoder = SRCgAudio.load_text_encoder(args.checkpoint)

    sizes = sizes_of(UNet, config.unet)
    tensors = rename(unet.state_dict(), UNET_NAMES, backwards=True)
    tokens = {name: tensors.pop(name) for name in list(tensors) if "_token." in name}
    save_safetensors(tensors, out["unet"] / "diffusion_pytorch_model.safetensors")
    save_safetensors(tokens, out["unet"] / "condition_tokens.safetensors")
    attends = sizes["cross_attention"]
    save_json({
        "_class_name": "UNet2DConditionModel", "in_channels": UNet.LATENT, "out_channels": UNet.LATENT,
        "sample_size": [round(config.seconds * 25), 16], "block_out_channels": sizes["widths"],
        "attention_head_dim": sizes["heads"],            # diffusers' name for the number of heads
        "cross_attention_dim": sizes["context_width"], "layers_per_block": sizes["blocks"],
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if sizes["cross_attention_middle"] else "UNetMidBlock2D",
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "use_linear_projection": True, "flip_sin_to_cos": True, "freq_shift": 0, "act_fn": "silu",
        "norm_num_groups": sizes["groups"], "norm_eps": 1e-5}, out["unet"] / "config.json")
    save_json({
        "_class_name": "DDIMScheduler", "num_train_timesteps": NoiseSchedule.T, "beta_schedule": "scaled_linear",
        "beta_start": NoiseSchedule.BETA_1, "beta_end": NoiseSchedule.BETA_T, "steps_offset": 1,
        "set_alpha_to_one": False, "clip_sample": False,
        "prediction_type": {"eps": "epsilon", "v": "v_prediction"}[sizes["predicts"]]},
        out["scheduler"] / "scheduler_config.json")

    sizes = sizes_of(VAE, config.vae)
    tensors = rename(vae.state_dict(), VAE_NAMES, backwards=True)
    scale_factor = tensors.pop("scale_factor").item()
    linear = {name: tensor.flatten(1) if ".attentions." in name and tensor.ndim == 4 else tensor    # from 1 x 1 conv
              for name, tensor in tensors.items()}
    save_safetensors(linear, out["vae"] / "diffusion_pytorch_model.safetensors")
    save_json({
        "_class_name": "AutoencoderKL", "in_channels": 1, "out_channels": 1, "latent_channels": VAE.LATENT,
        "block_out_channels": sizes["widths"], "layers_per_block": sizes["blocks"], "scaling_factor": scale_factor,
        "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3,
        "act_fn": "silu", "norm_num_groups": sizes["groups"]}, out["vae"] / "config.json")

    tensors = rename(encoder.state_dict(), T5_NAMES, backwards=True)
    sizes = TextEncoder.sizes(tensors, args.checkpoint)
    save_safetensors(tensors, out["text_encoder"] / "model.safetensors")
    (out["text_encoder"] / "spiece.model").write_bytes(encoder.tokenizer.serialized_model_proto())
    save_json({
        "architectures": ["T5EncoderModel"], "model_type": "t5", **TextEncoder.transformers_config(sizes),
        "is_encoder_decoder": False, "use_cache": False, "dropout_rate": 0.0, "pad_token_id": TextEncoder.PAD,
        "eos_token_id": TextEncoder.END}, out["text_encoder"] / "config.json")
    save_json({"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "pad_token": "<pad>", "eos_token": "</s>",
               "unk_token": "<unk>"}, out["text_encoder"] / "tokenizer_config.json")
    print(f"{args.out}: {', '.join(out)}")


def halve_checkpoint(args: argparse.Namespace) -> None:
    """A checkpoint folder in float16, half the size: what generates, and nothing else."""
    from srcgaudio import SRCgAudio                      # which imports this module

    model = SRCgAudio.load(args.checkpoint)
    for path in (args.out / "config.json", *args.out.glob("*.pt")):
        if path.exists() and not args.overwrite:
            raise ValueError(f"{path} exists; name another --out, or say --overwrite")
        if re.match(r"vocoder_\d", path.name) and not (args.checkpoint / path.name).exists():
            raise ValueError(f"{path} is another model's, {args.checkpoint} has none; name another --out")
    for part in (model.text_encoder, model.vae, model.unet, *model.vocoders.values()):
        part.half()
    model.save(args.out)
    print(f"{args.out}: {sum(path.stat().st_size for path in args.out.iterdir()) / 1e6:.1f} MB")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Published weights in, ours out.")
    commands = parser.add_subparsers(dest="command", required=True)
    overwrite = argparse.ArgumentParser(add_help=False)
    overwrite.add_argument("--overwrite", action="store_true", help="replace weights that are there")

    importing = commands.add_parser("import", parents=[overwrite], help="make a checkpoint folder of published files")
    add = importing.add_argument
    add("--checkpoint", required=True, type=Path, metavar="FOLDER", help="made, or completed")
    add("--vae", type=Path, metavar="PATH", help="AudioLDM's .ckpt, Tango's pytorch_model_vae.bin, or a vae/ folder")
    add("--vocoder", nargs=2, action="append", default=[], metavar=("HZ", "PATH"),
        help="the same files, a vocoder/ folder, or one of HiFi-GAN's g_* that takes these mels; may be repeated")
    add("--discriminators", nargs=2, action="append", default=[], metavar=("HZ", "PATH"),
        help="HiFi-GAN's do_*, to go on training that vocoder; may be repeated")
    add("--unet", type=Path, metavar="PATH", help="a unet/ folder, or Tango's pytorch_model_main.bin")
    add("--add-tokens", action="store_true", help="give that U-Net untrained time and rate tokens, to train them")
    add("--flan-t5", type=Path, metavar="PATH",
        help="a FLAN-T5 folder; or Tango's pytorch_model_main.bin with FLAN-T5's spiece.model beside it")

    copying = argparse.ArgumentParser(add_help=False, parents=[overwrite])
    copying.add_argument("--checkpoint", required=True, type=Path, metavar="FOLDER")
    copying.add_argument("--out", required=True, type=Path, metavar="FOLDER")
    commands.add_parser("export", parents=[copying], help="write folders for diffusers and transformers")
    commands.add_parser("halve", parents=[copying], help="copy a checkpoint in float16")

    args = parser.parse_args()
    if args.command == "import":
        try:
            args.vocoder = [(int(rate), Path(path)) for rate, path in args.vocoder]
            args.discriminators = [(int(rate), Path(path)) for rate, path in args.discriminators]
        except ValueError:
            parser.error("--vocoder and --discriminators take a sampling rate in Hz, then a path")
        if args.add_tokens and not args.unet:
            parser.error("--add-tokens is for the U-Net that --unet names")
    return args


def main() -> None:
    args = parse()
    {"import": import_checkpoint, "export": export_checkpoint, "halve": halve_checkpoint}[args.command](args)


if __name__ == "__main__":
    from srcgaudio import exit_cleanly
    exit_cleanly(main)
