"""What a user types: training and sampling from end to end on real recordings, and mistakes of every kind.

A mistake ends in one line on stderr that names the thing and the mend, exit status 2, and nothing lost.
"""
import csv
import io
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from conftest import CAPTIONS, HERE, few_clips, one_line
from torch.utils.data import DataLoader, Dataset

import weights
from data import Cache, find_clips
from sample import slug
from srcgaudio import RATES, SRCgAudio, exit_cleanly, mel_spectrogram
from unet import UNet

ROOT = HERE.parent


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder that the three jobs have trained in one call, two epochs each, at two rates; and what they printed."""
    folder = tmp_path_factory.mktemp("trained")
    result = subprocess.run(
        [sys.executable, "train.py", "vae", "vocoder", "ldm", "--data", few_clips(folder), "--preset", "tiny",
         "--checkpoint", folder / "run", "--rates", "16000", "48000", "--epochs", "2"],
        cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder / "run", result.stdout + result.stderr


def test_training_writes_a_checkpoint_and_its_losses(trained):
    folder, printed = trained
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "vae.pt", "unet.pt", "text_encoder.pt", "tokenizer.model", "vocoder_16000.pt",
                     "vocoder_48000.pt", "discriminators_16000.pt", "discriminators_48000.pt"}
    assert not any(name.endswith(".new") for name in names)
    for job in ("vae", "vocoder_16000", "vocoder_48000", "ldm"):
        with open(folder / f"{job}.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert {"val_loss"} <= {row["name"] for row in rows} and all(np.isfinite(float(row["value"])) for row in rows)
        assert f"{job}:" in printed and "loss=" in printed
    assert {"val_16000", "val_48000"} <= {row["name"] for row in rows}             # the LDM's, at each rate
    assert abs(SRCgAudio.load_vae(folder).scale_factor.item() - 1) > 1e-3          # set from the latents


def test_sampling_writes_wavs_at_their_rates(trained, succeed, tmp_path):
    printed = succeed("sample.py", "a dog barks", "rain", "--rate", 16_000, 48_000, "--steps", 2, "--seconds", 1,
                      "--checkpoint", trained[0], "--out", tmp_path / "out")
    for name in ("a_dog_barks", "rain"):
        for rate in (16_000, 48_000):
            path = tmp_path / "out" / f"{name}_{rate}.wav"
            wave, rate_written = soundfile.read(path)
            assert rate_written == rate and len(wave) == rate and np.abs(wave).max() > 0 and str(path) in printed


def test_the_small_model_in_the_box_knows_a_bark_from_rain(succeed, tmp_path):
    assert sum(path.stat().st_size for path in (ROOT / "small").iterdir()) < 48e6
    tokenizer = SRCgAudio.load_text_encoder(ROOT / "small").tokenizer
    assert tokenizer.encode("A DOG barks") == tokenizer.encode("a dog barks")
    succeed("sample.py", "A dog barks", "rain falls steadily", "--rate", *RATES, "--steps", 15, "--out", tmp_path)
    for rate in RATES:
        unsteady = {}
        for name in ("a_dog_barks", "rain_falls_steadily"):
            wave, _ = soundfile.read(tmp_path / f"{name}_{rate}.wav", dtype="float32")
            loudness = mel_spectrogram(torch.from_numpy(wave)[None], rate).mean(2)                # (1, T)
            unsteady[name] = loudness.std().item()
        assert unsteady["a_dog_barks"] > 1.5 * unsteady["rain_falls_steadily"], (rate, unsteady)


def test_the_same_seed_writes_the_same_file(checkpoint, command, tmp_path):
    for out, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert command("sample.py", "a dog", "--steps", 2, "--seconds", 0.5, "--checkpoint", checkpoint, "--seed", seed,
                       "--out", tmp_path / out)[0] == 0
    a, b, c = ((tmp_path / out / "a_dog_16000.wav").read_bytes() for out in "abc")
    assert a == b != c


def test_training_goes_on_from_a_checkpoint(trained, succeed, tmp_path):
    """II-C: pre-trained weights, then all rates; and a vocoder that starts from one of another rate."""
    succeed("train.py", "vocoder", "ldm", "--data", few_clips(tmp_path), "--start-from", trained[0], "--checkpoint",
            tmp_path / "joint", "--rates", 24_000, "--epochs", 1, "--workers", 0, "--lr", 1e-9)
    for start, end in (("unet.pt", "unet.pt"), ("vocoder_16000.pt", "vocoder_24000.pt")):
        before, after = weights.read(trained[0] / start), weights.read(tmp_path / "joint" / end)
        assert all(torch.allclose(before[name], after[name], atol=1e-5) for name in before)
    assert weights.read(tmp_path / "joint" / "vae.pt").keys() == weights.read(trained[0] / "vae.pt").keys()


def test_a_text_encoder_trained_along_changes(succeed, tmp_path, checkpoint):
    succeed("train.py", "ldm", "--data", few_clips(tmp_path), "--start-from", checkpoint, "--checkpoint",
            tmp_path / "run", "--rates", 16_000, "--epochs", 1, "--workers", 0, "--train-text-encoder")
    before, after = (weights.read(folder / "text_encoder.pt") for folder in (checkpoint, tmp_path / "run"))
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_prompts_from_files(checkpoint, succeed, tmp_path):
    (tmp_path / "lines.txt").write_text("a dog barks\n\nrain on a roof\n")
    (tmp_path / "test.csv").write_text('id,caption\nY1_a,"rain, and a dog"\nY2-b,the sea\n')
    for file in ("lines.txt", "test.csv"):
        succeed("sample.py", "--prompts-file", tmp_path / file, "--steps", 1, "--seconds", 0.2, "--checkpoint",
                checkpoint, "--out", tmp_path / "out", "--batch", 1)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "a_dog_barks_16000.wav", "rain_on_a_roof_16000.wav", "Y1_a_16000.wav", "Y2-b_16000.wav"}


def test_prompts_from_a_pipe(checkpoint, command, tmp_path):
    read, write = os.pipe()                              # as of <(command) in a shell
    os.write(write, b"the sea\n")
    os.close(write)
    status, _, err = command("sample.py", "--prompts-file", f"/dev/fd/{read}", "--steps", 1, "--seconds", 0.2,
                             "--checkpoint", checkpoint, "--out", tmp_path)
    os.close(read)
    assert status == 0 and (tmp_path / "the_sea_16000.wav").exists(), err


def test_sampling_goes_on_where_it_was_stopped(checkpoint, command, succeed, tmp_path):
    arguments = ("sample.py", "rain", "fire", "wind", "sea", "--steps", 1, "--seconds", 0.2, "--checkpoint", checkpoint,
                 "--out", tmp_path, "--batch", 2)
    succeed(*arguments)
    sea = (tmp_path / "sea_16000.wav").read_bytes()
    (tmp_path / "sea_16000.wav").unlink()
    (tmp_path / "wind_16000.wav").write_text("precious")           # in the sea's batch
    assert "rain to fire at 16000 Hz: there already" in succeed(*arguments, "--skip-existing")
    assert (tmp_path / "sea_16000.wav").read_bytes() == sea
    assert (tmp_path / "wind_16000.wav").read_text() == "precious"
    assert command(*arguments, "--skip-existing", "--overwrite")[0] == 2


def test_equal_prompts_get_names_of_their_own(checkpoint, command, tmp_path):
    assert command("sample.py", "rain", "Rain!", "rain", "--steps", 1, "--seconds", 0.2, "--checkpoint", checkpoint,
                   "--out", tmp_path, "--rate", 16000, 16000)[0] == 0            # a rate named twice is made once
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rain_16000.wav", "rain_2_16000.wav", "rain_3_16000.wav"]


def test_long_prompts_that_begin_alike_get_names_of_their_own():
    """Else --skip-existing would take the file of the one for the other's."""
    soft, hard = (slug(f"a dog that barks far away in the fields while rain falls {how}") for how in ("soft", "hard"))
    assert soft[:51] == hard[:51] and soft != hard and len(soft) <= 60
    assert slug("ж" * 50) != slug("ж" * 51)              # two bytes each


