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

from data import Clip, file_digest, inspect
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


def named(judge: nn.Module, heard: Tensor) -> Tensor:
    """Which class or rate the judge hears in each item, (N, ...) -> (N,)."""
    return torch.cat([judge(part) for part in heard.split(64)]).argmax(1)


def share_right(judge: nn.Module, heard: Tensor, labels: Tensor) -> float:
    return (named(judge, heard) == labels).float().mean().item()


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
        paths = [folder / row["path"] for row in rows]
        clips = [Clip(path, row["caption"], *inspect(path), file_digest(path)) for path, row in zip(paths, rows)]
        self.labels = torch.tensor([names.index(row["class"]) for row in rows], device=device)
        self.mels = {}
        for rate in RATES:                               # 48 kHz is the last
            self.waves = torch.stack([clip.read(rate, 0, seconds) for clip in clips]).to(device)
            self.mels[rate] = mel_spectrogram(self.waves, rate)


def draw(pairs: list[tuple[str, Tensor, Tensor]], path: Path) -> None:
    """Pairs of mels (T, 64), a real one above a generated one, each pair a column; five columns a row."""
    from matplotlib.figure import Figure

    columns = min(5, len(pairs))
    rows = -(-len(pairs) // columns)
    figure = Figure(figsize=(2.4 * columns, 3 * rows), layout="constrained")
    axes = figure.subplots(2 * rows, columns, squeeze=False)
    for i, (title, *mels) in enumerate(pairs):
        for kind, mel, row in zip(("real", "generated"), mels, (0, 1)):
            panel = axes[2 * (i // columns) + row, i % columns]
            panel.imshow(mel.T.cpu().numpy(), origin="lower", aspect="auto", vmin=-11.5, vmax=2)
            panel.set_title(f"{title}, {kind}", fontsize=8)
            panel.set_axis_off()
    figure.savefig(path, dpi=90)


def parse() -> argparse.Namespace:
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
    return parser.parse_args()


def read_tables(args: argparse.Namespace) -> tuple[list[dict], list[dict], list[str]]:
    """The rows of both tables, and the names of the classes.  Raises ValueError for what can't be judged."""
    tables = []
    for path in (args.train, args.val):
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        if not rows or not all(row.get(name) for row in rows for name in ("path", "caption", "class")):
            raise ValueError(f"{path}: no CSV with path, caption and class in every row")
        tables.append(rows)
    names, val_names = ({row["class"] for row in rows} for rows in tables)
    if val_names != names:
        raise ValueError(f"{args.val}: its classes are not those of {args.train}")
    if names - set(NEW_WORDINGS):
        raise ValueError(f"{args.train}: {', '.join(names - set(NEW_WORDINGS))}: add new wordings to {__file__}")
    if args.clips < 2 * len(names):                      # for the distance between two clips of a prompt
        raise ValueError(f"--clips must be at least twice the number of classes, {2 * len(names)}, got {args.clips}")
    return *tables, sorted(names)


def through_vae(model: SRCgAudio, mels: Tensor, noise: float = 0.0) -> Tensor:
    """Mels (B, T, 64) as they come back from the VAE, with noise of that deviation in the latent."""
    parts = []
    for part in tqdm(mels.split(8), "VAE", leave=False):
        with autocast(model.device, model.precision):
            z = model.vae.encode(part)[0]
            parts.append(model.vae.decode(z + noise * torch.randn_like(z)))
    return torch.cat(parts)


def train_judges(model: SRCgAudio, train: Recordings, val: Recordings, classes: int,
                 epochs: int) -> tuple[Judge, RateJudge]:
    """The judges of the class and of the rate.  Prints how often they are right on `val`."""
    (real, labels, rates), (real_val, labels_val, rates_val) = (
        (torch.cat(list(data.mels.values())), data.labels.repeat(len(RATES)),
         torch.arange(len(RATES), device=model.device).repeat_interleave(len(data.labels))) for data in (train, val))
    # What the LDM makes lacks what the VAE drops, and should not be judged by it: the rate's judge learns from both.
    heard = flicker(torch.cat([real, through_vae(model, real)]))
    with torch.enable_grad():
        class_judge = train_judge(Judge(classes), real, labels, epochs, roughen)
        rate_judge = train_judge(RateJudge(len(RATES)), heard, rates.repeat(2), epochs)
    print(f"of real clips that they have not heard, the judge of the class is right on "
          f"{share_right(class_judge, real_val, labels_val):.0%}, that of the rate on "
          f"{share_right(rate_judge, flicker(real_val), rates_val):.0%}", flush=True)
    return class_judge, rate_judge


def vocode(model: SRCgAudio, mels: Tensor, rate: int) -> Tensor:
    """Mels (B, T, 64) -> waves (B, L), in float32, as SRCgAudio.generate makes them."""
    return torch.cat([model.vocoders[rate](part) for part in mels.split(8)])


def judge_copies(model: SRCgAudio, val: Recordings, rate_judge: RateJudge, rates: list[int]) -> None:
    """Prints what VAE and vocoders make of real mels."""
    # What DDIM leaves in z_0 (NoiseSchedule.ddim), in the latent before its scale
    ddim_noise = (1 - model.schedule.alpha_bar[0].item()) ** 0.5 / model.vae.scale_factor.item()
    print("\n| rate | mel -> VAE -> mel, L1 | with the noise that DDIM leaves | movement of bands, real / with that "
          "noise | taken for their rate, real / with that noise | mel -> wave -> mel, L1 | with the VAE, L1 |\n"
          + "|---" * 7 + "|")
    for rate in rates:
        mels = val.mels[rate]
        passed, noisy = through_vae(model, mels), through_vae(model, mels, ddim_noise)
        index = torch.tensor(list(RATES).index(rate), device=model.device)
        right = [f"{share_right(rate_judge, flicker(heard), index):.0%}" for heard in (mels, noisy)]
        copied, copied_after_vae = (mel_spectrogram(vocode(model, heard, rate), rate) for heard in (mels, passed))
        print(f"| {rate} | {mel_loss(mels, passed):.2f} | {mel_loss(mels, noisy):.2f} "
              f"| {movement(mels):.2f} / {movement(noisy):.2f} | {' / '.join(right)} "
              f"| {mel_loss(mels, copied):.2f} | {mel_loss(mels, copied_after_vae):.2f} |", flush=True)


def generate(model: SRCgAudio, prompts: list[str], rate: int, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """-> mels before the vocoder (B, T, 64), and waves (B, L)."""
    mels = torch.cat([model.generate_mel(prompts[first:first + args.batch], rate, steps=args.steps,
                                         guidance=args.guidance, seed=args.seed + first)
                      for first in trange(0, len(prompts), args.batch, desc=f"{rate} Hz", leave=False)])
    return mels, vocode(model, mels, rate)


def spread(heard: Tensor, prompts: list[str], captions: dict[str, list[str]], val: Recordings, rate: int) -> float:
    """How much the generated mels of one prompt differ from each other, over how much real clips of its class do."""
    shares = []
    for i, captions_of_class in enumerate(captions.values()):
        real = between(val.mels[rate][val.labels == i])
        for caption in captions_of_class:
            of_one = [k for k, prompt in enumerate(prompts) if prompt == caption]
            if len(of_one) > 1:
                shares.append(between(heard[of_one]) / real)
    return sum(shares) / len(shares)


def nearest_recording(heard: Tensor, labels: Tensor, train: Recordings, val: Recordings, rate: int) -> list[float]:
    """How near the nearest of the generated mels, and of real ones, comes to a recording of the training: over the
    median of real ones of its class, since rain lies nearer to rain than a bark to a bark."""
    distances, of_real = (shifted_distances(mels, train.mels[rate]).amin(1) for mels in (heard, val.mels[rate]))
    medians = torch.stack([of_real[val.labels == i].median() for i in range(int(labels.max()) + 1)])
    return [(distances / medians[labels]).min().item(), (of_real / medians[val.labels]).min().item()]


def judge_highs(model: SRCgAudio, waves: Tensor, labels: Tensor, train: Recordings, val: Recordings,
                names: list[str]) -> None:
    """Prints the highs of 48 kHz waves (N, L), class by class, beside those of real ones."""
    print("\n| class | energy above 8 kHz at 48 kHz, generated / real / those through the vocoder / real ones of the "
          "training | above 12 kHz |\n" + "|---" * 3 + "|")
    kinds = ((waves, labels), (val.waves, val.labels), (vocode(model, val.mels[48_000], 48_000), val.labels),
             (train.waves, train.labels))
    for i, name in enumerate(names):
        shares = [" / ".join(f"{share_above(sound[of == i], hz):.4f}" for sound, of in kinds) for hz in (8_000, 12_000)]
        print(f"| {name} | {shares[0]} | {shares[1]} |")


@torch.no_grad()
def main() -> None:
    args = parse()
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    model = SRCgAudio.load(args.checkpoint, args.rates).to(device)
    train_rows, val_rows, names = read_tables(args)
    if args.pictures:
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("--pictures takes matplotlib, which is not installed: pip install matplotlib")
        args.pictures.mkdir(parents=True, exist_ok=True)
    train, val = (Recordings(rows, names, args.audio, model.config.seconds, device) for rows in (train_rows, val_rows))
    class_judge, rate_judge = train_judges(model, train, val, len(names), args.epochs)
    judge_copies(model, val, rate_judge, args.rates)

    captions = {name: sorted({row["caption"] for row in train_rows if row["class"] == name}) for name in names}
    labels = torch.arange(args.clips, device=device) % len(names)
    turns = [(names[i % len(names)], i // len(names)) for i in range(args.clips)]        # class after class
    known = [captions[name][turn // 2 % len(captions[name])] for name, turn in turns]    # each at least twice
    new = [NEW_WORDINGS[name][turn % len(NEW_WORDINGS[name])] for name, turn in turns]
    waves, heard, right = {}, {}, {}                     # by rate
    print("\n| rate | class right, mels before the vocoder | waves | new wordings | mels taken for "
          + ", ".join(map(str, RATES)) + " | distance between seeds / real "
          "| nearest training clip, and that of a real one, / median of real ones of the class |\n" + "|---" * 7 + "|")
    for rate in args.rates:
        mels, waves[rate] = generate(model, known, rate, args)
        _, new_waves = generate(model, new, rate, args)
        heard[rate] = mel_spectrogram(waves[rate], rate)
        right[rate] = named(class_judge, heard[rate]) == labels
        taken_for = torch.bincount(named(rate_judge, flicker(mels)), minlength=len(RATES)) / args.clips
        nearest = nearest_recording(heard[rate], labels, train, val, rate)
        print(f"| {rate} | {share_right(class_judge, mels, labels):.0%} | {right[rate].float().mean():.0%} "
              f"| {share_right(class_judge, mel_spectrogram(new_waves, rate), labels):.0%} "
              f"| {', '.join(f'{share:.0%}' for share in taken_for.tolist())} "
              f"| {spread(heard[rate], known, captions, val, rate):.2f} | {nearest[0]:.2f}, {nearest[1]:.2f} |",
              flush=True)

    print("\n| class | waves right at " + ", ".join(map(str, args.rates)) + " |\n" + "|---" * 2 + "|")
    for i, name in enumerate(names):
        print(f"| {name} | {', '.join(f'{right[rate][labels == i].float().mean():.0%}' for rate in args.rates)} |")
    if 48_000 in args.rates:
        judge_highs(model, waves[48_000], labels, train, val, names)
    if args.pictures:
        first = {rate: [(val.mels[rate][val.labels == i][0], heard[rate][i]) for i in range(len(names))]
                 for rate in args.rates}
        draw([(name, *pair) for name, pair in zip(names, first[args.rates[-1]])], args.pictures / "classes.png")
        draw([(f"{names[0]}, {rate // 1000} kHz", *first[rate][0]) for rate in args.rates], args.pictures / "rates.png")


if __name__ == "__main__":
    exit_cleanly(main)
