"""Kills a training again and again, and checks that it ends as if it had been left alone.  Takes some minutes.

    python tests/kill_and_resume.py 20

Trains a tiny VAE, two vocoders and an LDM on the test recordings: once undisturbed, once with each job killed (SIGKILL)
at random moments, a third of them while a state is being written, and started again each time with the same command.
All weights must be the same bit for bit, all logs of losses byte for byte.
"""
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
JOBS = ("vae", "vocoder", "ldm")


def start(folder: Path, *jobs: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "train.py", *jobs, "--data", "tests/data/captions.csv", "--preset", "tiny", "--device", "cpu",
         "--rates", "16000", "48000", "--epochs", "12", "--save-minutes", "0", "--workers", "1",
         "--checkpoint", folder],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
    _, err = process.communicate()
    if process.returncode != 0:
        sys.exit(f"the training failed: {err[-2000:]}")


def kill(folder: Path, job: str, while_writing: bool, moments: random.Random) -> str:
    """One life of a job.  Returns what it was doing when it was killed, or "" if it ended first."""
    process = start(folder, job)
    deadline = time.monotonic() + moments.uniform(3.0, 10.0)
    while process.poll() is None:
        writing = list(folder.glob("*_state.pt.new"))
        if time.monotonic() > deadline and (writing or not while_writing):
            process.kill()
            process.communicate()
            if process.returncode == 0:
                break
            if any(folder.glob("*_state.pt.new")):
                return "while a state was being written"
            return "after the first state" if any(folder.glob(f"{job}*_state.pt")) else "before the first state"
        time.sleep(0.001)
    finish(process)
    return ""


def main() -> None:
    kills = int(sys.argv[1])
    moments = random.Random(0)
    with tempfile.TemporaryDirectory() as temporary:
        alone, killed = Path(temporary) / "one" / "alone", Path(temporary) / "two" / "killed"
        began = time.monotonic()
        finish(start(alone, *JOBS))
        print(f"left alone: {time.monotonic() - began:.0f} s", flush=True)
        for number, job in enumerate(JOBS):
            for i in range(number * kills // len(JOBS), (number + 1) * kills // len(JOBS)):
                doing = kill(killed, job, i % 3 == 2, moments)
                if not doing:
                    sys.exit(f"{job} ended before kill {i + 1}; there must be {kills}")
                steps = {path.name.removesuffix("_state.pt"): torch.load(path, weights_only=True)["step"]
                         for path in sorted(killed.glob(f"{job}*_state.pt"))}
                print(f"kill {i + 1}, {doing}: {steps}", flush=True)
            finish(start(killed, job))

        names = sorted(path.name for path in alone.iterdir())
        assert names == sorted(path.name for path in killed.iterdir() if path.suffix != ".new")
        for name in names:
            one, two = alone / name, killed / name
            if name.endswith(".pt") and not name.endswith("_state.pt"):
                one, two = torch.load(one, weights_only=True), torch.load(two, weights_only=True)
                assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), name
            elif not name.endswith("_state.pt"):
                assert one.read_bytes() == two.read_bytes(), name
            print(f"the same: {name}")


if __name__ == "__main__":
    main()
