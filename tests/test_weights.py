"""Published weights in, ours out.  Each format of the golden data, filled and saved as the real file would be, goes
through the loaders and must compute what the reference computed; bad files must end in one clean line, and what is
exported must come back."""
import io
import json
import math
import pickle
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import HERE, error, untrained
from conftest import golden as reference
from fuzz_weights import corrupt, load_in_child, make_samples
from golden import fill
from torch import nn

import weights
from srcgaudio import T5_NAMES, NoiseSchedule, SRCgAudio, TextEncoder, diffusion_loss
from unet import DIFFUSERS_NAMES as UNET_NAMES
from unet import UNet
from vae import AUDIOLDM_NAMES, VAE
from vae import DIFFUSERS_NAMES as VAE_NAMES
from vocoder import DISCRIMINATOR_NAMES, STRIDES, Generator, Discriminators

TOLERANCE = 1e-4                                         # of the reference's largest value
T5_CONFIG = {"feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 32, "layer_norm_epsilon": 1e-6}
FLAN_T5_SMALL = T5_CONFIG | {"d_model": 512, "num_layers": 8, "num_heads": 6, "d_kv": 64, "d_ff": 1024,
                             "vocab_size": 32128}
HIFIGAN_V2 = {"resblock": "1", "upsample_rates": [8, 8, 2, 2], "upsample_kernel_sizes": [16, 16, 4, 4],
              "upsample_initial_channel": 128, "resblock_kernel_sizes": [3, 7, 11],
              "resblock_dilation_sizes": [[1, 3, 5]] * 3, "num_mels": 80}


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    return fill.read_shapes(HERE / "golden" / f"{name}.tsv")


def filled(name: str) -> weights.Weights:
    """The tensors of a published format, with the numbers that the reference had."""
    return {key: torch.as_tensor(array) for key, array in fill.weights(shapes(name)).items()}


def meta(name: str, prefix: str = "") -> weights.Weights:
    """Tensors of the right shapes that take no memory."""
    return {prefix + key: torch.empty(shape, device="meta") for key, shape in shapes(name).items()}


def write_folder(folder, tensors: weights.Weights, file: str, config: dict):
    """A Hugging Face folder with one weight file."""
    folder.mkdir(exist_ok=True)
    (weights.save_safetensors if file.endswith(".safetensors") else weights.save)(tensors, folder / file)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def tokenizer(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "spiece.model"
    path.write_bytes(model.text_encoder.tokenizer.serialized_model_proto())
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Each format computes what its reference computes


@torch.inference_mode()
def vae_error(vae: VAE, golden: dict[str, torch.Tensor]) -> float:
    mean, logvar = vae.encode(golden["mel"][:, 0])
    errors = [error(mean, golden["mean"]), error(vae.decode(golden["z"]), golden["decoded"][:, 0])]
    return max(errors + [error(logvar, golden["logvar"])] if "logvar" in golden else errors)


@torch.inference_mode()
def vocoder_error(generator: Generator, golden: dict[str, torch.Tensor]) -> float:
    wave = generator(golden["vocoder_mel"].transpose(1, 2))                       # (B, frames * hop)
    expected = golden["wave"].flatten(0, -2)                                      # (B, a few samples more)
    assert wave.shape[1] == golden["vocoder_mel"].shape[2] * generator.hop
    return error(wave, expected[:, :wave.shape[1]])


def test_audioldm_checkpoint(tmp_path):
    state = filled("audioldm_ckpt")
    others = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4), "betas": torch.zeros(1000),
              "cond_stage_model.model.logit_scale_a": torch.zeros(()), "first_stage_model.loss.logvar": torch.zeros(()),
              "first_stage_model.loss.discriminator.main.0.bias": torch.zeros(64)}
    torch.save({"state_dict": others | state, "global_step": 7, "lr_schedulers": []}, tmp_path / "audioldm.ckpt")
    golden = reference("audioldm_ckpt")
    vae = VAE.from_pretrained(tmp_path / "audioldm.ckpt")
    assert vae_error(vae, golden) < TOLERANCE
    assert vae.scale_factor == state["scale_factor"]
    assert vocoder_error(Generator.from_pretrained(tmp_path / "audioldm.ckpt"), golden) < TOLERANCE

    # Tango keeps the same two under shorter names, and the scale factor in a JSON file
    tango = weights.under(state, "first_stage_model.")
    torch.save(tango, tmp_path / "pytorch_model_vae.bin")
    with pytest.warns(UserWarning, match="pytorch_model_vae.bin: there is no scale factor"):
        assert VAE.from_pretrained(tmp_path / "pytorch_model_vae.bin").scale_factor == 1
    (tmp_path / "vae_config.json").write_text('{"image_key": "fbank", "scale_factor": 0.9227914214134216}')
    (tmp_path / "config.json").write_text('{"text_encoder_name": "google/flan-t5-large"}')
    vae = VAE.from_pretrained(tmp_path / "pytorch_model_vae.bin")
    assert vae.scale_factor.item() == pytest.approx(0.92279, abs=1e-5)
    assert all(tensor.equal(tango[name]) for name, tensor
               in weights.rename(vae.state_dict(), AUDIOLDM_NAMES, backwards=True).items() if name != "scale_factor")
    assert vocoder_error(Generator.from_pretrained(tmp_path / "pytorch_model_vae.bin"), golden) < TOLERANCE