def test_spectrograms_take_matplotlib(checkpoint, command, tmp_path, monkeypatch):
    arguments = ("sample.py", "rain", "--steps", 1, "--seconds", 0.2, "--checkpoint", checkpoint, "--spectrogram",
                 "--out", tmp_path / "out")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, _, err = command(*arguments)
    assert status == 2 and "pip install matplotlib" in err and not (tmp_path / "out").exists()


def test_compiling_takes_a_compiler(checkpoint, command, monkeypatch):
    monkeypatch.setenv("CXX", "not-there")
    status, _, err = command("sample.py", "rain", "--checkpoint", checkpoint, "--compile")
    assert status == 2 and "takes a C++ compiler" in err


def test_spectrograms_are_drawn(checkpoint, succeed, tmp_path):
    pytest.importorskip("matplotlib", reason="drawing takes matplotlib, which is optional")
    printed = succeed("sample.py", "rain $5_{ $", "--steps", 1, "--seconds", 0.2, "--checkpoint", checkpoint,
                      "--spectrogram", "--out", tmp_path)
    assert "warning" not in printed
    assert (tmp_path / "rain_5_16000.png").read_bytes().startswith(b"\x89PNG")


# Mistakes


@pytest.mark.parametrize("arguments, parts", [
    ([], ["no prompt"]), (["a dog", " "], ["a prompt is empty"]),
    (["x", "--rate", "22050"], ["22050", "16000, 24000, 32000, 48000"]),
    (["x", "--rate", "22050", "--rate", "16000"], ["22050"]), (["x", str(CAPTIONS)], ["is a file", "--prompts-file"]),
    (["x", "--steps", "0"], ["steps", "1 to 1000"]),
    (["x", "--steps", "2000"], ["steps", "1 to 1000"]),
    (["x", "--seconds", "0"], ["seconds", "0.1 to 60"]),
    (["x", "--seconds", "nan"], ["seconds", "0.1 to 60"]),
    (["x", "--guidance", "-3"], ["guidance", "0 to 100"]),
    (["x", "--batch", "0"], ["--batch"]),
    (["x", "--seed", "-1"], ["seed", "from 0"]),
    (["x", "--device", "tpu9"], ["tpu9", "--device cpu"]),
    (["x", "--device", "meta"], ["meta", "--device cpu"]), (["x", "--device", "hpu"], ["hpu", "--device cpu"]),
    (["x", "--prompts-file", __file__], ["--prompts-file at once"]),
    (["x", "--out", __file__], ["test_commands.py", "a file"]),
    (["--prompts-file", "not_there.txt"], ["not_there.txt"]),
    (["x", "--checkpoint", "not_there"], ["not_there", "no such checkpoint folder"]),
])
def test_sampling_mistakes(checkpoint, refuse, tmp_path, arguments, parts):
    defaults = [] if "--checkpoint" in arguments else ["--checkpoint", checkpoint]
    refuse(["sample.py", "--out", tmp_path / "out", *arguments, *defaults], *parts)
    assert not list(tmp_path.rglob("*.wav"))


