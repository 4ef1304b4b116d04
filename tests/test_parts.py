"""The VAE and HiFi-GAN beside their golden data: shapes, losses with a known answer, what they refuse."""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import judge
from srcgaudio import RATES
from vae import VAE, Upsample, log_flicker, vae_loss
from vocoder import (STRIDES, Conv1d, ConvTranspose1d, Generator, MultiPeriodDiscriminator, MultiScaleDiscriminator,
                     PeriodDiscriminator, adversarial_loss, convergence_loss, discriminator_loss, feature_matching_loss,
                     generator_loss, mel_loss, stft_loss)


def test_vae_shapes():
    vae = VAE((32, 32, 64), blocks=1)
    mean, logvar = vae.encode(torch.randn(2, 24, 64))
    assert mean.shape == logvar.shape == (2, 8, 6, 16)
    assert vae.decode(mean).shape == (2, 24, 64)
    with pytest.raises(ValueError, match="a multiple of 4"):
        vae.encode(torch.randn(2, 25, 64))
    with pytest.raises(ValueError, match="takes mels"):
        vae.encode(torch.randn(24, 64))
    with pytest.raises(ValueError, match="three multiples of 32"):
        VAE((30, 60, 120))


def test_upsampling_is_doubling_and_a_convolution():
    upsample, x = Upsample(32), torch.randn(2, 32, 5, 7)
    usual = upsample.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    torch.testing.assert_close(upsample(x), usual, rtol=0, atol=1e-5)


def test_normalized_latents_decode_to_the_same():
    torch.manual_seed(0)
    vae, mel = VAE((32, 32, 64), blocks=1), torch.randn(4, 48, 64)
    with torch.no_grad():
        vae.quant_conv.weight *= torch.linspace(0.5, 4, 16)[:, None, None, None]
        mean, logvar = vae.encode(mel)
        decoded = vae.decode(mean)
        vae.normalize_latents(mean.mean((0, 2, 3)), mean.std((0, 2, 3)))
        new_mean, new_logvar = vae.encode(mel)
    torch.testing.assert_close(vae.decode(new_mean), decoded, rtol=0, atol=1e-5)
    torch.testing.assert_close(new_mean.mean((0, 2, 3)), torch.zeros(8), rtol=0, atol=1e-5)
    torch.testing.assert_close(new_mean.std((0, 2, 3)), torch.ones(8), rtol=0, atol=1e-5)
    torch.testing.assert_close((new_logvar / 2).exp(), (logvar / 2).exp() / mean.std((0, 2, 3))[:, None, None])


def test_vae_loss_is_l1_and_the_kl_to_a_standard_normal():
    mel, moments = torch.zeros(1, 20, 64), torch.zeros(1, 8, 5, 16)
    losses = vae_loss(mel, mel + 2, moments, moments, kl_weight=1.0, flicker_weight=1.0)           # N(0, 1): no KL
    assert {name: loss.item() for name, loss in losses.items()} == {"loss": 2, "l1": 2, "kl": 0, "detail": 0,
                                                                    "flicker": 0}
    losses = vae_loss(mel, mel, moments + 1, moments + math.log(4), kl_weight=0.1, flicker_weight=1.0)
    assert losses["l1"] == 0 and losses["loss"].item() == pytest.approx(0.1 * 0.5 * (1 + 4 - 1 - math.log(4)))


def test_vae_loss_counts_detail_and_flicker():
    mel, moments = torch.zeros(1, 20, 64), torch.zeros(1, 8, 5, 16)
    stripes = mel + torch.tensor([1., 0]).repeat(32)                                     # from band to band
    losses = vae_loss(mel, stripes, moments, moments, kl_weight=1.0, flicker_weight=3.0)
    assert {name: loss.item() for name, loss in losses.items()} == {"loss": 1.5, "l1": 0.5, "kl": 0, "detail": 1,
                                                                    "flicker": 0}
    blinking = mel + torch.tensor([1., 0]).repeat(10)[:, None]                    # by 1 from frame to frame, and back
    losses = vae_loss(mel, blinking, moments, moments, kl_weight=1.0, flicker_weight=3.0)
    flicker = (math.log(1.02 / 0.02) + math.log(2.02 / 0.02)) / 3                    # across frequency nothing moves
    assert losses["detail"] == 1 and losses["flicker"].item() == pytest.approx(flicker, rel=1e-5)
    assert losses["loss"].item() == pytest.approx(0.5 + 1 + 3 * flicker, rel=1e-5)


