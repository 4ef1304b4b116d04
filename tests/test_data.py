"""Captioned audio: the resampler, levels and crops, the datasets' formats, the cache, and files that are not what they
should be.
"""
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from conftest import CAPTIONS, HERE

from data import (Cache, Clip, audio_files, digest, file_digest, find_clips, inspect, read_array, read_audio,
                  read_csv, resample)


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


def test_an_mp3_without_a_header_is_whole(tmp_path):
    """Its length is a guess then, here a thousandth too large."""
    soundfile.write(tmp_path / "a.mp3", tone(440, 44_100, 10.0).numpy(), 44_100, bitrate_mode="CONSTANT",
                    compression_level=0.5)
    mp3 = (tmp_path / "a.mp3").read_bytes()
    second = mp3.index(mp3[:2], 4)                       # the first frame is the header
    assert b"Info" in mp3[:second]
    (tmp_path / "a.mp3").write_bytes(mp3[second:])
    assert len(read_audio(tmp_path / "a.mp3")[0]) > 440_000
    (tmp_path / "a.mp3").write_bytes(mp3[:len(mp3) // 2])
    with pytest.raises(ValueError, match="truncated"):
        read_audio(tmp_path / "a.mp3")


def test_an_mp3_whose_header_promises_too_much_is_damaged(tmp_path):
    """To be read in one piece, so memory would be taken for all of it."""
    path = tmp_path / "a.mp3"
    soundfile.write(path, tone(440, 44_100, 1.0).numpy(), 44_100)
    mp3 = path.read_bytes()
    frames = max(mp3.find(b"Info"), mp3.find(b"Xing")) + 8
    path.write_bytes(mp3[:frames] + (2 ** 31 - 2).to_bytes(4, "big") + mp3[frames + 4:])
    with pytest.raises(ValueError, match="a.mp3: damaged; its header promises"):
        read_audio(path)


def test_what_libsndfile_can_not_seek_in_is_read_all_the_same(tmp_path):
    soundfile.write(tmp_path / "a.wav", 0.1 * tone(440, 8_000).numpy(), 8_000, "GSM610")
    wave, rate = read_audio(tmp_path / "a.wav")
    assert rate == 8_000 and len(wave) >= 8_000          # it ends with a whole frame
    assert F.cosine_similarity(wave[2000:8000], tone(440, 8_000)[2000:], dim=0) > 0.9
    assert torch.equal(read_audio(tmp_path / "a.wav", 3000, 1000)[0], wave[3000:4000])


def test_a_format_is_known_by_the_content(tmp_path):
    for name, kind in (("flac.ogg", "FLAC"), ("ogg.wav", "OGG")):
        path = tmp_path / name
        soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(16_000), 16_000, format=kind)
        assert len(read_audio(path)[0]) == 16_000
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
        with pytest.raises(ValueError, match="truncated"):
            read_audio(path)


@pytest.mark.parametrize("block", [1000, 1323, 44_100])             # 44,100 samples: with a rest, and without
@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_long_files_are_read_in_blocks(tmp_path, monkeypatch, block, suffix):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, 0.1 + 0.5 * np.sin(np.arange(44_100) / 20), 44_100)
    wave, rate = read_audio(path)
    facts = inspect(path)
    monkeypatch.setattr("data.BLOCK", block)
    assert torch.equal(read_audio(path)[0], wave) and read_audio(path)[1] == rate
    assert torch.equal(read_audio(path, 500, 2 * block)[0], wave[500:500 + 2 * block])
    assert len(read_audio(path, len(wave), 10)[0]) == 0
    assert inspect(path) == pytest.approx(facts, abs=1e-9)


def test_a_clip_is_read_with_zero_mean_and_peak_half(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, (0.1 + 0.3 * tone(440, 16_000)).numpy(), 16_000)
    clip = Clip(path, "", *inspect(path), file_digest(path))
    wave = clip.read(16_000, 0, 1)
    assert wave.mean().abs() < 1e-4 and wave.abs().max().item() == pytest.approx(0.5, abs=1e-3)
    soundfile.write(path, tone(440, 48_000).numpy(), 48_000)       # by another program, while a training runs
    with pytest.raises(ValueError, match="a.wav: changed since this run began"):
        clip.read(16_000, 0, 1)