@pytest.mark.parametrize("name, content, message", [
    ("empty.txt", "", "no prompts"), ("a.csv", "caption\nrain\n", "id and caption"),
    ("b.csv", "id,caption\n../evil,rain\n", "no file name"),
    ("g.csv", f"id,caption\n{'x' * 250},rain\n", "200 bytes"), ("c.txt", "\xff\xfe\x00", "UTF-8"),
    ("d.csv", "id,caption\n1,rain, and a dog\n", "line 2"), ("e.csv", "id,caption\n1\n", "no caption"),
    ("f.csv", 'id,caption\n1,"rain\n2,wind\n', "quote"), ("h.csv", "id,caption\n1, \n", "no caption"),
    ("i.csv", "id,caption\n1,rain\n1,wind\n", "2 times"), ("j.json", '{"caption": "rain"}', "one a line in a .txt"),
    ("k.csv", "id,caption,caption\n1,rain,wind\n", "the column caption 2 times"),
    ("l", "id, caption\n1, rain\n", "ends in .csv"), ("m.txt", "id;caption\n1;rain\n", "ends in .csv"),
])
def test_bad_prompt_files(checkpoint, refuse, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    refuse(["sample.py", "--prompts-file", tmp_path / name, "--checkpoint", checkpoint], name, message)


def test_a_text_after_the_rates_is_named(command):
    status, _, err = command("sample.py", "--rate", 48_000, "a dog barks")
    assert status == 2 and err.splitlines()[-1].endswith("'a dog barks' is no rate in Hz; put the texts before --rate")


def test_a_folder_that_can_not_be_written_to_is_named_first(checkpoint, refuse, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)        # for root, all can be
    monkeypatch.setattr("srcgaudio.SRCgAudio.generate", None)
    refuse(["sample.py", "rain", "--checkpoint", checkpoint, "--out", tmp_path], str(tmp_path), "name another folder")


def test_an_output_that_exists_is_kept(checkpoint, succeed, refuse, tmp_path):
    (tmp_path / "rain_16000.wav").write_text("precious")
    arguments = ("sample.py", "rain", "--steps", 1, "--seconds", 0.2, "--checkpoint", checkpoint, "--out", tmp_path)
    refuse(arguments, "rain_16000.wav exists", "--overwrite")
    assert (tmp_path / "rain_16000.wav").read_text() == "precious"
    succeed(*arguments, "--overwrite")
    assert soundfile.info(tmp_path / "rain_16000.wav").samplerate == 16_000


class Evil:
    def __reduce__(self):
        return print, ("code from a checkpoint ran",)


# harm: None takes the file away, bytes replace it, a dict changes entries of it
@pytest.mark.parametrize("file, harm, parts", [
    ("config.json", None, ["missing"]), ("config.json", b"{", ["JSON"]),
    ("config.json", b'{"model_type": "t5"}', ["preset"]), ("config.json", {"unet": {"depth": 3}}, ["UNet"]),
    ("config.json", {"preset": "huge"}, ["'huge'", "tiny"]), ("config.json", {"preset": ["tiny"]}, ["tiny"]),
    ("config.json", {"vae": None}, ["sizes"]), ("config.json", {"seconds": math.inf}, ["seconds"]),
    ("config.json", {"guidance": "strong"}, ["guidance"]),
    ("config.json", {"text_encoder": {"layers": 10 ** 12}}, ["layers"]),
    ("config.json", {"text_encoder": "not/there"}, ["text_encoder names not/there"]),
    ("config.json", {"unet": {"widths": [32] * 2000}}, ["widths are more than"]),
    ("config.json", {"unet": {"blocks": 0}}, ["or none"]),
    ("config.json", {"unet": {"tokens": None}}, ["tokens must be a list"]),
    ("config.json", {"unet": {"heads": [5.0, 10, 10, 20]}}, ["heads"]),
    ("config.json", {"unet": {"groups": 8.0}}, ["groups"]),
    ("config.json", {"unet": {"context_width": 65}}, ["context_width must be even"]),
    ("unet.pt", None, ["train.py ldm"]), ("unet.pt", b"", ["damaged"]), ("unet.pt", b"PK\3\4 and no more", ["damaged"]),
    ("unet.pt", {"a": Evil()}, ["damaged"]), ("unet.pt", {"conv_in.weight": torch.zeros(1, 2)}, ["shape"]),
    ("unet.pt", {"extra": torch.zeros(1)}, ["unknown tensor extra"]),
    ("tokenizer.model", b"nonsense", ["damaged"]), ("vocoder_16000.pt", None, ["train.py vocoder"]),
])
def test_bad_checkpoints(model, command, tmp_path, file, harm, parts):
    model.save(tmp_path)
    path = tmp_path / file
    if harm is None:
        path.unlink()
    elif isinstance(harm, bytes):
        path.write_bytes(harm)
    elif file == "config.json":
        path.write_text(json.dumps(json.loads(path.read_text()) | harm))
    else:
        weights.save(model.unet.state_dict() | harm, path)
    status, out, err = command("sample.py", "rain", "--checkpoint", tmp_path, "--out", tmp_path / "out")
    one_line(status, err, file, *parts)
    assert "code from a checkpoint" not in out + err


def test_a_text_encoder_and_a_unet_of_other_widths_are_named(model, refuse, tmp_path):
    narrow = dict(model.config.unet, context_width=32)
    model.save(tmp_path)
    SRCgAudio.save_config(replace(model.config, unet=narrow), tmp_path)
    weights.save(UNet(**narrow).state_dict(), tmp_path / "unet.pt")
    refuse(["sample.py", "rain", "--checkpoint", tmp_path], "config.json", "width is 64", "32")


def test_training_names_a_bad_recording(refuse, tmp_path):
    captions = tmp_path / "captions.csv"
    captions.write_text("path,caption\ngone.wav,a dog\n")
    refuse(["train.py", "vae", "--data", captions, "--preset", "tiny", "--checkpoint", tmp_path / "run"],
           "no clips to use", "gone.wav: no such audio file")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments, parts", [
    (["vae", "--rates", "44100"], ["44100"]),
    (["vae", "--epochs", "0"], ["--epochs"]),
    (["vae", "--lr", "nan"], ["--lr"]),
    (["ldm"], ["vae.pt", "job vae"]),
    (["vae", "--device", "cuda:99"], ["cuda:99"]),
    (["vae", "--start-from", "not_there"], ["not_there"]),
    (["ldm", "--flan-t5", "not_there"], ["not_there"]),
    (["vae", "ldm", "--tokenizer-captions", "not_there.csv"], ["not_there.csv", "no such caption file"]),
    (["vae", "--train-text-encoder"], ["--train-text-encoder", "job ldm"]),
    (["vae", "ldm", "--preset", "paper"], ["FLAN-T5-large", "--flan-t5"]),
    (["ldm", "--decoder-only"], ["--decoder-only", "job vae"]),
    (["vocoder", "--no-rate-token"], ["--no-rate-token", "job ldm"]),
    (["ldm", "--no-rate-token"], ["--rates"]),
    (["vae", "--decoder-only"], ["--decoder-only", "--start-from"]),
    (["vae", "--accumulate", "3"], ["vae: a batch of 8", "3 equal parts"]),
    (["vae", "ldm", "--batch", "7", "--accumulate", "2"], ["a batch of 7", "2 equal parts"]),
    (["vae", "--save-minutes", "-1"], ["--save-minutes"]),
    (["vae", "--blacklist", "not_there.json", "--blacklist", __file__], ["not_there.json"]),
    (["vae", "--rates", "22050", "--rates", "16000"], ["22050"]),
    (["vae", "--cache", __file__], ["test_commands.py is a file"]),
])
def test_training_mistakes(refuse, tmp_path, arguments, parts):
    refuse(["train.py", "--checkpoint", tmp_path / "run", "--preset", "tiny", *arguments, "--data",
            few_clips(tmp_path)], *parts)