def test_diffusers_vae(tmp_path):
    state, golden, config = filled("diffusers_vae"), reference("diffusers_vae"), {"scaling_factor": 0.9227914214134216}
    folder = write_folder(tmp_path / "vae", state, "diffusion_pytorch_model.safetensors", config)
    vae = VAE.from_pretrained(folder)
    assert vae_error(vae, golden) < TOLERANCE
    assert vae.scale_factor.item() == pytest.approx(0.92279, abs=1e-5)
    (folder / "config.json").write_text(json.dumps(config | {"act_fn": "relu"}))
    with pytest.raises(ValueError, match="config.json: act_fn is relu, expected silu"):
        VAE.from_pretrained(folder)

    # before March 2023: other names for attention; and in some files its layers are 1 x 1 convolutions
    old = {}
    for name, tensor in state.items():
        for new_name, old_name in [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")]:
            name = name.replace(f".{new_name}.", f".{old_name}.")
        old[name] = tensor[:, :, None, None] if name.endswith("query.weight") else tensor
    folder = write_folder(tmp_path / "old", old, "diffusion_pytorch_model.bin", config)
    assert all(a.equal(b) for a, b in zip(VAE.from_pretrained(folder).state_dict().values(), vae.state_dict().values()))


def test_transformers_vocoder(tmp_path):
    config = {"upsample_rates": [5, 4, 2, 2, 2], "model_in_dim": 64, "normalize_before": False, "leaky_relu_slope": 0.1}
    folder = write_folder(tmp_path / "vocoder", filled("transformers_hifigan"), "model.safetensors", config)
    assert vocoder_error(Generator.from_pretrained(folder), reference("transformers_hifigan")) < TOLERANCE
    for wrong in ({"normalize_before": True}, {"resblock_dilation_sizes": [[1, 2, 3]] * 3}):
        (folder / "config.json").write_text(json.dumps(config | wrong))
        with pytest.raises(ValueError, match=f"config.json: {list(wrong)[0]} is .*, expected"):
            Generator.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json: upsample_rates is \[5, 4, 2, .*, expected \[5, 4, 3, "):
        Generator.from_pretrained(folder, STRIDES[24_000])


def test_hifigan_with_weight_norm(tmp_path):
    state, golden = filled("jik876_hifigan_v2"), reference("jik876_hifigan_v2")
    torch.save({"generator": state}, tmp_path / "g_02500000", _use_new_zipfile_serialization=False)   # as in 2020
    strides = HIFIGAN_V2["upsample_rates"]
    assert vocoder_error(Generator.from_pretrained(tmp_path / "g_02500000", strides), golden) < TOLERANCE
    (tmp_path / "config.json").write_text(json.dumps(HIFIGAN_V2))
    assert vocoder_error(Generator.from_pretrained(tmp_path / "g_02500000", strides), golden) < TOLERANCE
    with pytest.raises(ValueError, match=r"config.json: upsample_rates is \[8, 8, 2, 2\], expected \[4"):
        Generator.from_pretrained(tmp_path / "g_02500000", (4, 4, 4, 4))

    torch.save(weights.rename(state, [(".weight_g", ".parametrizations.weight.original0"),
                                      (".weight_v", ".parametrizations.weight.original1")]), tmp_path / "new.pt")
    assert vocoder_error(Generator.from_pretrained(tmp_path / "new.pt", strides), golden) < TOLERANCE
    ours = Generator(STRIDES[48_000], channels=32)
    (tmp_path / "ours").mkdir()
    weights.save(ours.state_dict(), tmp_path / "ours" / "vocoder_48000.pt")
    again = Generator.from_pretrained(tmp_path / "ours" / "vocoder_48000.pt", STRIDES[48_000])
    assert again.hop == 480 and all(a.equal(b) for a, b in zip(again.state_dict().values(), ours.state_dict().values()))


def test_flan_t5(tmp_path, tokenizer):
    state, golden = filled("flan_t5_small"), reference("flan_t5_small")
    decoder = {"decoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(384, 512),
               "decoder.final_layer_norm.weight": torch.zeros(512), "lm_head.weight": torch.zeros(10, 512)}
    published = state | {"encoder.embed_tokens.weight": state["shared.weight"]} | decoder

    whole = write_folder(tmp_path / "whole", published, "pytorch_model.bin", FLAN_T5_SMALL)
    shards = write_folder(tmp_path / "shards", {}, "unused.safetensors", FLAN_T5_SMALL)
    names = [name for name in published if name != "encoder.embed_tokens.weight"]           # safetensors: only once
    parts = {"model-00001-of-00002.safetensors": names[:40], "model-00002-of-00002.safetensors": names[40:]}
    for file, part in parts.items():
        weights.save_safetensors({name: published[name] for name in part}, shards / file)
    index = {"metadata": {"total_size": 1}, "weight_map": {name: file for file in parts for name in parts[file]}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))

    for folder in (whole, shards):
        shutil.copy(tokenizer, folder)
        encoder = TextEncoder.from_pretrained(folder)
        with torch.inference_mode():
            hidden = encoder(golden["input_ids"], golden["mask"].bool())
        assert error(hidden, golden["hidden"]) < TOLERANCE
        assert encoder.tokenize(["a dog barks"])[0][0, -1] == encoder.END

    for wrong in ({"feed_forward_proj": "relu"}, {"d_model": 1024}, {"num_layers": 12}):
        (whole / "config.json").write_text(json.dumps(FLAN_T5_SMALL | wrong))
        with pytest.raises(ValueError, match=f"config.json: {list(wrong)[0]} is {list(wrong.values())[0]}, expected"):
            TextEncoder.from_pretrained(whole)
    index["weight_map"]["shared.weight"] = "../whole/pytorch_model.bin"
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="index.json: its weight_map must give each tensor the name of a file in"):
        TextEncoder.from_pretrained(shards)
    index["weight_map"]["shared.weight"] = "model-00002-of-00002.safetensors"
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="00002.safetensors: tensor shared.weight is missing, which model.safetensors"):
        TextEncoder.from_pretrained(shards)


