"""Reading audio: the resampler, levels and crops, captions, and files that are not what they should be."""
import math

import numpy as np
import pytest
import soundfile
import torch
from conftest import CAPTIONS

from data import find_clips, inspect, read_audio, resample


def tone(hz: float, rate: int, seconds: float = 1.0) -> torch.Tensor:
    return torch.sin(2 * math.pi * hz * torch.arange(int(rate * seconds), dtype=torch.float64) / rate).float()


def gain_db(hz: float, rate: int, new_rate: int) -> float:
    """Level of a tone after resampling, its ends cut off."""
    wave = resample(tone(hz, rate), rate, new_rate)[new_rate // 8:-new_rate // 8]
    return 20 * math.log10(wave.square().mean().sqrt().item() * math.sqrt(2) + 1e-12)


RATIOS = [(8_000, 16_000), (11_025, 24_000), (22_050, 16_000), (44_100, 16_000), (44_100, 48_000), (48_000, 32_000),
          (96_000, 24_000)]


@pytest.mark.parametrize("rate, new_rate", RATIOS)
def test_resampling_is_flat_below_and_silent_above(rate, new_rate):
    nyquist = min(rate, new_rate) / 2
    for share in (0.01, 0.3, 0.6, 0.9):
        assert abs(gain_db(share * nyquist, rate, new_rate)) < 0.1
    for share in (1.001, 1.05, 1.3, 1.9):
        if share * nyquist < rate / 2:
            assert gain_db(share * nyquist, rate, new_rate) < -80


@pytest.mark.parametrize("rate, new_rate", RATIOS + [(44_101, 16_000)])
def test_resampling_keeps_time_and_length(rate, new_rate):
    wave = resample(tone(440, rate, 0.7), rate, new_rate)
    assert len(wave) == math.ceil(int(0.7 * rate) * new_rate / rate)
    margin = new_rate // 50
    expected = tone(440, new_rate, 1.0)[:len(wave)]
    assert (wave - expected)[margin:-margin].abs().max() < 1e-3


@pytest.mark.parametrize("name, tolerance", [("a.wav", 1e-3), ("a.flac", 1e-3), ("a.ogg", 0.1), ("a.mp3", 0.1)])
def test_formats_and_channels(tmp_path, name, tolerance):
    left, right = tone(440, 44_100), 0.5 * tone(880, 44_100)
    soundfile.write(tmp_path / name, torch.stack([left, right], dim=1).numpy(), 44_100)
    wave, rate = read_audio(tmp_path / name)
    assert rate == 44_100
    expected = (left + right) / 2
    assert (wave[4000:40_000] - expected[4000:40_000]).abs().max() < tolerance


def test_a_clip_is_read_with_zero_mean_and_peak_half(tmp_path):
    soundfile.write(tmp_path / "a.wav", (0.1 + 0.3 * tone(440, 16_000)).numpy(), 16_000)
    wave = inspect(tmp_path / "a.wav", "").read(16_000)
    assert wave.mean().abs() < 1e-4 and wave.abs().max().item() == pytest.approx(0.5, abs=1e-3)


def test_a_crop_is_a_part_of_the_whole():
    clip = find_clips(CAPTIONS)[0]
    for rate in (16_000, 48_000):
        whole, crop = clip.read(rate), clip.read(rate, 1.5, 0.5)
        assert len(crop) == rate // 2
        assert (whole[round(1.5 * rate):2 * rate] - crop).abs().max() < 1e-3
        assert clip.read(rate, 4.9, 0.5)[-rate // 10:].abs().max() == 0        # silence after the end


def test_a_clip_reaches_its_own_rate_and_what_is_close():
    clip = find_clips(CAPTIONS)[0]
    assert clip.rate == 44_100 and clip.reaches(48_000) and not clip.reaches(50_000)


def test_a_csv_and_a_folder_hold_the_same_clips():
    from_csv, from_folder = find_clips(CAPTIONS), find_clips(CAPTIONS.parent, captions=False)
    assert len(from_csv) == 20 and sorted(c.path for c in from_csv) == [c.path for c in from_folder]
    assert from_csv[0].caption == "an infant cries loudly"


def write(path, samples, rate=16_000):
    soundfile.write(path, np.asarray(samples, dtype=np.float32), rate, subtype="FLOAT")


def bad_audio(folder, kind):
    """A file that is broken in one way."""
    path = folder / ("bad.ogg" if kind == "truncated ogg" else "bad.flac" if kind == "truncated flac" else "bad.wav")
    noise = 0.1 * np.random.default_rng(0).standard_normal(16_000).astype(np.float32)
    if kind == "empty":
        path.touch()
    elif kind == "no samples":
        write(path, [])
    elif kind == "silent":
        write(path, np.zeros(16_000))
    elif kind == "NaN":
        write(path, np.where(np.arange(16_000) == 500, np.nan, noise))
    elif kind == "text":
        path.write_text("this is not audio")
    elif kind.startswith("truncated"):
        soundfile.write(path, noise, 16_000)
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    return path                                          # "missing" is not written at all


BAD_AUDIO = {"missing": "no such audio file", "empty": "it is empty", "no samples": "holds no samples",
             "silent": "silent", "NaN": "NaN", "text": "not readable audio", "truncated wav": "truncated",
             "truncated flac": "truncated", "truncated ogg": "truncated"}


@pytest.mark.parametrize("kind, message", BAD_AUDIO.items())
def test_bad_audio_is_named(tmp_path, kind, message):
    path = bad_audio(tmp_path, kind)
    with pytest.raises(ValueError, match=message) as raised:
        inspect(path, "")
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("text, message", [
    ("", "no column `path`"), ("path,caption\n", "no rows"), ("path,text\na.wav,a dog\n", "no column `caption`"),
    ("file,caption\na.wav,a dog\n", "no column `path`"), ("path,caption\na.wav,\n", "line 2: a path or a caption"),
    ("path,caption\na.wav\n", "line 2: a path or a caption"), ("path,caption\nnot_there.wav,a dog\n", "not_there.wav"),
    ("path,caption\n\xff\xfe", "UTF-8"),
])
def test_bad_captions_are_named(tmp_path, text, message):
    path = tmp_path / "captions.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        find_clips(path)


def test_nothing_to_train_on_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no clips in it"):
        find_clips(tmp_path, captions=False)
    with pytest.raises(ValueError, match="a folder has no captions"):
        find_clips(tmp_path)
    with pytest.raises(ValueError, match="no such CSV or folder"):
        find_clips(tmp_path / "nothing")