def test_a_crop_is_a_part_of_the_whole(clips):
    clip = next(clip for clip in clips if "rain" in clip.caption)                 # it sounds at both ends of the crop
    for rate in (16_000, 48_000):
        whole, crop = clip.read(rate, 0, 5), clip.read(rate, 1.5, 0.5)
        assert len(crop) == rate // 2
        assert (whole[round(1.5 * rate):2 * rate] - crop).abs().max() < 1e-3
        assert clip.read(rate, 4.9, 0.5)[-rate // 10:].abs().max() == 0        # silence after the end
        assert clip.read(rate, 9, 0.5).tolist() == [0] * (rate // 2)


def test_a_clip_reaches_its_own_rate_and_what_is_close(clips):
    clip = clips[0]
    assert clip.rate == 44_100 and clip.reaches(48_000) and not clip.reaches(50_000)


def test_a_recording_is_known_by_its_sound_and_its_name(clips):
    first, second = clips[:2]
    moved = replace(first, path=Path("elsewhere", first.path.name), mean=first.mean + 1e-17, caption="another")
    assert moved.recording == first.recording
    assert replace(second, path=first.path).recording != first.recording == replace(first, digest=b"").recording


def test_a_csv_and_a_folder_hold_the_same_clips(clips, cache):
    from_folder, left_out = find_clips([[CAPTIONS.parent]], cache, captions=False)
    assert len(clips) == 20 and sorted(c.path for c in clips) == [c.path for c in from_folder] and not left_out
    assert clips[0].caption == "an infant cries loudly"


def test_a_spreadsheet_may_put_semicolons_between_the_fields(cache, tmp_path):
    shutil.copy(CAPTIONS.parent / "dog_bark_1-100032-A.ogg", tmp_path / "a.ogg")
    (tmp_path / "captions.csv").write_text("path ;caption\na.ogg ;a dog, then rain\n")
    (clip,), left_out = find_clips([[tmp_path / "captions.csv"]], cache)
    assert (clip.path.name, clip.caption) == ("a.ogg", "a dog, then rain") and not left_out


def test_a_caption_file_may_be_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    with ThreadPoolExecutor() as threads:
        threads.submit((tmp_path / "pipe.csv").write_text, "id,caption\na,a dog\n")
        assert read_csv(tmp_path / "pipe.csv") == [["id", "caption"], ["a", "a dog"]]


def test_audio_that_can_not_be_read_is_named(cache, tmp_path):
    """As a phone's recordings."""
    shutil.copy(CAPTIONS.parent / "dog_bark_1-100032-A.ogg", tmp_path / "a.ogg")
    (tmp_path / "b.m4a").write_bytes(b"\0\0\0\x20ftypM4A \0\0\0\0" + bytes(1000))
    (tmp_path / "notes.txt").touch()
    clips, (line,) = find_clips([[tmp_path]], cache, captions=False)
    assert [clip.path.name for clip in clips] == ["a.ogg"] and "b.m4a: not readable audio" in line


def test_folders_are_searched_through_links(cache, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(CAPTIONS.parent)
    (tmp_path / "data" / "above").symlink_to(tmp_path)
    clips, left_out = find_clips([[tmp_path / "data"]], cache, captions=False)
    assert len(clips) == len({clip.path.resolve() for clip in clips}) == 20 and not left_out
    with pytest.raises(OSError, match="gone"):           # as of a folder that may not be read
        audio_files(tmp_path / "gone")


def test_paths_are_relative_to_the_csv_or_to_the_folder_that_is_named(clips, cache, tmp_path):
    elsewhere = tmp_path / "clips.csv"
    elsewhere.write_bytes(CAPTIONS.read_bytes())
    assert find_clips([[elsewhere, CAPTIONS.parent]], cache) == (clips, [])
    with pytest.raises(ValueError, match="no clips to use .* 20 left out"):
        find_clips([[elsewhere]], cache)


def write(path, samples, rate=16_000):
    subtype = "FLOAT" if path.suffix == ".wav" else None
    soundfile.write(path, np.asarray(samples, dtype=np.float32), rate, subtype)


def bad_audio(folder, kind):
    """A file that is broken in one way."""
    path = folder / f"bad.{next((suffix for suffix in ('ogg', 'flac', 'aiff') if suffix in kind), 'wav')}"
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
    elif kind == "wild rate":
        soundfile.write(path, noise, 9_999_991)
    elif kind == "flac of unknown length":               # as one that was written to a pipe
        soundfile.write(path, noise, 16_000)
        content = bytearray(path.read_bytes())
        content[21] &= 0xF0                              # the number of samples has 36 bits
        content[22:26] = bytes(4)
        path.write_bytes(content)
    elif kind.startswith("truncated"):
        soundfile.write(path, noise, 16_000)
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    return path                                          # "missing" is not written at all


BAD_AUDIO = {"missing": "no such audio file", "empty": "it is empty", "no samples": "holds no samples",
             "silent": "silent", "NaN": "NaN", "text": "not readable audio", "wild rate": "9999991 Hz",
             "flac of unknown length": "how long it is", "truncated wav": "truncated",
             "truncated flac": "truncated", "truncated ogg": "truncated",
             "truncated aiff": "truncated"}


def test_a_stream_may_promise_more_than_it_holds(tmp_path):
    """SoX and FFmpeg, writing to a pipe, can't know the length."""
    path = tmp_path / "stream.wav"
    soundfile.write(path, np.full(1000, 0.1), 16_000)
    content = path.read_bytes()
    for promised, fits in ((0x7FFFF000, True), (0xFFFFFFFF, True), (3000, False)):
        path.write_bytes(content[:40] + promised.to_bytes(4, "little") + content[44:])
        if fits:
            assert len(read_audio(path)[0]) == 1000
        else:
            with pytest.raises(ValueError, match="truncated"):
                read_audio(path)


@pytest.mark.parametrize("text, message", [
    ("", "no columns path and caption"), ("path,caption\n", "no clips to use"),
    ("path,text\na.wav,a dog\n", "no columns path"), ("file,caption\na.wav,a dog\n", "no columns path"),
    ("path,caption\na.wav,\n", "has no caption in captions.csv"), ("path,caption\na.wav\n", "has no caption"),
    ("path,caption\nnot_there.wav,a dog\n", "not_there.wav: no such audio file"), ("path,caption\n\xff\xfe", "UTF-8"),
    ("path,caption\na.wav,a dog, then rain\n", "line 2: 3 fields, .* put quotes around a text with a ','"),
    ("path;caption\na.wav;a dog; then rain\n", "line 2: 3 fields, .* put quotes around a text with a ';'"),
    ('path,caption\na.wav,rain\nb.wav,"a dog\n', "line 3: not a CSV"),
    ("path|caption\na.wav|a dog\n", "with a comma between them"),
    ("path,caption,caption\na.wav,,a dog\n", "the column caption 2 times"),
    ("a,0,a dog,train\nb,half,a dog,train\n", "not every line is as VGGSound's are"),
    ("a,0,a dog,train\nb,0,a dog\n", "not every line is as VGGSound's are"),
])
def test_bad_captions_are_named(tmp_path, cache, text, message):
    path = tmp_path / "captions.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        find_clips([[path]], cache)


@pytest.mark.parametrize("sources, captions, message", [
    (["."], False, "no clips to use"), (["."], True, "a folder has no captions"),
    (["nothing"], True, "no such caption file"), (["a.json", "nothing"], True, "nothing: not a folder"),
    (["a.json", "."], True, "as WavCaps's files are"), (["b.json", "."], True, "not a JSON object"),
    (["c.json", "."], True, "not a JSON object"),
])
def test_nothing_to_train_on_is_an_error(tmp_path, cache, sources, captions, message):
    (tmp_path / "a.json").write_text('{"data": [{"id": 1}]}')
    (tmp_path / "b.json").write_text("{")
    (tmp_path / "c.json").write_text("[" * 10 ** 5)
    with pytest.raises(ValueError, match=message):
        find_clips([[tmp_path / source for source in sources]], cache, captions)


# The datasets of Section III-A, as they are published


def publish(folder: Path, kind: str) -> tuple[list[Path], set[str]]:
    """A source in the format of a dataset, three clips of it there and one not; and the captions of the three."""
    def audio(*names):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write(folder / name, 0.1 * np.random.default_rng(len(name)).standard_normal(8_000))

    if kind == "AudioCaps":
        audio("clips/r1nicOVtvkQ.wav", "clips/part/YUDGBjjwyaqE.wav", "clips/-0gone00000_30.wav")
        table = ("audiocap_id,youtube_id,start_time,caption\n91139,r1nicOVtvkQ,130,A woman talks\n"
                 '58146,UDGBjjwyaqE,20,"Clanging, clanking"\n3,-0gone00000,30,A dog\n4,gone0000000,30,A cat\n')
        captions = {"A woman talks", "Clanging, clanking", "A dog"}
    elif kind == "WavCaps":
        audio("clips/2219.flac", "clips/YvfY_TJq7n_U.flac", "clips/x/99.wav")
        table = json.dumps({"num_captions_per_audio": 1, "data": [
            {"id": "2219", "caption": "An airplane is landing.", "duration": 14.14, "audio": "wav_path"},
            {"id": "YvfY_TJq7n_U.wav", "caption": "Ducks quack.", "duration": 10.0}, {"id": 99, "caption": "Wind."},
            {"id": "100", "caption": "Rain."}]})
        captions = {"An airplane is landing.", "Ducks quack.", "Wind."}
    elif kind == "VGGSound":
        audio("clips/---g-f_I2yQ_000001.wav", "clips/abcdefghijk_30.wav", "clips/zzzzzzzzzzz.wav",
              "clips/test0000000.wav")
        table = ('---g-f_I2yQ,1,people marching,train\nabcdefghijk,30,"dog, barking",train\nzzzzzzzzzzz,5,rain,train\n'
                 "gone0000000,7,wind,train\ntest0000000,7,thunder,test\n")
        captions = {"people marching", "dog, barking", "rain"}
    else:                                                # ESC-50
        audio("clips/1-100032-A-0.wav", "clips/1-2-A-3.wav", "clips/5-9-B-38.wav")
        table = ("filename,fold,target,category,esc10,src_file,take\n1-100032-A-0.wav,1,0,dog,True,100032,A\n"
                 "1-2-A-3.wav,1,3,cow,False,2,A\n5-9-B-38.wav,5,38,water_drops,False,9,B\n"
                 "5-8-B-1.wav,5,1,cat,False,8,B\n")
        captions = {"dog", "cow", "water drops"}
    path = folder / ("captions.json" if kind == "WavCaps" else "captions.csv")
    path.write_text(table)
    return [path, folder / "clips"], captions


@pytest.mark.parametrize("kind", ["AudioCaps", "WavCaps", "VGGSound", "ESC-50"])
def test_published_formats(tmp_path, cache, kind):
    source, captions = publish(tmp_path, kind)
    for sources in ([source], [source[:1]]):             # the folder given, or above the audio
        clips, left_out = find_clips(sources, cache)
        assert {clip.caption for clip in clips} == captions and len({clip.path for clip in clips}) == 3
        assert len(left_out) == 1 and left_out[0].endswith("no such audio file")


def test_a_caption_in_json_that_is_no_text(tmp_path, cache):
    for name in "abc":
        write(tmp_path / f"{name}.wav", np.linspace(-0.1, 0.1, 8_000))
    captions = {"a": "a \ud800 dog", "b": {"not": "text"}, "c": None}                   # JSON can hold half a character
    (tmp_path / "x.json").write_text(json.dumps({"data": [{"id": i, "caption": text} for i, text in captions.items()]}))
    clips, left_out = find_clips([[tmp_path / "x.json"]], cache)
    assert [clip.caption for clip in clips] == ["a ? dog"]
    assert len(left_out) == 2 and all("has no caption in x.json" in line for line in left_out)


def test_vggsounds_test_split(tmp_path, cache):
    source, _ = publish(tmp_path, "VGGSound")
    assert [clip.caption for clip in find_clips([source], cache, split="test")[0]] == ["thunder"]


def test_several_sources_and_a_blacklist(tmp_path, cache):
    audiocaps, _ = publish(tmp_path / "a", "AudioCaps")
    wavcaps, _ = publish(tmp_path / "w", "WavCaps")
    blacklist = tmp_path / "blacklist_exclude_test_ac.json"
    blacklist.write_text('{"AudioSet": ["YvfY_TJq7n_U.wav", "Yr1nicOVtvkQ.wav"], "FreeSound": ["99"]}')
    clips, left_out = find_clips([audiocaps, wavcaps], cache, blacklists=[blacklist])
    assert {clip.caption for clip in clips} == {"Clanging, clanking", "A dog", "An airplane is landing."}
    assert sum(line.endswith("on a blacklist of test clips") for line in left_out) == 3


@pytest.mark.parametrize("source", ["clips", "table.csv", "captions.csv"])
def test_a_blacklist_counts_for_every_kind_of_source(tmp_path, cache, source):
    (path, folder), _ = publish(tmp_path, "ESC-50")
    (tmp_path / "table.csv").write_text("path,caption\nclips/1-2-A-3.wav,a cow\nclips/5-9-B-38.wav,water\n")
    (tmp_path / "blacklist.json").write_text('{"FreeSound": ["1-2-A-3.wav"]}')
    clips, left_out = find_clips([[tmp_path / source]], cache, captions=source != "clips",
                                 blacklists=[tmp_path / "blacklist.json"])
    assert clips and all(clip.path.stem != "1-2-A-3" for clip in clips)
    assert f"{folder / '1-2-A-3.wav'}: on a blacklist of test clips" in left_out


def test_a_space_may_follow_a_comma(tmp_path, cache):
    write(tmp_path / "a.wav", np.sin(np.arange(1000)))
    (tmp_path / "a.csv").write_text('path, caption\na.wav, "a dog, and rain"\n')
    clips, _ = find_clips([[tmp_path / "a.csv"]], cache)
    assert [clip.caption for clip in clips] == ["a dog, and rain"]


def test_files_of_one_name_are_not_guessed(tmp_path, cache):
    source, _ = publish(tmp_path, "ESC-50")
    write(tmp_path / "clips" / "1-2-A-3.flac", np.ones(100))
    clips, left_out = find_clips([source], cache)
    assert len(clips) == 2 and any("several files have this name" in line for line in left_out)


def test_a_bad_recording_is_left_out_and_named_once(tmp_path, cache):
    write(tmp_path / "good.wav", 0.1 * np.random.default_rng(0).standard_normal(8_000))
    lines = ["path,caption", "good.wav,a good dog"]
    for kind in BAD_AUDIO:
        (tmp_path / kind).mkdir()
        lines += [f"{bad_audio(tmp_path / kind, kind)},{caption}" for caption in ("a dog", "the same dog")]
    (tmp_path / "captions.csv").write_text("\n".join(lines))
    clips, left_out = find_clips([[tmp_path / "captions.csv"]], cache)
    assert [clip.caption for clip in clips] == ["a good dog"] and len(left_out) == len(BAD_AUDIO)
    for kind, message in BAD_AUDIO.items():
        line, = (line for line in left_out if str(tmp_path / kind) in line)
        assert message in line.split(": ", 1)[1] and "\n" not in line


# The cache


def test_the_cache_finds_what_it_was_given(tmp_path):
    arrays = {digest("a", i): np.random.default_rng(i).standard_normal((2, 3 + i)) for i in range(5)}
    cache = Cache(tmp_path / "cache")
    cache.add(dict(list(arrays.items())[:2]))
    Cache(tmp_path / "cache").add(dict(list(arrays.items())[2:]))
    for key, array in arrays.items():
        found = read_array(cache.arrays, cache.find(key))
        assert torch.equal(found, torch.from_numpy(array.astype(np.float16).astype(np.float32)).flatten())
    assert cache.find(digest("a", 5)) is None


def test_a_changed_file_has_another_digest(tmp_path):
    path = tmp_path / "a.wav"
    digests = {file_digest(path)}
    for length in (8_000, 8_001):
        write(path, np.ones(length))
        digests.add(file_digest(path))
    os.utime(path, (1, 1))
    assert len(digests | {file_digest(path)}) == 4


def test_facts_are_read_once(tmp_path, cache, monkeypatch):
    source, _ = publish(tmp_path, "ESC-50")
    first = find_clips([source], cache)
    monkeypatch.setattr("data.inspect", None)
    assert find_clips([source], Cache(cache.folder)) == first


def test_what_was_written_halfway_is_written_over(tmp_path):
    cache = Cache(tmp_path / "cache")
    cache.add({b"one": np.ones(10)})
    with open(cache.arrays, "ab") as file:               # a run was killed before its index was written
        file.write(b"torn" * 3)
    again = Cache(tmp_path / "cache")
    again.add({b"two": np.full(5, 2.0)})
    assert read_array(cache.arrays, again.find(b"one")).tolist() == [1.0] * 10
    assert read_array(cache.arrays, again.find(b"two")).tolist() == [2.0] * 5


@pytest.mark.parametrize("harm", ["index", "arrays"])
def test_a_damaged_cache_is_named(tmp_path, harm):
    Cache(tmp_path).add({b"one": np.ones(5_000)})
    if harm == "index":
        (tmp_path / "index.sqlite").write_bytes(b"nonsense" * 1000)
    else:
        (tmp_path / "arrays.f16").write_bytes(b"")
    with pytest.raises(ValueError, match="delete the folder"):
        Cache(tmp_path)


def test_a_cache_that_can_not_be_opened_is_named(tmp_path):
    (tmp_path / "index.sqlite").mkdir()
    with pytest.raises(OSError, match="index.sqlite: unable to open"):
        Cache(tmp_path)


def test_a_full_disk_leaves_the_cache_whole(tmp_path):
    program = ("import sys, numpy; from pathlib import Path\n"
               "from data import Cache; from srcgaudio import exit_cleanly\n"
               "cache = Cache(Path(sys.argv[1])); cache.add({b'one': numpy.ones(5000)})\n"
               "exit_cleanly(lambda: cache.add({b'two': numpy.ones(50000)}))")

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    result = subprocess.run([sys.executable, "-c", program, tmp_path / "cache"], cwd=HERE.parent, capture_output=True,
                            text=True, preexec_fn=limit)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and "Traceback" not in result.stderr
    cache = Cache(tmp_path / "cache")
    assert cache.find(b"two") is None and read_array(cache.arrays, cache.find(b"one")).tolist() == [1.0] * 5000