def test_diffusers_unet(tmp_path):
    config = {"attention_head_dim": [2, 4, 4, 8], "flip_sin_to_cos": True, "block_out_channels": [64, 128, 128, 256]}
    folder = write_folder(tmp_path / "unet", filled("diffusers_unet_small"), "diffusion_pytorch_model.bin", config)
    unet, golden = UNet.from_pretrained(folder), reference("diffusers_unet_small")
    with torch.inference_mode():
        noise = unet(golden["z_t"], golden["t"], golden["c"], golden["mask"])
    assert error(noise, golden["noise"]) < TOLERANCE
    assert unet.time_token is unet.rate_token is None and unet.predicts == "eps"
    (tmp_path / "scheduler").mkdir()
    for file, wrong in [(folder / "config.json", {"downsample_padding": 0}),
                        (tmp_path / "scheduler/scheduler_config.json", {"beta_schedule": "linear"}),
                        (tmp_path / "scheduler/scheduler_config.json", {"prediction_type": "sample"})]:
        file.write_text(json.dumps(config | wrong))
        with pytest.raises(ValueError, match=f"{file.name}: {list(wrong)[0]} is {list(wrong.values())[0]}, expected"):
            UNet.from_pretrained(folder)
        file.write_text(json.dumps(config))


# ---------------------------------------------------------------------------------------------------------------------
# Formats of which only the shapes are known: every tensor must find its place


@pytest.mark.parametrize("name, prefix, parameters, predicts", [
    ("diffusers_unet_paper", "", 559.05e6, "eps"), ("tango_unet", "unet.", 865.93e6, "v")])
def test_large_unets(monkeypatch, name, prefix, parameters, predicts):
    tensors = meta(name, prefix) | ({"text_encoder.shared.weight": torch.empty(1)} if prefix else {})
    monkeypatch.setattr(weights, "read", lambda path: tensors)
    sizes, published, source, names = UNet.published("pytorch_model_main.bin")
    with torch.device("meta"):
        unet = UNet(**sizes)
    expected = weights.check(unet, published, source, names)
    assert expected.keys() == shapes(name).keys() and unet.predicts == predicts
    assert sum(p.numel() for p in unet.parameters()) == pytest.approx(parameters, abs=5e3)
    assert sizes["heads"] == [5, 10, *((20, 20) if prefix else (10, 20))]
    with pytest.raises(ValueError, match="main.bin: tensor conv_out.bias is missing"):
        weights.check(unet, {key: value for key, value in published.items() if key != "conv_out.bias"}, source, names)


def write_sparse(names_and_shapes: dict[str, tuple[int, ...]], path) -> None:
    """A .safetensors file of zeros in half precision that takes no space on the disk."""
    header, end = {}, 0
    for name, shape in names_and_shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    start = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(start).to_bytes(8, "little") + start)
        file.truncate(8 + len(start) + end)


