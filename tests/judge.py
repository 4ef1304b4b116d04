"""Does a trained model do what it is told?  Two small networks that have learnt from real recordings are the judges.

    python tests/judge.py --train small/train.csv --val small/val.csv --audio ESC-50/audio --clips 200

The columns of both are path, caption and class.  The judges learn from the model's own training data, and prove
themselves on recordings that nothing was trained on: one names the class of a log-mel, the other its sampling rate.
Then they hear `--clips` clips at each rate, made from prompts of the training data and from wordings that it lacks.
Also measured: copy-synthesis, how much the bands move, the highs of the 48 kHz output, how much the clips of one prompt
differ, and how near they come to a recording that the model was trained on.
"""
import argparse
import csv
import importlib.util
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm, trange

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import Clip, inspect
from srcgaudio import RATES, SRCgAudio, autocast, exit_cleanly, mel_spectrogram, pick_device
from vocoder import mel_loss

NEW_WORDINGS = {                                         # none is a caption of the data
    "dog bark": ("a barking dog", "loud barking of dogs"),
    "rain": ("it is raining", "the steady sound of rain"),
    "sea waves": ("waves of the sea", "the ocean on the shore"),
    "baby cry": ("a crying baby", "the loud cry of an infant"),
    "clock tick": ("the clock is ticking", "ticking of a clock"),
    "person sneeze": ("a person is sneezing", "a sneezing person"),
    "helicopter": ("a helicopter is flying", "the blades of a helicopter"),
    "chainsaw": ("cutting with a chainsaw", "the sound of a chainsaw"),
    "rooster": ("a crowing rooster", "the crow of a rooster"),
    "fire crackling": ("the fire is crackling", "a campfire burns"),
}


class Judge(nn.Module):
    """Names the class of log-mels, (B, T, 64) -> (B, classes)."""

    def __init__(self, classes: int):
        super().__init__()
        widths = [1, 16, 32, 64, 128]
        self.layers = nn.Sequential(*(layer for c_in, c_out in zip(widths, widths[1:]) for layer in (
            nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(),
            nn.Conv2d(c_out, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU())))
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(2 * widths[-1], classes))

    def forward(self, mel: Tensor) -> Tensor:
        h = self.layers((mel[:, None] + 6) / 3)                                   # (B, 128, T/16, 4)
        return self.head(torch.cat([h.mean(dim=(2, 3)), h.amax(dim=(2, 3))], dim=1))


class RateJudge(nn.Module):
    """Names the sampling rate of log-mels by their `flicker`, (B, 5, 64) -> (B, rates)."""

    def __init__(self, rates: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(5 * 64, affine=False)
        self.layers = nn.Sequential(
            nn.Conv1d(5, 64, 5, padding=2), nn.ReLU(), nn.Conv1d(64, 64, 5, stride=2, padding=2), nn.ReLU(),
            nn.Conv1d(64, 32, 5, stride=2, padding=2), nn.ReLU(), nn.Flatten(), nn.Dropout(0.4), nn.Linear(512, rates))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.flatten(1)).view_as(x)
        return self.layers(x + 0.1 * torch.randn_like(x) if self.training else x)


def flicker(mels: Tensor) -> Tensor:
    """How each band of log-mels moves, (N, T, 64) -> (N, 5, 64): the size of its steps in time, as the log of their
    mean and as the mean of their logs; how much larger the steps of these steps are; and the correlation with the next
    band, in level and in steps.

    This tells the rate better than what sounds: the window is 6.4, 8.5, 6.4 and 4.3 hops long.
    """
    rows = []
    for mel in mels.split(64):
        mel = mel.clamp(min=-11.5)                       # a real mel goes no lower
        steps, steps_of_steps = mel.diff(dim=1), mel.diff(n=2, dim=1)
        size, size_of_steps = (torch.log(x.abs().mean(1) + 0.01) for x in (steps, steps_of_steps))
        rows.append(torch.stack([size, torch.log(steps.abs() + 0.01).mean(1), size_of_steps - size,
                                 correlation(mel), correlation(steps)], dim=1))
    return torch.cat(rows)


def correlation(x: Tensor) -> Tensor:
    """Of each band with the next over time, (B, T, 64) -> (B, 64); 0 for the last."""
    centred, deviation = x - x.mean(1, keepdim=True), x.std(1)
    products = (centred[..., 1:] * centred[..., :-1]).mean(1)
    return F.pad(products / (deviation[:, 1:] * deviation[:, :-1] + 0.01), (0, 1))