def test_training_replaces_no_weights_unasked(checkpoint, refuse, tmp_path):
    vae = ["train.py", "vae", "--data", few_clips(tmp_path), "--checkpoint", checkpoint]
    refuse(vae, "vae.pt exists", "--overwrite")
    refuse([*vae, "--overwrite", "--preset", "small", "--decoder-only", "--start-from", checkpoint],
           "'tiny'", "'small'")
    refuse([*vae, "--overwrite"], "unet.pt knows the latents", "vae ldm --overwrite")
    for job, name, *more in (("vocoder", "discriminators_16000.pt"),
                             ("ldm", "text_encoder.pt", "--train-text-encoder")):
        (tmp_path / job).mkdir()
        (tmp_path / job / name).write_text("precious")
        refuse(["train.py", job, "--data", few_clips(tmp_path), "--checkpoint", tmp_path / job, *more],
               f"{name} exists", "--overwrite")


def test_a_mistake_loses_and_leaves_nothing(checkpoint, refuse, tmp_path):
    """Neither the state of a stopped run, for all that it is to be overwritten, nor copies of weights."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "vae_state.pt").write_text("precious")
    for folder, *more in (("old", "--overwrite"), ("new", "--start-from", checkpoint)):
        refuse(["train.py", "vae", "--data", "typo.csv", "--checkpoint", tmp_path / folder, *more], "typo.csv")
    assert (tmp_path / "old" / "vae_state.pt").read_text() == "precious"
    assert not (tmp_path / "new").exists()


def test_a_rate_above_the_recordings_is_asked_for(command, succeed, tmp_path):
    for i in range(2):
        soundfile.write(tmp_path / f"{i}.wav", 0.1 * np.random.default_rng(i).standard_normal(32_000), 16_000)
    arguments = ["train.py", "vae", "--data", tmp_path, "--preset", "tiny", "--checkpoint", tmp_path / "run", "--rates",
                 24_000, "--epochs", 1, "--workers", 0]
    one_line(*(command(*arguments)[i] for i in (0, 2)), "24000", "--any-rate")
    succeed(*arguments, "--any-rate")


def test_a_full_disk_leaves_a_checkpoint_whole(checkpoint, tmp_path):
    """None of its files is replaced when not all can be."""
    folder = shutil.copytree(checkpoint, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    limit = max(map(len, before.values())) // 2 - 10_000           # float16 files, one of them too large
    arguments = ["halve", "--checkpoint", folder, "--out", folder, "--overwrite"]
    result = subprocess.run([sys.executable, "weights.py", *arguments], cwd=ROOT, capture_output=True, text=True,
                            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    one_line(result.returncode, result.stderr, "cannot write", "is the disk full?")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_full_disk_is_named_when_sampling(checkpoint, tmp_path):
    arguments = ["rain", "--steps", "1", "--seconds", "0.5", "--checkpoint", checkpoint, "--out", tmp_path]
    result = subprocess.run([sys.executable, "sample.py", *arguments], cwd=ROOT, capture_output=True, text=True,
                            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000)))
    one_line(result.returncode, result.stderr, "cannot write", "rain_16000.wav", "too large")
    assert not list(tmp_path.iterdir())


class Doing(Dataset):
    """One item, which is read by doing something."""

    def __init__(self, something):
        self.something = something

    def __len__(self):
        return 1

    def __getitem__(self, i):
        return self.something()


def test_a_full_memory_is_one_line(capsys):
    def fail(error):
        raise error

    for fill in (lambda: torch.empty(2 ** 50), lambda: fail(torch.AcceleratorError("CUDA error: out of memory")),
                 lambda: fail(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"))):
        with pytest.raises(SystemExit) as end:
            exit_cleanly(fill)
        one_line(end.value.code, capsys.readouterr().err, "memory is full", "--batch")
    with pytest.raises(SystemExit) as end:
        exit_cleanly(lambda: list(DataLoader(Doing(lambda: os.kill(os.getpid(), signal.SIGKILL)), num_workers=1)))
    one_line(end.value.code, capsys.readouterr().err, "reads data was killed", "--workers")
    with pytest.raises(NotImplementedError):             # a RuntimeError too, but ours to mend
        exit_cleanly(lambda: torch.empty(1, device="meta").cpu())
    with pytest.raises(NotImplementedError):
        exit_cleanly(lambda: list(DataLoader(Doing(lambda: torch.empty(1, device="meta").cpu()), num_workers=1)))


def test_a_notebook_s_streams_will_do(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr("sys.stdout", stream)
    exit_cleanly(lambda: print("sound"))
    assert stream.getvalue() == "sound\n"


def test_a_mistake_without_a_text_is_named_by_its_kind(capsys):
    def fail():
        raise OSError
    with pytest.raises(SystemExit) as end:
        exit_cleanly(fail)
    one_line(end.value.code, capsys.readouterr().err, "OSError")


def test_ctrl_c_ends_in_130_without_a_traceback(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "train.py", "vae", "--data", few_clips(tmp_path), "--preset", "tiny", "--checkpoint",
         tmp_path / "run", "--epochs", "10000"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "vae.csv").exists():   # training has begun
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err


def test_a_trained_vocoder_learns(succeed, tmp_path):
    """After twenty steps the mel of what it makes is much closer to the mel it was given than silence is."""
    clips = few_clips(tmp_path)
    printed = succeed("train.py", "vocoder", "--data", clips, "--val-data", clips, "--preset", "tiny", "--lr", 5e-3,
                      "--checkpoint", tmp_path / "run", "--rates", 16_000, "--epochs", 10, "--batch", 2, "--workers",
                      0)
    assert "warning: 5 recordings are both trained and validated on" in printed
    with open(tmp_path / "run" / "vocoder_16000.csv", newline="") as file:
        loss = min(float(row["value"]) for row in csv.DictReader(file) if row["name"] == "val_loss")
    found, _ = find_clips([[clips]], Cache(tmp_path / "cache"))
    mels = [mel_spectrogram(clip.read(16_000, 0, clip.samples / clip.rate)[None], 16_000) for clip in found]
    silence = sum((mel - math.log(1e-5)).abs().mean().item() for mel in mels) / len(mels)
    assert loss < 0.5 * silence