def test_flan_t5_large_without_its_decoder(tmp_path, tokenizer):
    """An encoder of 341 M beside a decoder as large: the encoder is copied from the mapped file, no more is touched."""
    encoder = shapes("flan_t5_large")
    del encoder["encoder.embed_tokens.weight"]
    decoder = {"decoder." + name: shape for name, shape in encoder.items()}
    write_sparse(encoder | decoder | {"lm_head.weight": (32128, 1024)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(T5_CONFIG | {
        "d_model": 1024, "num_layers": 24, "num_heads": 16, "d_kv": 64, "d_ff": 2816, "vocab_size": 32128}))
    shutil.copy(tokenizer, tmp_path / "spiece.model")
    program = """if True:
        import sys
        from srcgaudio import TextEncoder
        from tests.fuzz_weights import peak_memory
        before = peak_memory()
        encoder = TextEncoder.from_pretrained(sys.argv[1])
        print(sum(p.numel() for p in encoder.parameters()), (peak_memory() - before) / 1e9)"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, cwd=HERE.parent)
    parameters, gigabytes = done.stdout.split()
    assert int(parameters) == 341_231_104
    assert float(gigabytes) < 0.3413 * (4 + 2) + 0.2      # the copy, and the mapped pages it was copied from


def test_discriminators(tmp_path):
    state = {name: torch.zeros(shape) for name, shape in shapes("jik876_discriminators").items()}
    torch.save({"mpd": weights.under(state, "mpd."), "msd": weights.under(state, "msd."), "steps": 7, "epoch": 1,
                "optim_g": {"state": {0: {"step": 7, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}},
               tmp_path / "do_02500000")
    loaded = Discriminators.from_pretrained(tmp_path / "do_02500000")
    assert weights.rename(loaded.state_dict(), DISCRIMINATOR_NAMES, backwards=True).keys() == state.keys()


def test_discriminators_have_the_weights_that_their_norms_mean(tmp_path):
    torch.manual_seed(0)
    published = weights.rename(Discriminators(2, 8).state_dict(), DISCRIMINATOR_NAMES, backwards=True)
    published = {name: torch.randn_like(tensor) for name, tensor in published.items()}
    for name in published:
        if name.endswith(("weight_u", "weight_v")) and "msd.discriminators.0" in name:
            published[name] = nn.functional.normalize(published[name], dim=0)
    torch.save(published, tmp_path / "do")
    loaded = Discriminators.from_pretrained(tmp_path / "do").eval()
    name = "msd.discriminators.0.convs.1.weight_"         # spectral norm: w / (u^T w v)
    w, u, v = (published[name + part] for part in ("orig", "u", "v"))
    assert error(loaded.msd.discriminators[0].convs[1].weight, w / (u @ w.flatten(1) @ v)) < 1e-5
    name = "mpd.discriminators.3.convs.2.weight_"         # weight norm: g v / |v|
    g, v = (published[name + part] for part in ("g", "v"))
    assert error(loaded.mpd.discriminators[3].convs[2].weight,
                 g * v / v.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Tango: its network predicts v, has no tokens for t and the rate, and lies beside its text encoder


def test_v_becomes_eps():
    schedule, t = NoiseSchedule(), torch.tensor([0, 300, 999])
    z_0, eps = torch.randn(2, 3, 8, 4, 16, dtype=torch.float64)
    z_t = schedule.add_noise(z_0, eps, t)
    alpha_bar = schedule.alpha_bar[t].view(-1, 1, 1, 1)
    v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * z_0                     # its definition
    assert torch.allclose(schedule.eps_from_v(v, z_t, t), eps)


class Knows(nn.Module):
    """A network that predicts eps, or v, of one clean latent without fail."""

    def __init__(self, z_0: torch.Tensor, predicts: str):
        super().__init__()
        self.z_0, self.predicts, self.multiple, self.alpha_bar = z_0, predicts, 8, NoiseSchedule().alpha_bar

    def condition(self, t, rate, text, text_mask):
        return text, text_mask

    def forward(self, z_t, t, c, c_mask):
        alpha_bar = self.alpha_bar[t].view(-1, 1, 1, 1).to(z_t.dtype)
        eps = (z_t - alpha_bar.sqrt() * self.z_0) / (1 - alpha_bar).sqrt()
        return eps if self.predicts == "eps" else alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * self.z_0


def test_a_network_that_predicts_v_trains_and_generates_like_one_that_predicts_eps(monkeypatch):
    torch.manual_seed(0)
    model, z_0, t = untrained(), torch.randn(1, 8, 8, 16), torch.tensor([1, 500, 998])
    eps, text, mask = torch.randn(3, 8, 8, 16), torch.zeros(3, 1, 64), torch.ones(3, 1, dtype=torch.bool)
    waves = []
    for predicts in ("eps", "v"):
        model.unet = Knows(z_0, predicts)
        loss = diffusion_loss(model.unet, model.schedule, z_0.expand(3, -1, -1, -1), eps, t, None, text, mask)
        assert loss.max() < 1e-6
        waves.append(model.to("cpu", "fp32").generate(["rain"], 16_000, 0.32, steps=10))
    assert error(waves[1], waves[0]) < 1e-3


@pytest.fixture
def tango(tmp_path, tokenizer):
    """A small Tango: its three files and FLAN-T5's spiece.model.  -> folder, U-Net, text encoder, VAE, vocoder"""
    torch.manual_seed(1)
    folder = tmp_path / "tango"
    folder.mkdir()
    unet = UNet((64, 64, 128, 128), (1, 1, 2, 2), context_width=64, blocks=1, tokens=(), predicts="v")
    encoder = TextEncoder(vocabulary=150, width=64, layers=2, heads=2, head_width=32, ff_width=96)
    vae, vocoder = VAE((32, 32, 64), blocks=1), Generator(channels=64)
    main = weights.rename(unet.state_dict(), UNET_NAMES, backwards=True)
    text = weights.rename(encoder.state_dict(), T5_NAMES, backwards=True)
    text["encoder.embed_tokens.weight"] = text["shared.weight"]
    torch.save({f"text_encoder.{n}": x for n, x in text.items()} | {f"unet.{n}": x for n, x in main.items()},
               folder / "pytorch_model_main.bin")
    both = weights.rename(vae.state_dict(), AUDIOLDM_NAMES, backwards=True)
    del both["scale_factor"]
    torch.save(both | {f"vocoder.{n}": x for n, x in vocoder.state_dict().items()}, folder / "pytorch_model_vae.bin")
    (folder / "vae_config.json").write_text('{"scale_factor": 0.9}')
    (folder / "config.json").write_text('{"scheduler_name": "stabilityai/stable-diffusion-2-1"}')
    shutil.copy(tokenizer, folder / "spiece.model")
    return folder, unet, encoder, vae, vocoder


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()        # str: no tensor tells a norm's groups
    return str(a) == str(b) and ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


def test_import_makes_tango_run(tango, tmp_path, command, succeed):
    folder, unet, encoder, vae, vocoder = tango
    arguments = ["import", "--checkpoint", tmp_path / "ours", "--unet", folder / "pytorch_model_main.bin",
                 "--flan-t5", folder / "pytorch_model_main.bin", "--vae", folder / "pytorch_model_vae.bin",
                 "--vocoder", 16_000, folder / "pytorch_model_vae.bin"]
    succeed("weights.py", *arguments)
    model = SRCgAudio.load(tmp_path / "ours")
    assert same(model.unet, unet) and same(model.text_encoder, encoder) and same(model.vocoders[16_000], vocoder)
    assert model.unet.predicts == "v" and model.vae.scale_factor.item() == pytest.approx(0.9)
    wave = model.generate(["rain"], 16_000, 0.32, steps=2)
    assert wave.shape == (1, 5120) and wave.isfinite().all()

    status, out, err = command("weights.py", *arguments)
    assert status == 2 and "vae.pt exists" in err and "--overwrite" in err and len(err.splitlines()) == 1
    succeed("weights.py", *arguments, "--overwrite", "--add-tokens")
    status, out, err = command("weights.py", "import", "--checkpoint", tmp_path / "ours", "--vae",
                               folder / "pytorch_model_vae.bin", "--overwrite")
    assert status == 2 and "unet.pt knows the latents" in err and len(err.splitlines()) == 1, err

    wide = weights.rename(UNet((64, 64, 128, 128), (1, 1, 2, 2), context_width=96, blocks=1, tokens=()).state_dict(),
                          UNET_NAMES, backwards=True)
    torch.save({f"unet.{name}": tensor for name, tensor in wide.items()}, tmp_path / "wide.bin")
    status, out, err = command("weights.py", "import", "--checkpoint", tmp_path / "ours", "--unet",
                               tmp_path / "wide.bin", "--overwrite")
    assert status == 2 and "64" in err and "96" in err and len(err.splitlines()) == 1, err


def test_an_import_replaces_no_text_encoder_unasked(checkpoint, tmp_path, command, succeed):
    ours = shutil.copytree(checkpoint, tmp_path / "ours")
    succeed("weights.py", "export", "--checkpoint", checkpoint, "--out", tmp_path / "exported")
    status, _, err = command("weights.py", "import", "--checkpoint", ours, "--flan-t5",
                             tmp_path / "exported" / "text_encoder")
    assert status == 2 and "text_encoder.pt exists" in err, err


def test_tango_begins_a_joint_training(tango):
    folder, plain, *_ = tango
    unet = UNet.from_pretrained(folder / "pytorch_model_main.bin", add_tokens=("time", "rate"))
    assert unet.conv_in.weight.equal(plain.conv_in.weight) and unet.predicts == "v"
    loss = diffusion_loss(unet, NoiseSchedule(), torch.randn(2, 8, 8, 16), torch.randn(2, 8, 8, 16),
                          torch.tensor([3, 900]), torch.tensor([16_000, 48_000]), torch.randn(2, 3, 64),
                          torch.ones(2, 3, dtype=torch.bool)).sum()
    loss.backward()
    assert unet.rate_token.weight.grad.abs().max() > 0 and unet.time_token.weight.grad.abs().max() > 0


def test_import_of_vocoders(tmp_path, command, succeed):
    generator, disc = Generator(STRIDES[48_000], channels=64), Discriminators(2, 8)
    weights.save(generator.state_dict(), tmp_path / "g")
    torch.save(weights.rename(disc.state_dict(), DISCRIMINATOR_NAMES, backwards=True), tmp_path / "do")
    ours = tmp_path / "ours"
    succeed("weights.py", "import", "--checkpoint", ours, "--vocoder", 48_000, tmp_path / "g", "--discriminators",
            48_000, tmp_path / "do")
    assert same(SRCgAudio.load_vocoder(ours, 48_000), generator)
    with pytest.raises(ValueError, match="no sampling rate 44100"):
        SRCgAudio.load_vocoder(ours, 44_100)
    again = Discriminators(2, 8)
    weights.load(again, weights.read(ours / "discriminators_48000.pt"), "it")
    assert same(again, disc)

    weights.save(Generator(channels=32).state_dict(), tmp_path / "narrow")
    for arguments, parts in [
            ((16_000, tmp_path / "narrow"), ["narrow", "channels", "32", "64"]),
            ((44_100, tmp_path / "g"), ["44100"]), ((16_000, tmp_path / "nothing"), ["nothing: no such weight file"]),
            ((16_000, tmp_path / "g", "--vocoder", 16_000, tmp_path / "g"), ["--vocoder 16000 is there twice"]),
            ((16_000, tmp_path / "do"), ["do: tensor msd.discriminators.0.convs.0.weight_g is missing"])]:
        status, _, err = command("weights.py", "import", "--checkpoint", ours, "--vocoder", *arguments)
        assert status == 2 and len(err.splitlines()) == 1 and all(part in err for part in parts), err
    assert not (ours / "vocoder_16000.pt").exists()
    status, _, err = command("weights.py", "import", "--checkpoint", tmp_path / "none")
    assert status == 2 and "nothing to import" in err and not (tmp_path / "none").exists(), err


# ---------------------------------------------------------------------------------------------------------------------
# Export


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny model with a scale factor, and its export."""
    model, folder = untrained(seed=3), tmp_path_factory.mktemp("export")
    model.vae.scale_factor.fill_(0.7)
    model.save(folder / "ours")
    done = subprocess.run([sys.executable, "weights.py", "export", "--checkpoint", folder / "ours",
                           "--out", folder / "theirs"], capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stderr
    return model, folder / "theirs"


def test_exports_come_back(exported):
    model, folder = exported
    assert same(UNet.from_pretrained(folder / "unet"), model.unet)
    assert same(VAE.from_pretrained(folder / "vae"), model.vae)
    encoder = TextEncoder.from_pretrained(folder / "text_encoder")
    assert same(encoder, model.text_encoder)
    texts = ["a dog barks", "rain"]
    assert encoder.tokenize(texts)[0].equal(model.text_encoder.tokenize(texts)[0])


def test_half_a_checkpoint_is_half_the_size_and_sounds_the_same(command, succeed, checkpoint, tmp_path):
    (tmp_path / "whole").mkdir()
    for path in checkpoint.iterdir():
        shutil.copy(path, tmp_path / "whole")
    (tmp_path / "whole" / "discriminators_16000.pt").write_bytes(b"only for training")
    arguments = ("halve", "--checkpoint", tmp_path / "whole", "--out", tmp_path / "half")
    succeed("weights.py", *arguments)
    assert {path.name for path in (tmp_path / "half").iterdir()} == {path.name for path in checkpoint.iterdir()}
    assert (tmp_path / "half" / "unet.pt").stat().st_size < 0.55 * (checkpoint / "unet.pt").stat().st_size
    waves = [SRCgAudio.load(folder, [16_000]).generate(["a dog barks"], 16_000, 0.5, steps=2)
             for folder in (checkpoint, tmp_path / "half")]
    assert (waves[0] - waves[1]).abs().max() < 0.01 * waves[0].abs().max()
    status, _, err = command("weights.py", *arguments)
    assert status == 2 and "config.json exists" in err and "--overwrite" in err
    (tmp_path / "half/config.json").unlink()
    status, _, err = command("weights.py", *arguments)
    assert status == 2 and ".pt exists" in err and "--overwrite" in err
    (tmp_path / "whole" / "vocoder_48000.pt").unlink()
    status, _, err = command("weights.py", *arguments, "--overwrite")
    assert status == 2 and "vocoder_48000.pt is another model's" in err


def test_exports_have_the_published_names_and_shapes():
    """What a paper-size export writes is what the golden data says the published files hold."""
    with torch.device("meta"):
        unet, vae, encoder = UNet(), VAE(), TextEncoder()
    for module, names, golden in [(unet, UNET_NAMES, "diffusers_unet_paper"), (vae, VAE_NAMES, "diffusers_vae"),
                                  (encoder, T5_NAMES, "flan_t5_large")]:
        written = {name: tuple(tensor.shape) for name, tensor
                   in weights.rename(module.state_dict(), names, backwards=True).items()
                   if not name.startswith(("time_token.", "rate_token.", "scale_factor"))}     # ours alone
        expected = shapes(golden)
        expected.pop("encoder.embed_tokens.weight", None)
        assert written.keys() == expected.keys()
        assert all(written[name] == shape or written[name] == shape + (1, 1) for name, shape in expected.items())


@pytest.mark.filterwarnings("ignore")
def test_diffusers_and_transformers_open_the_exports(exported):
    diffusers = pytest.importorskip("diffusers", reason="takes diffusers and transformers, which the project does not")
    transformers = pytest.importorskip("transformers", reason="takes transformers, which the project does not")
    model, folder = exported
    torch.manual_seed(0)
    t, rate, text = torch.tensor([3, 900]), torch.tensor([16_000, 48_000]), torch.randn(2, 5, 64)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    z_t, mel = torch.randn(2, 8, 16, 16), torch.randn(2, 32, 64)
    errors = {}
    with torch.inference_mode():
        c, c_mask = model.unet.eval().condition(t, rate, text, mask)
        theirs = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").eval()
        errors["unet"] = error(theirs(z_t, t, c, encoder_attention_mask=c_mask).sample, model.unet(z_t, t, c, c_mask))

        theirs = diffusers.AutoencoderKL.from_pretrained(folder / "vae").eval()
        errors["mean"] = error(theirs.encode(mel[:, None]).latent_dist.mean, model.vae.encode(mel)[0])
        errors["decoded"] = error(theirs.decode(z_t).sample[:, 0], model.vae.decode(z_t))
        assert theirs.config.scaling_factor == pytest.approx(0.7)

        ids, mask = model.text_encoder.tokenize(["a dog barks", "rain falls on a roof"])
        theirs = transformers.T5EncoderModel.from_pretrained(folder / "text_encoder").eval()
        hidden = theirs(ids, attention_mask=mask.long()).last_hidden_state
        errors["text"] = error(hidden[mask], model.text_encoder(ids, mask)[mask])

        scheduler = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")
        scheduler.set_timesteps(20)
        assert scheduler.timesteps.tolist() == model.schedule.ddim_timesteps(20)
        z = theirs_z = torch.randn(1, 8, 4, 16, dtype=torch.float64)
        z = model.schedule.ddim(lambda z, t: torch.tanh(z), z, 20)
        for step in scheduler.timesteps:
            theirs_z = scheduler.step(torch.tanh(theirs_z), step, theirs_z).prev_sample
        errors["ddim"] = error(z, theirs_z)
    print(errors)
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.filterwarnings("ignore")
def test_transformers_opens_the_exported_tokenizer(exported):
    transformers = pytest.importorskip("transformers", reason="takes transformers, which the project does not")
    pytest.importorskip("google.protobuf", reason="transformers reads sentencepiece models with protobuf")
    model, folder = exported
    texts = ["a dog barks", "rain falls on a roof", ""]
    theirs = transformers.AutoTokenizer.from_pretrained(folder / "text_encoder")(texts, padding=True,
                                                                                 return_tensors="pt")
    ids, mask = model.text_encoder.tokenize(texts)
    assert theirs.input_ids.equal(ids) and theirs.attention_mask.bool().equal(mask)


# ---------------------------------------------------------------------------------------------------------------------
# Bad files


class Code:
    def __reduce__(self):
        return print, ("code from a weight file ran",)


class Bomb:
    def __reduce__(self):
        return bytearray, (2 ** 40,)


def header(entries: dict, length: int | None = None, data: bytes = bytes(16)) -> bytes:
    start = json.dumps(entries).encode()
    return (len(start) if length is None else length).to_bytes(8, "little") + start + data


def entry(shape=(2, 2), offsets=(0, 16), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("content, reason", [
    (b"", "empty"), (b"\1\2\3", "header"), (header({"a": entry()}, length=2 ** 60), "header should have"),
    (header({"a": entry()}, length=2 ** 63), "header should have"), (header({"a": entry()}, length=3), ""),
    ((9).to_bytes(8, "little") + b"[1, 2, 3]", ""), ((5 * 10 ** 5).to_bytes(8, "little") + b"[" * 5 * 10 ** 5, ""),
    (header({"a": 3}), "tensor a needs dtype, shape and data_offsets"),
    (header({"a": entry() | {"more": 1}}), "tensor a needs dtype"),
    (header({"a": entry(dtype="F31")}), "tensor a has the unknown dtype F31"),
    (header({"a": entry(dtype=[])}), "dtype"),
    (header({"a": entry(shape=(2 ** 40, 2 ** 40))}), "tensor a has the shape"),
    (header({"a": entry(shape=(-2, -2))}), "tensor a has the shape"),
    (header({"a": entry(shape=(2.0, 2))}), "tensor a has the shape"),
    (header({"a": entry(shape=(3, 2))}), "tensor a lies at 0 to 16; 6 entries"),
    (header({"a": entry(offsets=(0, 20))}), "tensor a lies at 0 to 20"),
    (header({"a": entry(offsets=(16, 0))}), "tensor a lies at 16 to 0"),
    (header({"a": entry(offsets=(8, 24))}, data=bytes(24)), "tensor a lies at 8 to 24"),
    (header({"a": entry(), "b": entry(offsets=(8, 24))}, data=bytes(24)), "tensor b lies at 8 to 24"),
    (header({"a": entry(), "b": entry(offsets=(16, 32))}), "tensor b lies at 16 to 32"),
    (header({"a": entry()}, data=bytes(20)), "4 bytes belong to no tensor"),
    (header({"a\nb": entry()}), "not printable"),
])
def test_bad_safetensors(tmp_path, content, reason):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        weights.read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: damaged") and reason in message and len(message.splitlines()) == 1


def test_good_safetensors(tmp_path):
    path = tmp_path / "good.safetensors"
    odd = header({"__metadata__": {"format": "pt"}, "a": entry(), "none": entry((0, 3), (16, 16))})
    path.write_bytes(odd)                                # the data starts wherever the header ends
    read = weights.read(path)
    assert read["a"].tolist() == [[0, 0], [0, 0]] and read["none"].shape == (0, 3)
    tensors = {"scalar": torch.tensor(2.5), "a.b": torch.randn(3, 4).T, "none": torch.zeros(0)}
    weights.save_safetensors(tensors, path)
    assert all(tensor.equal(tensors[name]) for name, tensor in weights.read(path).items())


def pickled(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def compressed(content: bytes) -> bytes:
    """The same zip archive, its entries deflated."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return file.getvalue()


def test_bad_pytorch_files(tmp_path, capsys):
    path = tmp_path / "bad.pt"
    good = pickled({"a": torch.zeros(100)})
    for content, reason in [
            (b"", ""), (good[:-100], ""), (b"PK\3\4" + bytes(100), ""), (pickle.dumps({"a": Code()}), "it calls code"),
            (pickled({"a": Code()}), "it calls __builtin__.print"), (pickled({"a": Bomb()}), "bytearray"),
            (pickle.dumps({"a": Bomb()}, 2), "bytearray"), (compressed(good), "compressed"),
            (pickled({"a": Bomb()}).replace(b"data.pkl", b"DATA.PKL"), "bytearray"),       # torch finds it all the same
            (b'{"a": 1}', ""), (header({"a": entry()}), "")]:
        path.write_bytes(content)
        with pytest.raises(ValueError) as caught:
            weights.read(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: damaged") and reason in message and len(message.splitlines()) == 1, message
    assert "code from a weight file" not in capsys.readouterr().out

    forged = {"shared": torch.zeros(1).expand(10 ** 9), "fine": torch.ones(2)}
    forged["itself"] = forged
    path.write_bytes(pickled(forged))
    assert weights.read(path).keys() == {"fine"}


def test_nothing_is_half_loaded():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    fine = {name: torch.ones_like(tensor) for name, tensor in before.items()}
    for bad, reason in [({**fine, "1.bias": torch.ones(3)}, r"it: tensor 1.bias has shape \(3,\), expected \(2,\)"),
                        ({n: t for n, t in fine.items() if n != "1.bias"}, "it: tensor 1.bias is missing"),
                        ({**fine, "2.bias": torch.ones(2)}, "it: unknown tensor 2.bias")]:
        with pytest.raises(ValueError, match=reason):
            weights.load(module, bad, "it")
        assert all(tensor.equal(before[name]) for name, tensor in module.state_dict().items())
    parameters = list(module.parameters())               # what an optimizer would hold
    weights.load(module, fine, "it")
    assert all(parameter.eq(1).all() for parameter in parameters)
    fine["1.bias"].zero_()                               # what was loaded is a copy
    assert module[1].bias.tolist() == [1, 1]


@pytest.mark.filterwarnings("ignore:.*no scale factor")
def test_errors_name_the_key_as_the_file_has_it(tango, tmp_path):
    folder, *_ = tango
    content = weights.read(folder / "pytorch_model_main.bin")
    key = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    torch.save(content | {f"unet.{key}": torch.zeros(3, 64)}, tmp_path / "main.bin")
    with pytest.raises(ValueError, match=rf"main.bin: tensor {key} has shape \(3, 64\), expected \(64, 64\)"):
        UNet.from_pretrained(tmp_path / "main.bin")
    for loader in (VAE, Generator, UNet):
        with pytest.raises(ValueError, match="tokenizer.bin: tensor .* is missing; this file holds another model"):
            torch.save({"weird": torch.zeros(3)}, tmp_path / "tokenizer.bin")
            loader.from_pretrained(tmp_path / "tokenizer.bin")
    with pytest.raises(ValueError, match="tango: no weights in this folder"):
        UNet.from_pretrained(folder)


def test_a_few_corruptions_of_each_kind(tmp_path):
    """tests/fuzz_weights.py does this at length."""
    samples = make_samples(tmp_path)
    jobs = [(kind, corrupt(path, tmp_path / f"{kind}_{seed}", seed)) for kind, path in samples.items()
            for seed in range(4)]
    outcomes = load_in_child(jobs)
    assert len(outcomes) == len(jobs) and {outcome["result"] for outcome in outcomes} <= {"refused", "loaded"}