def test_flicker_is_the_size_of_a_mels_differences():
    frame, band = torch.arange(34.)[None, :, None], torch.arange(64.)
    mel = 3 * frame + 5 * frame ** 2 / 2 + 7 * frame * band                        # second differences of 5 and of 7
    change, twice, across = log_flicker(mel).exp()[0] - 0.02
    assert log_flicker(mel).shape == (1, 3, 3, 30)
    assert torch.allclose(change[:, 0], 3 + 5 * (torch.tensor([0., 8, 16]) + 8) + 7 * 1.5, rtol=1e-3)
    assert torch.allclose(twice, torch.tensor(5.), rtol=1e-3) and torch.allclose(across, torch.tensor(7.), rtol=1e-3)


@pytest.mark.parametrize("rate", RATES)
def test_every_generator_makes_hop_samples_of_a_frame(rate):
    assert math.prod(STRIDES[rate]) == RATES[rate].hop
    generator = Generator(STRIDES[rate], channels=32)
    for frames in (1, 7):
        wave = generator(torch.randn(2, frames, 64))
        assert wave.shape == (2, frames * rate // 100) and wave.abs().max() <= 1


def test_all_four_generators_have_the_same_tensors():
    shapes = [{name: t.shape for name, t in Generator(s, channels=32).state_dict().items()} for s in STRIDES.values()]
    assert all(s == shapes[0] for s in shapes)
    with torch.device("meta"):
        assert sum(p.numel() for p in Generator().parameters()) == 55_264_897    # AudioLDM's


def test_convolutions_over_an_image_of_height_one_are_the_usual_ones():
    x = torch.randn(2, 8, 50)
    for ours, usual in [(Conv1d(8, 4, 7, dilation=3, padding=9), torch.nn.Conv1d),
                        (Conv1d(8, 4, 5, stride=2, padding=2, groups=2), torch.nn.Conv1d),
                        (ConvTranspose1d(8, 4, 16, 5, padding=5), torch.nn.ConvTranspose1d)]:
        assert torch.allclose(ours(x[:, :, None])[:, :, 0], usual.forward(ours, x), atol=1e-5)


def test_discriminators_judge_any_length():
    for length in (2048, 2049):
        wave = 0.1 * torch.randn(2, length)
        judged = MultiPeriodDiscriminator(2)(wave) + MultiScaleDiscriminator(8)(wave)
        assert len(judged) == 8 and all(score.shape[0] == 2 and score.ndim == 2 for score, _ in judged)
        assert [len(features) for _, features in judged] == [6] * 5 + [8] * 3


def test_discriminators_hear_the_wave_mirrored_at_its_end_and_at_half_its_rate():
    torch.manual_seed(0)
    wave, of_three, of_half = torch.randn(2, 2048), PeriodDiscriminator(3, 2), MultiScaleDiscriminator(8).eval()
    mirrored = torch.cat([wave, wave[:, -2:-1]], dim=1)                      # 2049 = 683 x 3
    assert torch.equal(of_three(wave)[0], of_three(mirrored)[0])
    halved = F.pad(wave, (2, 2)).unfold(1, 4, 2).mean(2)                     # the means of 4 samples, at every second
    assert torch.allclose(of_half(wave)[1][0], of_half.discriminators[1](halved)[0], atol=1e-6)


def test_gan_losses_at_known_scores():
    def judged(score, feature):
        return [(torch.full((2, 3), float(score)), [torch.full((2, 4), float(feature))] * 2)] * 3

    assert discriminator_loss(judged(1, 0), judged(0, 0)) == 0               # the discriminators are right
    assert discriminator_loss(judged(0, 0), judged(1, 0)) == 3 * 2           # and wrong, each by one on both
    assert adversarial_loss(judged(1, 0)) == 0 and adversarial_loss(judged(0, 0)) == 3
    assert feature_matching_loss(judged(1, 5), judged(0, 5)) == 0
    assert feature_matching_loss(judged(1, 5), judged(0, 3)) == 3 * 2 * 2
    mel = torch.zeros(1, 5, 64)
    assert generator_loss(judged(1, 5), judged(0, 3), mel, mel + 1).item() == 3 + 2 * 12 + 45


def test_feature_matching_trains_the_generator_alone():
    real, generated = torch.ones(1, 4, requires_grad=True), torch.zeros(1, 4, requires_grad=True)
    feature_matching_loss([(real, [real])], [(generated, [generated])]).backward()
    assert real.grad is None and generated.grad is not None


def test_the_judges_distances_allow_shifts_in_time_and_nothing_else():
    mels = torch.randn(3, 40, 64)
    distances = judge.shifted_distances(mels, torch.roll(mels, 7, dims=1))
    assert distances.diagonal().max().item() == pytest.approx(0, abs=2e-3) and distances[0, 1] > 1
    assert judge.between(torch.stack([mels[0], mels[0] + 3])) == pytest.approx(3, rel=1e-5)


def test_the_judge_measures_diversity_against_real_clips_of_the_class():
    def clips(*levels: float) -> torch.Tensor:
        return torch.tensor(levels, dtype=torch.float32)[:, None, None].expand(-1, 8, 64)

    labels = torch.tensor([0, 0, 1, 1])
    val, train = SimpleNamespace(mels={0: clips(2, 4, 10, 18)}, labels=labels), SimpleNamespace(mels={0: clips(0, 9)})
    # Two prompts, whose clips differ by 1 and by 2, of classes whose real ones differ by 2 and by 8
    heard, prompts = clips(0.5, 11, 1.5, 13), ["bark", "rain", "bark", "rain"]
    captions = {"dog": ["bark"], "rain": ["rain"]}
    assert judge.spread(heard, prompts, captions, val, 0) == pytest.approx((1 / 2 + 2 / 8) / 2)
    # Real ones lie 2, 4, 1 and 9 from the training, whose lower medians are 2 and 1; generated ones 0.5, 2, 1.5 and 4
    nearest, of_real = judge.nearest_recording(heard, torch.tensor([0, 1, 0, 1]), train, val, 0)
    assert nearest == pytest.approx(0.5 / 2, abs=1e-3) and of_real == pytest.approx(1, abs=1e-3)


def test_the_judge_of_the_rate_hears_how_bands_move():
    torch.manual_seed(0)
    noise = torch.randn(2, 4000, 1).expand(-1, -1, 64)                           # all bands alike
    _, _, by_noise, together, _ = judge.flicker(noise).mean(dim=(0, 2))
    _, _, by_walk, _, _ = judge.flicker(noise.cumsum(dim=1) + 500).mean(dim=(0, 2))
    assert by_noise == pytest.approx(math.log(3) / 2, abs=0.03)                  # steps of noise: variance 2, then 6
    assert by_walk == pytest.approx(math.log(2) / 2, abs=0.03)                   # steps of a walk: 1, then 2
    assert together == pytest.approx(63 / 64, abs=0.02)                          # the last band has no next


def test_the_judge_measures_the_highs():
    seconds = torch.arange(48_000) / 48_000
    low, high = (torch.sin(2 * math.pi * hz * seconds) for hz in (5_000, 10_000))
    assert judge.share_above((low + 2 * high)[None], 8_000) == pytest.approx(0.8, abs=1e-3)
    assert judge.share_above((low + 2 * high)[None], 12_000) == pytest.approx(0, abs=1e-3)


def test_a_longer_window_tells_a_buzz_from_noise():
    torch.manual_seed(0)
    noise = 0.1 * torch.randn(1, 16_000)
    assert stft_loss(noise, 2 * noise, 512).item() == pytest.approx(math.log(2), abs=1e-3)
    buzz = noise[:, :160].repeat(1, 100)                                      # the same spectrum, one period a hop
    assert stft_loss(noise, buzz, 128) < 1 < 3 < stft_loss(noise, buzz, 4096)


def test_a_click_counts_by_its_loudness():
    """One loud frame of a hundred at half its size: hardly anything to a logarithm."""
    mel = torch.full((1, 100, 64), math.log(1e-5))
    faint = mel.clone()
    mel[:, 50], faint[:, 50] = 0, math.log(0.5)
    assert mel_loss(mel, faint).item() == pytest.approx(math.log(2) / 100, rel=1e-4)
    assert convergence_loss(mel, faint).item() == pytest.approx(0.5, abs=1e-3)


def test_silence_made_of_silence_trains_nothing():
    silence = torch.full((1, 100, 64), math.log(1e-5), requires_grad=True)
    convergence_loss(silence.detach(), silence).backward()
    assert silence.grad.abs().max() == 0