def roughen(mels: Tensor) -> Tensor:
    """Shifts mels (B, T, 64) in time and in level, colours them, adds noise and hides parts: for a judge of what is
    heard and not of how it was recorded."""
    x = torch.stack([torch.roll(mel, int(torch.randint(len(mel), ())), 0) for mel in mels])
    colour = 0.7 * F.interpolate(torch.randn(len(x), 1, 8), 64, mode="linear")
    noise = torch.rand(len(x), 1, 1) * torch.randn(x.shape)
    x = x + (torch.randn(len(x), 1, 1) + colour + noise).to(x.device)
    band, frame = int(torch.randint(56, ())), int(torch.randint(x.shape[1] - 60, ()))
    x[:, :, band:band + 8] = x[:, frame:frame + 60] = x.mean()
    return x.clamp(min=-11.6)


def train_judge(judge: nn.Module, heard: Tensor, labels: Tensor, epochs: int, augment=lambda heard: heard) -> nn.Module:
    """heard (N, ...): what this judge takes; labels (N,)."""
    judge.to(heard.device)
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, epochs * (len(heard) // 32))
    for _ in trange(epochs, desc="judge", leave=False):
        for batch in torch.randperm(len(heard), device=heard.device).split(32)[:len(heard) // 32]:
            optimizer.zero_grad()
            F.cross_entropy(judge(augment(heard[batch])), labels[batch], label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
    return judge.eval()


def share_right(judge: nn.Module, heard: Tensor, labels: Tensor) -> float:
    return (torch.cat([judge(part) for part in heard.split(64)]).argmax(1) == labels).float().mean().item()


def shifted_distances(a: Tensor, b: Tensor) -> Tensor:
    """Root mean squares of the differences of all pairs of mels (N, T, 64), (M, T, 64), at the best (circular) shift
    in time -> (N, M)."""
    spectra_b = torch.fft.rfft(b, dim=1).conj()
    rows = []
    for mel in a:
        cross = torch.fft.irfft((torch.fft.rfft(mel, dim=0) * spectra_b).sum(2), n=len(mel), dim=1)     # (M, T)
        rows.append(mel.square().sum() + b.square().sum(dim=(1, 2)) - 2 * cross.amax(1))
    return (torch.stack(rows).clamp(min=0) / a[0].numel()).sqrt()


def between(mels: Tensor) -> float:
    """The mean root-mean-square difference between the mels (N, T, 64) of all pairs."""
    flat = mels.flatten(1)
    return (torch.pdist(flat).mean() / flat.shape[1] ** 0.5).item()


def movement(mels: Tensor) -> float:
    """How much the bands of mels (N, T, 64) move from frame to frame: the mean of |mel[t + 1] - mel[t]|."""
    return mels.clamp(min=-11.5).diff(dim=1).abs().mean().item()


def share_above(waves: Tensor, hz: int) -> float:
    """The share of the energy of 48 kHz waves (B, L) above a frequency, the mean over the waves."""
    energy = torch.fft.rfft(waves).abs().square()
    return (energy[:, round(energy.shape[1] * hz / 24_000):].sum(1) / energy.sum(1)).mean().item()


class Recordings:
    """Real clips: mels by rate {rate: (N, T, 64)}, waves at 48 kHz, and the class of each (N,)."""

    def __init__(self, rows: list[dict], names: list[str], folder: Path, seconds: float, device: torch.device):
        clips = [Clip(folder / row["path"], row["caption"], *inspect(folder / row["path"])) for row in rows]
        self.labels = torch.tensor([names.index(row["class"]) for row in rows], device=device)
        self.mels = {}
        for rate in RATES:                               # 48 kHz is the last
            self.waves = torch.stack([clip.read(rate, 0, seconds) for clip in clips]).to(device)
            self.mels[rate] = mel_spectrogram(self.waves, rate)


def draw(pairs: list[tuple[str, Tensor, Tensor]], path: Path) -> None:
    """Pairs of mels (T, 64), a real one above a generated one, each pair a column; five columns a row."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(5, len(pairs))
    rows = -(-len(pairs) // columns)
    figure, axes = pyplot.subplots(2 * rows, columns, figsize=(2.4 * columns, 3 * rows), layout="constrained",
                                   squeeze=False)
    for i, (title, *mels) in enumerate(pairs):
        for kind, mel, row in zip(("real", "generated"), mels, (0, 1)):
            panel = axes[2 * (i // columns) + row, i % columns]
            panel.imshow(mel.T.cpu().numpy(), origin="lower", aspect="auto", vmin=-11.5, vmax=2)
            panel.set_title(f"{title}, {kind}", fontsize=8)
            panel.set_axis_off()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def generate(model: SRCgAudio, prompts: list[str], rate: int, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """-> mels before the vocoder (B, T, 64), and waves (B, L)."""
    mels, waves = [], []
    for first in trange(0, len(prompts), args.batch, desc=f"{rate} Hz", leave=False):
        mel = model.generate_mel(prompts[first:first + args.batch], rate, steps=args.steps, guidance=args.guidance,
                                 seed=args.seed + first)
        waves.append(model.vocoders[rate](mel))          # in float32, as SRCgAudio.generate does
        mels.append(mel)
    return torch.cat(mels), torch.cat(waves)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True, help="a CSV with the columns path, caption and class")
    parser.add_argument("--val", type=Path, required=True, help="the same")
    parser.add_argument("--audio", type=Path, required=True, help="the folder that the paths are relative to")
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).parent.parent / "small")
    parser.add_argument("--clips", type=int, default=200, help="at each rate and of each kind of prompt")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--guidance", type=float, help="default: the checkpoint's")
    parser.add_argument("--epochs", type=int, default=30, help="of the judges")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rates", type=int, nargs="+", default=list(RATES))
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="draw mels there (takes matplotlib)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    model = SRCgAudio.load(args.checkpoint, args.rates).to(device)

    rows = {}
    for path in (args.train, args.val):
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows[path] = list(csv.DictReader(file))
        if not rows[path] or not all(row.get(name) for row in rows[path] for name in ("path", "caption", "class")):
            raise ValueError(f"{path}: no CSV with path, caption and class in every row")
    names = sorted({row["class"] for row in rows[args.train]})
    if {row["class"] for row in rows[args.val]} != set(names):
        raise ValueError(f"{args.val}: its classes are not those of {args.train}")
    if set(names) - set(NEW_WORDINGS):
        raise ValueError(f"{args.train}: {', '.join(set(names) - set(NEW_WORDINGS))}: add new wordings to {__file__}")
    if args.pictures:
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("--pictures takes matplotlib, which is not installed: pip install matplotlib")
        args.pictures.mkdir(parents=True, exist_ok=True)
    if args.clips < 2 * len(names):                      # for the distance between two clips of a prompt
        raise ValueError(f"--clips must be at least twice the number of classes, {2 * len(names)}, got {args.clips}")

    leftover = (1 - model.schedule.alpha_bar[0].item()) ** 0.5 / model.vae.scale_factor.item()

    def through_vae(mels: Tensor, noise: float = 0.0) -> Tensor:
        with autocast(device, model.precision):
            z = model.vae.encode(mels)[0]
            return model.vae.decode(z + noise * torch.randn_like(z))

    train, val = (Recordings(rows[path], names, args.audio, model.config.seconds, device)
                  for path in (args.train, args.val))
    class_judge, rate_judge = Judge(len(names)), RateJudge(len(RATES))
    (real, classes, rates), (real_val, classes_val, rates_val) = (
        (torch.cat(list(data.mels.values())), data.labels.repeat(len(RATES)),
         torch.arange(len(RATES), device=device).repeat_interleave(len(data.labels))) for data in (train, val))
    # What the LDM makes lacks what the VAE drops, and should not be judged by it: the rate's judge learns from both.
    blurred = torch.cat([through_vae(part) for part in tqdm(real.split(8), "VAE", leave=False)])
    with torch.enable_grad():
        train_judge(class_judge, real, classes, args.epochs, roughen)
        train_judge(rate_judge, flicker(torch.cat([real, blurred])), rates.repeat(2), args.epochs)
    print(f"of real clips that they have not heard, the judge of the class is right on "
          f"{share_right(class_judge, real_val, classes_val):.0%}, that of the rate on "
          f"{share_right(rate_judge, flicker(real_val), rates_val):.0%}", flush=True)

    print("\n| rate | mel -> VAE -> mel, L1 | with the noise that DDIM leaves | movement of bands, real / with that "
          "noise | taken for their rate, real / with that noise | mel -> wave -> mel, L1 | with the VAE, L1 |\n"
          + "|---" * 7 + "|")
    for rate in args.rates:
        mels = val.mels[rate]
        passed, noisy = (torch.cat([through_vae(part, noise) for part in mels.split(8)]) for noise in (0.0, leftover))
        copies, copies_after_vae = (
            torch.cat([model.vocoders[rate](part) for part in heard.split(8)]) for heard in (mels, passed))
        right = (share_right(rate_judge, flicker(heard), torch.tensor(list(RATES).index(rate), device=device))
                 for heard in (mels, noisy))
        print(f"| {rate} | {mel_loss(mels, passed):.2f} | {mel_loss(mels, noisy):.2f} "
              f"| {movement(mels):.2f} / {movement(noisy):.2f} | {' / '.join(f'{share:.0%}' for share in right)} "
              f"| {mel_loss(mels, mel_spectrogram(copies, rate)):.2f} "
              f"| {mel_loss(mels, mel_spectrogram(copies_after_vae, rate)):.2f} |", flush=True)

    captions = {name: sorted({row["caption"] for row in rows[args.train] if row["class"] == name}) for name in names}
    labels = torch.arange(args.clips, device=device) % len(names)
    turns = [(names[i % len(names)], i // len(names)) for i in range(args.clips)]        # class after class
    known = [captions[name][turn // 2 % len(captions[name])] for name, turn in turns]    # each at least twice
    new = [NEW_WORDINGS[name][turn % len(NEW_WORDINGS[name])] for name, turn in turns]
    print("\n| rate | class right, mels before the vocoder | waves | new wordings | mels taken for "
          + ", ".join(map(str, RATES)) + " | distance between seeds / real "
          "| nearest training clip, and that of a real one, / median of real ones of the class |\n" + "|---" * 7 + "|")
    by_class, waves, at_all_rates = {name: [] for name in names}, None, []
    for rate in args.rates:
        mels, waves = generate(model, known, rate, args)
        heard = mel_spectrogram(waves, rate)
        predicted = torch.cat([class_judge(part) for part in heard.split(64)]).argmax(1)
        for i, name in enumerate(names):
            by_class[name].append((predicted == labels)[labels == i].float().mean().item())
        pairs = [(name, val.mels[rate][val.labels == i][0], heard[i]) for i, name in enumerate(names)]
        at_all_rates.append((f"{names[0]}, {rate // 1000} kHz", *pairs[0][1:]))
        _, new_waves = generate(model, new, rate, args)
        taken_for = torch.bincount(rate_judge(flicker(mels)).argmax(1), minlength=len(RATES)) / args.clips
        # Seeds of one prompt against real clips of its class
        spreads = [(between(heard[[i for i, text in enumerate(known) if text == caption]]),
                    between(val.mels[rate][val.labels == names.index(name)]))
                   for name in names for caption in captions[name] if known.count(caption) > 1]
        diversity = sum(a / b for a, b in spreads) / len(spreads) if spreads else float("nan")
        # Rain lies nearer to rain than a bark to a bark: each is measured by real clips of its class
        nearest, of_real = (shifted_distances(mels, train.mels[rate]).amin(1) for mels in (heard, val.mels[rate]))
        medians = torch.stack([of_real[val.labels == i].median() for i in range(len(names))])
        print(f"| {rate} | {share_right(class_judge, mels, labels):.0%} "
              f"| {(predicted == labels).float().mean():.0%} "
              f"| {share_right(class_judge, mel_spectrogram(new_waves, rate), labels):.0%} "
              f"| {', '.join(f'{share:.0%}' for share in taken_for.tolist())} | {diversity:.2f} "
              f"| {(nearest / medians[labels]).min():.2f}, {(of_real / medians[val.labels]).min():.2f} |",
              flush=True)

    if args.pictures:
        draw(pairs, args.pictures / "classes.png")
        draw(at_all_rates, args.pictures / "rates.png")

    print("\n| class | right at " + ", ".join(map(str, args.rates))
          + " | energy above 8 kHz at 48 kHz, generated / real / those through the vocoder / real ones of the training "
          "| above 12 kHz |\n"
          + "|---" * 4 + "|")
    for i, name in enumerate(names):
        shares = [" / ".join(f"{share_above(sound[of == i], hz):.4f}" for sound, of in (
                      (waves, labels), (val.waves, val.labels), (copies, val.labels), (train.waves, train.labels)))
                  for hz in (8_000, 12_000)] if args.rates[-1] == 48_000 else ["", ""]
        print(f"| {name} | {', '.join(f'{share:.0%}' for share in by_class[name])} | {shares[0]} | {shares[1]} |")


if __name__ == "__main__":
    exit_cleanly(main)
