"""The paper's equations and shapes, held against golden data and cases with a known answer."""
import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import error, golden, untrained
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from srcgaudio import (PRESETS, RATES, NoiseSchedule, SRCgAudio, diffusion_loss, guided_noise, mel_constants,
                       mel_spectrogram, relative_position_buckets)
from unet import UNet


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    return UNet(**PRESETS["tiny"].unet).eval()


def batch(unet: UNet, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs of `condition` and `forward`: two items, five text tokens, the last two of the second padded."""
    random = torch.Generator().manual_seed(seed)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    return dict(z_t=torch.randn(2, 8, 16, 16, generator=random), t=torch.tensor([10, 700]),
                rate=torch.tensor([16_000, 48_000]), text=torch.randn(2, 5, unet.context_width, generator=random),
                text_mask=mask)


@torch.no_grad()
def predict(unet: UNet, z_t, t, rate, text, text_mask, t_of_token=None) -> torch.Tensor:
    return unet(z_t, t, *unet.condition(t if t_of_token is None else t_of_token, rate, text, text_mask))


# Section III-B: mels


@pytest.mark.parametrize("rate", RATES)
def test_mel_is_audioldms(rate):
    reference = golden("mel")
    mel = mel_spectrogram(reference[f"wave_{rate}"][None], rate)[0]
    assert error(mel.T, reference[f"mel_{rate}"][:, :-1]) < 1e-4


@pytest.mark.parametrize("rate", RATES)
def test_every_rate_has_100_frames_a_second(rate):
    for seconds in (0.5, 1.0, 1.234):
        wave = torch.zeros(2, round(seconds * rate))
        assert mel_spectrogram(wave, rate).shape == (2, int(seconds * 100), 64)
    assert mel_spectrogram(wave, rate).unique().item() == pytest.approx(math.log(1e-5))


def test_mel_serves_training_after_generation():
    wave = torch.randn(1, 16_000, requires_grad=True)
    mel_constants.cache_clear()
    with torch.inference_mode():
        mel_spectrogram(wave, 16_000)
    mel_spectrogram(wave, 16_000).sum().backward()
    assert wave.grad.abs().sum() > 0


def test_mel_refuses_what_it_cannot_take():
    with pytest.raises(ValueError, match="44100.*16000, 24000, 32000, 48000"):
        mel_spectrogram(torch.zeros(1, 44_100), 44_100)
    for wave in (torch.zeros(1, 512), torch.zeros(16_000)):
        with pytest.raises(ValueError, match="more than 512 samples, got"):
            mel_spectrogram(wave, 16_000)


# Eq. (1): the forward process


def test_closed_form_is_eq_1_applied_t_times():
    schedule = NoiseSchedule()
    scale, variance = 1.0, 0.0                           # of z_t given z_0
    for t, beta in enumerate(schedule.beta.tolist()):
        scale, variance = math.sqrt(1 - beta) * scale, (1 - beta) * variance + beta
        one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        index = torch.tensor([t])
        assert schedule.add_noise(one, zero, index).item() == pytest.approx(scale, rel=1e-12)
        assert schedule.add_noise(zero, one, index).item() ** 2 == pytest.approx(variance, rel=1e-9)


def test_noise_is_added_item_by_item_whatever_the_shape():
    schedule, t = NoiseSchedule(), torch.tensor([0, 500, 999])
    for shape in [(3,), (3, 2), (3, 3, 3), (3, 8, 4, 16)]:
        z_t = schedule.add_noise(torch.ones(shape), torch.zeros(shape), t)
        eps = schedule.eps_from_v(torch.ones(shape), torch.zeros(shape), t)
        assert z_t.shape == shape and torch.equal(z_t, eps)
        assert torch.allclose(z_t.view(3, -1)[:, -1], schedule.alpha_bar[t].sqrt().float())


def test_schedule_is_stable_diffusions():
    beta = NoiseSchedule().beta
    assert (len(beta), beta[0].item(), beta[-1].item()) == (1000, pytest.approx(0.00085), pytest.approx(0.012))
    assert torch.allclose(beta.sqrt().diff(), beta.sqrt().diff()[0].expand(999))


# Eq. (2): the reverse process as DDIM


@pytest.mark.parametrize("steps", [50, 200])
def test_ddim_is_diffusers(steps):
    reference, schedule = golden("ddim"), NoiseSchedule()
    assert schedule.ddim_timesteps(steps) == reference[f"timesteps_{steps}"].tolist()
    z_0 = schedule.ddim(lambda z, t: 0.7 * torch.tanh(z) + 1e-4 * t, reference["z_T"].double(), steps)
    assert error(z_0, reference[f"z_0_{steps}"]) < 1e-6


def gaussian_noise(schedule: NoiseSchedule, mean: float, std: float):
    """The best eps(z_t, t) for data N(mean, std^2): the conditional expectation of the noise given z_t."""
    def predict_noise(z_t, t):
        alpha_bar = schedule.alpha_bar[t].item()
        variance = alpha_bar * std ** 2 + 1 - alpha_bar
        return (1 - alpha_bar) ** 0.5 * (z_t - alpha_bar ** 0.5 * mean) / variance
    return predict_noise


@pytest.mark.parametrize("steps", [1, 7, 50, 200, 1000])
def test_ddim_on_gaussian_data_is_its_linear_map(steps):
    schedule, mean, std = NoiseSchedule(), 0.8, 0.3
    # Apart: the distance from the marginal's mean shrinks or grows by one factor a step
    times = [min(i * 1000 // steps + 1, 999) for i in range(steps)][::-1] + [0]
    gain = 1.0
    for t, t_next in zip(times, times[1:]):
        a, b = schedule.alpha_bar[t].item(), schedule.alpha_bar[t_next].item()
        variance = a * std ** 2 + 1 - a
        gain *= (math.sqrt(a * b) * std ** 2 + math.sqrt((1 - a) * (1 - b))) / variance
    a, b = schedule.alpha_bar[times[0]].item(), schedule.alpha_bar[0].item()
    z_T = torch.linspace(-3, 3, 101, dtype=torch.float64)
    expected = math.sqrt(b) * mean + gain * (z_T - math.sqrt(a) * mean)
    assert error(schedule.ddim(gaussian_noise(schedule, mean, std), z_T, steps), expected) < 1e-6


def test_ddim_turns_the_marginal_of_z_T_into_the_data():
    schedule, mean, std = NoiseSchedule(), 0.8, 0.3
    a = schedule.alpha_bar[-1].item()
    normal = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000)
    z_T = math.sqrt(a) * mean + math.sqrt(a * std ** 2 + 1 - a) * normal / normal.std()
    z_0 = schedule.ddim(gaussian_noise(schedule, mean, std), z_T, 1000)
    assert z_0.mean().item() == pytest.approx(mean, rel=0.02)
    assert z_0.var().item() == pytest.approx(std ** 2, rel=0.02)


# Eq. (3): the objective


class KnownNoise(torch.nn.Module):
    """A network that answers with one fixed prediction and remembers what it was asked."""

    def __init__(self, unet: UNet, answer):
        super().__init__()
        self.unet, self.answer, self.predicts = unet, answer, unet.predicts

    def condition(self, *arguments):
        return self.unet.condition(*arguments)

    def forward(self, z_t, t, c, c_mask):
        self.asked = z_t, t, c, c_mask
        return self.answer(z_t, c)


def test_eq_3_is_the_squared_error_of_the_noise(unet):
    inputs, schedule = batch(unet), NoiseSchedule()
    z_0, eps = torch.randn(2, 8, 16, 16), torch.randn(2, 8, 16, 16)

    def loss(answer):
        network = KnownNoise(unet, answer)
        value = diffusion_loss(network, schedule, z_0, eps, inputs["t"], inputs["rate"], inputs["text"],
                               inputs["text_mask"])
        assert torch.equal(network.asked[0], schedule.add_noise(z_0, eps, inputs["t"]))
        return value

    assert loss(lambda z_t, c: eps).tolist() == [0, 0]
    assert torch.allclose(loss(lambda z_t, c: eps + 2), torch.tensor([4.0, 4.0]))
    assert torch.allclose(loss(lambda z_t, c: 0 * eps), eps.square().mean(dim=(1, 2, 3)))


# Eq. (4): guidance


def test_eq_4_mixes_both_branches_of_one_batch(unet):
    inputs = batch(unet)
    null, null_mask = torch.randn(2, 5, unet.context_width), torch.ones(2, 5, dtype=torch.bool)

    def answer(z_t, c):                                  # 1 for the condition, 10 for the null condition
        return torch.cat([torch.ones_like(z_t[:2]), 10 * torch.ones_like(z_t[2:])])

    network = KnownNoise(unet, answer)
    for w in (0.0, 0.5, 3.0):
        eps = guided_noise(network, NoiseSchedule(), inputs["z_t"], 10, 48_000, inputs["text"], inputs["text_mask"],
                           null, null_mask, w)
        assert torch.allclose(eps, torch.full_like(eps, w * 1 + (1 - w) * 10))
    z_t, t, c, c_mask = network.asked
    assert z_t.shape[0] == 4 and torch.equal(z_t[:2], z_t[2:])
    # c_null = concat(psi(""), Sr): only the text differs, the tokens of time and rate stay
    assert torch.equal(c[:2, :5], inputs["text"]) and torch.equal(c[2:, :5], null)
    assert torch.equal(c[:2, 5:], c[2:, 5:]) and c.shape[1] == 7

    guided_noise(network, NoiseSchedule(), inputs["z_t"], 10, 48_000, inputs["text"], inputs["text_mask"], null,
                 null_mask, 1.0)
    assert network.asked[0].shape[0] == 2                # w = 1: one branch alone


# Section II-A: the condition


def test_each_part_of_the_condition_changes_the_noise_and_padding_does_not(unet):
    inputs = batch(unet)
    eps = predict(unet, **inputs)

    def change(**other) -> torch.Tensor:
        return (predict(unet, **(inputs | other)) - eps).abs().amax(dim=(1, 2, 3))

    assert (change(rate=torch.tensor([24_000, 32_000])) > 1e-4).all()
    assert (change(t_of_token=torch.tensor([500, 500])) > 1e-4).all()              # the token alone
    assert (change(t=torch.tensor([500, 500]), t_of_token=inputs["t"]) > 1e-4).all()   # the residual blocks alone
    assert (change(text=inputs["text"].roll(1, dims=2)) > 1e-4).all()
    padded = inputs["text"].clone()
    padded[1, 3:] = 100.0
    assert (change(text=padded) < 1e-5).all()


def test_rates_between_the_four_are_inputs_too(unet):
    inputs = batch(unet)
    a, b, c = (predict(unet, **(inputs | {"rate": torch.tensor([rate] * 2)})) for rate in (24_000, 27_000, 32_000))
    assert (a - b).abs().max() > 1e-4 and (b - c).abs().max() > 1e-4
    rates = torch.tensor([24_000, 24_050, 32_000])
    c, _ = unet.condition(torch.zeros(3), rates, torch.zeros(3, 1, 64), torch.ones(3, 1, dtype=torch.bool))
    a, b, c = c[:, -1]                                   # their tokens; near rates have near ones
    assert (a - b).norm() < 0.05 * (a - c).norm()


@pytest.mark.parametrize("tokens", [(), ("time",), ("rate",), ("time", "rate")])
def test_either_both_or_none_of_the_tokens(tokens):
    unet = UNet(**(PRESETS["tiny"].unet | {"tokens": tokens}))
    inputs = batch(unet)
    c, c_mask = unet.condition(inputs["t"], inputs["rate"], inputs["text"], inputs["text_mask"])
    assert c.shape == (2, 5 + len(tokens), 64) and c_mask[:, 5:].all()
    of_numbers = inputs | {"text_mask": inputs["text_mask"].float()}            # attention would add them to its scores
    assert torch.equal(predict(unet, **inputs), predict(unet, **of_numbers))
    rate_matters = not torch.equal(predict(unet, **inputs), predict(unet, **(inputs | {"rate": inputs["rate"] + 8000})))
    assert rate_matters == ("rate" in tokens)


# Section III-B: the U-Net


@pytest.mark.parametrize("arguments, millions", [
    (dict(), 561.15),                                                              # SRC-gAudio, the paper's 561 M
    (dict(tokens=("time",)), 560.10),                                              # gAudio
    (dict(tokens=()), 559.05),                                                     # Stable Diffusion's, no tokens
    # The paper's words, taken literally: without and with the two tokens; then with a transformer in the middle
    (dict(tokens=(), cross_attention=(False, True, True, True), cross_attention_middle=False), 656.02),
    (dict(cross_attention=(False, True, True, True), cross_attention_middle=False), 658.12),
    (dict(tokens=(), cross_attention=(False, True, True, True)), 722.58),
    (dict(cross_attention=(False, True, True, True)), 724.68),
    (dict(tokens=(), widths=(320, 640, 1280, 1280), heads=(5, 10, 20, 20)), 865.93),        # Tango
])
def test_parameters_of_the_unet(arguments, millions):
    with torch.device("meta"):
        unet = UNet(**arguments)
    assert sum(p.numel() for p in unet.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_any_length_that_is_a_multiple_of_8(unet):
    inputs = batch(unet)
    for length in (8, 24, 40):
        assert predict(unet, **(inputs | {"z_t": torch.randn(2, 8, length, 16)})).shape == (2, 8, length, 16)
    with pytest.raises(ValueError, match="multiples of 8, got 12 x 16"):
        predict(unet, **(inputs | {"z_t": torch.randn(2, 8, 12, 16)}))


def test_compile_takes_the_unet_as_one_graph(unet):
    compiled = torch.compile(unet, backend="eager", fullgraph=True)          # raises where the graph would break
    inputs = batch(unet)
    c = unet.condition(inputs["t"], inputs["rate"], inputs["text"], inputs["text_mask"])
    assert torch.equal(compiled(inputs["z_t"], inputs["t"], *c), unet(inputs["z_t"], inputs["t"], *c))


def test_unet_refuses_sizes_that_do_not_fit():
    for arguments, message in [(dict(heads=(5, 10, 10)), "equally many"),
                               (dict(widths=(320, 640, 640, 1200)), "multiples"),
                               (dict(groups=3), "1, 2, 4, 8, 16 or 32"),
                               (dict(tokens=("text",)), '"time" and "rate"')]:
        with pytest.raises(ValueError, match=message):
            UNet(**arguments)


# The text encoder


def test_relative_position_buckets_are_t5s():
    row = relative_position_buckets(300)[150]
    distances = {-150: 15, -128: 15, -91: 15, -90: 14, -20: 10, -12: 9, -11: 8, -8: 8, -7: 7, -1: 1, 0: 0, 1: 17, 7: 23,
                 8: 24, 12: 25, 90: 30, 91: 31, 149: 31}
    assert {d: row[150 + d].item() for d in distances} == distances


def test_tokens_end_pad_and_are_cut_aloud(model):
    ids, mask = model.text_encoder.tokenize(["a dog barks", "", "dog"])
    assert all(row[m][-1] == 1 and (row[~m] == 0).all() for row, m in zip(ids, mask))
    assert mask[1].tolist() == [True] + [False] * (ids.shape[1] - 1)               # "" is </s> alone
    with pytest.warns(UserWarning, match="are cut"):
        ids, mask = model.text_encoder.tokenize(["dog " * 600])
    assert ids.shape == (1, 512) and ids[0, -1] == 1


@torch.no_grad()
def test_padding_changes_no_text_embedding(model):
    alone, _ = model.text_encoder.encode(["dog"])
    padded, mask = model.text_encoder.encode(["dog", "a dog barks at the sea"])
    assert torch.allclose(alone[0], padded[0, mask[0]], atol=1e-5)
    in_bfloat16, _ = copy.deepcopy(model.text_encoder).bfloat16().encode(["dog", "a dog barks at the sea"])
    assert torch.allclose(alone[0], in_bfloat16[0, mask[0]], atol=0.1)


# Fig. 1: the whole system


@pytest.mark.parametrize("rate", RATES)
def test_generate_gives_the_seconds_asked_for(model, rate):
    wave = model.generate(["a dog", "rain"], rate, seconds=1.01, steps=2)
    assert wave.shape == (2, round(1.01 * rate)) and wave.isfinite().all() and wave.abs().max() <= 1


def test_a_callers_autocast_changes_no_sound(model):
    wave = model.generate(["a dog", "rain"], 16_000, seconds=0.5, steps=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.generate(["a dog", "rain"], 16_000, seconds=0.5, steps=2), wave)


def test_only_what_loads_is_saved(tmp_path):
    model = untrained()
    model.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model.unet = UNet(**(model.config.unet | {"blocks": 2}))
    with pytest.raises(ValueError, match="unet.pt"):
        model.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_seed_fixes_the_sound_whatever_the_batch(model):
    both = model.generate(["a dog", "rain"], 16_000, 0.5, steps=3, seed=5)
    assert torch.equal(both, model.generate(["a dog", "rain"], 16_000, 0.5, steps=3, seed=np.int64(5)))
    assert error(model.generate(["rain"], 16_000, 0.5, steps=3, seed=6)[0], both[1]) < 1e-3
    assert not torch.allclose(both, model.generate(["a dog", "rain"], 16_000, 0.5, steps=3, seed=7))


def test_bfloat16_is_close_to_float32(model):
    exact, rough = (model.to("cpu", precision).generate(["a dog"], 16_000, 0.5, steps=3)
                    for precision in ("fp32", "bf16"))
    model.to("cpu", "fp32")
    assert rough.dtype == torch.float32 and 0 < error(rough, exact) < 0.1


def test_bfloat16_casts_each_weight_once_whatever_the_steps(model):
    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._to_copy.default and isinstance(args[0], nn.Parameter)
            return func(*args, **kwargs or {})

    model.to("cpu", "bf16")
    counts = []
    for steps in (1, 3):
        with Casts() as casts:
            casts.count = 0
            model.generate(["a dog"], 16_000, 0.5, steps=steps)
        counts.append(casts.count)
    model.to("cpu", "fp32")
    assert counts[0] == counts[1] > 100


def test_bfloat16_does_not_reach_the_vocoder(model):
    computed = []
    hook = model.vocoders[16_000].conv_pre.register_forward_hook(lambda _module, _mel, h: computed.append(h.dtype))
    model.to("cpu", "bf16").generate(["a dog"], 16_000, 0.5, steps=1)
    model.to("cpu", "fp32")
    hook.remove()
    assert computed == [torch.float32]


def test_prompts_may_come_in_any_container(model):
    texts = ["a dog barks", "the sea"]
    expected = model.generate(texts, 16_000, 0.2, 1)
    for prompts in (tuple(texts), np.array(texts), (text for text in texts)):
        assert torch.equal(model.generate(prompts, 16_000, 0.2, 1), expected)


def test_every_rate_starts_from_the_same_noise(model, monkeypatch):
    started = []
    ddim = model.schedule.ddim
    monkeypatch.setattr(model.schedule, "ddim", lambda f, z_T, *rest: started.append(z_T) or ddim(f, z_T, *rest))
    for rate in RATES:
        model.generate(["a dog"], rate, 0.5, steps=1)
    assert all(torch.equal(started[0], z_T) for z_T in started) and started[0].std().item() == pytest.approx(1, abs=0.1)


def test_a_latent_is_no_longer_than_the_sound_needs(model, monkeypatch):
    lengths = []
    monkeypatch.setattr(model.schedule, "ddim", lambda f, z_T, *rest: lengths.append(z_T.shape[2]) or z_T)
    for seconds in (2.24, 4.48, 2.25):
        model.generate(("a dog",), 16_000, seconds)
    assert lengths == [56, 112, 64]                      # multiples of 8, four frames of 10 ms each


def test_a_text_of_unknown_characters_is_told(model):
    with pytest.warns(UserWarning, match="does not know '狗叫'"):
        model.text_encoder.tokenize(["狗叫"])


def test_guidance_of_1_is_the_plain_model(model):
    plain, guided = (model.generate(["a dog"], 16_000, 0.5, steps=3, guidance=w) for w in (1.0, 1.0001))
    assert error(plain, guided) < 1e-2
    assert error(plain, model.generate(["a dog"], 16_000, 0.5, steps=3, guidance=8.0)) > 1e-3


@pytest.mark.parametrize("own", [3.0, 1.5])
def test_guidance_is_the_checkpoints_unless_asked_for(model, monkeypatch, own):
    monkeypatch.setattr(model, "config", replace(model.config, guidance=own))
    default, named = (model.generate(["a dog"], 16_000, 0.5, steps=3, **more) for more in ({}, {"guidance": own}))
    assert torch.equal(default, named)


@pytest.mark.parametrize("arguments, message", [
    (dict(prompts=[]), "no prompt"), (dict(prompts="a dog"), "a list of texts"),
    (dict(prompts=["a dog", None]), "a list of texts"),
    (dict(rate=22_050), "no sampling rate 22050"), (dict(seconds=0), "0.1 to 60"),
    (dict(seconds=math.nan), "0.1 to 60"), (dict(seconds=1e9), "0.1 to 60"), (dict(steps=0), "from 1 to 1000"),
    (dict(steps=1001), "from 1 to 1000"), (dict(guidance=-1), "0 to 100"), (dict(guidance=math.inf), "0 to 100"),
])
def test_generate_refuses_what_is_out_of_range(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**(dict(prompts=["a"], rate=16_000, seconds=0.5, steps=1) | arguments))


def test_a_checkpoint_comes_back_as_it_was(model, checkpoint):
    again = SRCgAudio.load(checkpoint).to("cpu", "fp32")
    assert sorted(again.vocoders) == list(RATES) and again.config == SRCgAudio.load_config(checkpoint)
    for rate in (16_000, 48_000):
        arguments = (["a dog"], rate, 0.5, 2)
        assert torch.equal(again.generate(*arguments), model.generate(*arguments))
    assert not torch.equal(again.generate(*arguments), untrained(seed=1).generate(*arguments))


def test_the_scale_factor_is_undone_before_decoding(monkeypatch):
    model, decoded = untrained(), []
    monkeypatch.setattr(model.vae, "decode", lambda z: decoded.append(z) or torch.zeros(1, 64, 64))
    monkeypatch.setattr(model.schedule, "ddim", lambda *_: torch.full((1, 8, 16, 16), 3.0))
    model.vae.scale_factor.fill_(0.5)
    model.generate(["a dog"], 16_000, 0.5, steps=1)
    assert decoded[0].unique().item() == 6.0
