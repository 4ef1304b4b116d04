"""Captioned audio: reading and resampling, finding clips in the datasets of Section III-A, a cache on disk.

    read_audio    a file, or a part of it -> wave (L,) at any rate, mono
    resample      wave (L,) at one rate -> wave at another, band-limited
    find_clips    caption files and folders as they are published -> list of Clip
    Cache         what has been computed once from files and frozen networks

What is loaded has zero mean and a peak of 0.5 over the whole recording, so sounds are equally loud at any rate and in
any crop.  (AudioLDM scales each resampled crop to it.)
"""
import csv
import functools
import hashlib
import json
import math
import os
import re
import sqlite3
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import weights

SUFFIXES = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff"}
NOT_READ = {".m4a", ".aac", ".wma", ".webm"}             # libsndfile can't; named, so that nobody thinks they were
BLOCK = 2 ** 22                                          # samples
LARGEST_CAPTIONS = 2 ** 30                               # bytes of a JSON file


@dataclass(frozen=True)
class Clip:
    """One recording.  mean: of its mono wave; peak: the largest distance from that.  They bring it to zero mean and a
    peak of 0.5."""

    path: Path
    caption: str
    rate: int                                            # of the file, Hz
    samples: int
    mean: float
    peak: float
    digest: bytes                                        # of the file these facts are about

    @property
    def recording(self) -> tuple:
        """What identifies a recording wherever it lies: name, rate, length and level, rounded, as its last digits
        depend on the number of threads."""
        return self.path.name, self.rate, self.samples, f"{self.mean:.6f}", f"{self.peak:.6f}"

    def reaches(self, rate: int) -> bool:
        """Whether the file's rate reaches `rate`: 44.1 kHz counts as reaching 48 kHz."""
        return self.rate >= 0.9 * rate

    def read(self, rate: int, start: float, seconds: float) -> Tensor:
        """The wave at `rate` with its level adjusted, (round(seconds * rate),), from `start` seconds on.  Silence
        follows where the file ends early.  Raises ValueError if the file is no longer what it was."""
        margin = 0.05                                    # what the resampler wants to see on both sides
        first = max(0, int((start - margin) * self.rate))
        wave, _ = read_audio(self.path, first, math.ceil((seconds + 2 * margin) * self.rate))
        if file_digest(self.path) != self.digest:        # its level would be wrong, and its rate perhaps
            raise ValueError(f"{self.path}: changed since this run began; start it again")
        wave = resample((wave - self.mean) * (0.5 / self.peak), self.rate, rate)
        wave = wave[round((start - first / self.rate) * rate):][:round(seconds * rate)]
        return F.pad(wave, (0, round(seconds * rate) - len(wave)))


def read_audio(path: str | Path, first: int = 0, samples: int = -1) -> tuple[Tensor, int]:
    """A file's wave (L,), its channels averaged, and its rate in Hz; or `samples` of it from sample `first` on.

    Raises ValueError naming the file if it is missing, empty, truncated or not audio, or holds NaN or inf.
    """
    blocks, rates = zip(*read_blocks(path, first, samples))
    return torch.cat(blocks), rates[0]


def read_blocks(path: str | Path, first: int = 0, samples: int = -1) -> Iterator[tuple[Tensor, int]]:
    """What `read_audio` gives, in blocks, since recordings can be hours long."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such audio file")
    whole = first == 0 and samples < 0
    length = 0
    try:
        with soundfile.SoundFile(path) as file:
            promised = file.frames
            if promised > 2 ** 62:                       # a FLAC that was written to a pipe
                raise ValueError(f"{path}: its header does not say how long it is; write it anew with flac or ffmpeg")
            # After a seek libsndfile decodes the next frames of an MP3 wrongly, and soundfile seeks after each read: so
            # an MP3 is read from its start, in one piece, and so is what libsndfile can't seek in.
            at_once = file.format == "MP3" or not file.seekable()
            if at_once and promised > 100 * path.stat().st_size:       # an MP3 has 24 to a byte at most
                raise ValueError(f"{path}: damaged; its header promises {promised} samples")
            begin, most = (0, promised + 1) if at_once else (min(first, promised), BLOCK)
            if begin:
                file.seek(begin)
            while True:
                wanted = most if samples < 0 else min(most, first - begin + samples - length)
                block = file.read(wanted, dtype="float32", always_2d=True)
                if not np.isfinite(block).all():
                    raise ValueError(f"{path}: holds samples that are NaN or infinite")
                length += len(block)
                if len(block) or not whole:
                    yield torch.from_numpy(block[first - begin:].mean(axis=1)), file.samplerate          # (L,)
                if len(block) < most:
                    break
            # Of an MP3 of constant bitrate without a header, libsndfile guesses the length from the size.
            promised *= 0.99 if file.format == "MP3" else 1
            truncated = whole and (length < promised or ends_early(path, file))
    except (soundfile.SoundFileError, RuntimeError) as error:
        path.open("rb").close()                          # says so if it may not be read
        reason = "it is empty" if path.stat().st_size == 0 else str(error).split(": ")[-1].strip().rstrip(".")
        raise ValueError(f"{path}: not readable audio, or truncated ({reason})") from None
    if truncated:
        raise ValueError(f"{path}: truncated; copy it anew, or leave it out")
    if whole and length == 0:
        raise ValueError(f"{path}: holds no samples")


def ends_early(path: Path, sound: soundfile.SoundFile) -> bool:
    """Whether a WAV, AIFF or Ogg file was cut off, which libsndfile reads without a word."""
    if sound.format == "OGG":                            # the last page of a stream carries an end mark
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 2 ** 17))
            tail = file.read()
        page = tail.rfind(b"OggS")
        return page < 0 or page + 5 >= len(tail) or not tail[page + 5] & 4
    # libsndfile's log says "data : 1000 (should be 500)", of AIFF " SSND : ..."; a stream of unknown length promises
    # 2 GiB (SoX) or 4 (FFmpeg)
    found = re.search(r"^ ?(?:data|SSND)\s*: (\d+) \(should be", sound.extra_info, re.MULTILINE)
    return found is not None and int(found[1]) < 0x7FFFF000


def resample(wave: Tensor, rate: int, new_rate: int) -> Tensor:
    """Resampling by a Kaiser-windowed sinc, (L,) at `rate` -> (ceil(L * new_rate / rate),) at `new_rate`.

    The low-pass is flat to 0.9 of the lower Nyquist frequency, and more than 80 dB down from that frequency on.
    Output n lies at input time n * rate / new_rate; with the ratio reduced to down / up, outputs n and n + up take the
    same filter, so each of the `up` phases is a convolution with stride `down`.
    """
    if rate == new_rate or len(wave) == 0:
        return wave
    divisor = math.gcd(rate, new_rate)
    down, up = rate // divisor, new_rate // divisor
    half, kernels = resampling_kernels(down, up)
    length = math.ceil(len(wave) * up / down)
    blocks = math.ceil(length / up)                      # of `up` outputs each, from `down` inputs
    x = F.pad(wave, (half, blocks * down + half - len(wave) + down))[None, None]
    phases = []
    for start, kernel in kernels:
        span = x[..., start:start + (blocks - 1) * down + kernel.shape[2]]
        phases.append(F.conv1d(span, kernel, stride=down)[0])          # (phases, blocks)
    return torch.cat(phases).T.flatten()[:length]


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)                             # else training's backward refuses what validation left here
def resampling_kernels(down: int, up: int) -> tuple[int, list[tuple[int, Tensor]]]:
    """Half the length of the filter, in input samples; and for each 64 phases, which share most of their inputs, the
    first of these and the taps, (phases, 1, taps)."""
    cutoff = 0.95 * min(1, up / down)                    # in units of the input's Nyquist frequency
    half = math.ceil(60 / min(1, up / down))
    kernels = []
    for phase in torch.arange(up).split(64):
        time = phase.double() * down / up                # of each output, in input samples
        start = int(time[0])
        taps = torch.arange(start - half, math.ceil(time[-1]) + half + 1)
        distance = taps - time[:, None]                  # (phases, taps)
        window = torch.special.i0(9.0 * (1 - (distance / (half + 1)) ** 2).clamp(min=0).sqrt())
        window = window * (distance.abs() <= half + 1) / torch.special.i0(torch.tensor(9.0, dtype=torch.float64))
        kernels.append((start, (cutoff * torch.sinc(cutoff * distance) * window).float()[:, None]))
    return half, kernels


# ---------------------------------------------------------------------------------------------------------------------
# The cache


def digest(*parts: object) -> bytes:
    """16 bytes that stand for what was computed from these parts."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


def file_digest(path: Path) -> bytes:
    """Changes when the file does: its place, size and time of change."""
    try:
        status = path.stat()
        return digest(str(path.resolve()), status.st_size, status.st_mtime_ns)
    except (OSError, ValueError):                        # not there, or no path at all
        return digest(str(path), None)


class Cache:
    """Arrays of 16 bits and facts about files, kept in a folder under the digest of all that they were made from.

    So what was made from a file or a network that has changed since is not found again: stale entries take room (delete
    the folder to have it back) but are never read.  arrays.f16 holds the numbers, index.sqlite says where.  Several
    runs may share a cache and be killed at any moment: an array counts from when the index names it.
    """

    def __init__(self, folder: Path):
        self.folder, self.arrays = folder, folder / "arrays.f16"
        folder.mkdir(parents=True, exist_ok=True)
        self.arrays.touch()
        with self.named_errors():
            self.index = sqlite3.connect(folder / "index.sqlite", timeout=3600, isolation_level=None)
        self.execute("CREATE TABLE IF NOT EXISTS arrays (key BLOB PRIMARY KEY, start INTEGER, size INTEGER)")
        self.execute("CREATE TABLE IF NOT EXISTS facts (key BLOB PRIMARY KEY, fact TEXT)")
        if self.end() > self.arrays.stat().st_size // 2:
            raise ValueError(f"{self.arrays}: shorter than its index says; delete the folder {folder}")

    @contextmanager
    def named_errors(self) -> Iterator[None]:
        """In here SQLite's errors become ours, which name the file and say what to do."""
        try:
            yield
        except sqlite3.OperationalError as error:        # a full disk, a folder that can't be written
            raise OSError(f"{self.folder / 'index.sqlite'}: {error}") from None
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{self.folder / 'index.sqlite'}: {error}; delete the folder {self.folder}") from None

    def execute(self, command: str, values: tuple = ()) -> sqlite3.Cursor:
        with self.named_errors():
            return self.index.execute(command, values)

    def end(self) -> int:
        return self.execute("SELECT MAX(start + size) FROM arrays").fetchone()[0] or 0

    def find(self, key: bytes) -> tuple[int, int] | None:
        """Where an array lies: its start and size, in numbers; None if it is not there."""
        return self.execute("SELECT start, size FROM arrays WHERE key = ?", (key,)).fetchone()

    def add(self, arrays: dict[bytes, np.ndarray]) -> None:
        with self.named_errors(), self.index:            # committed at its end, rolled back if this fails
            self.execute("BEGIN IMMEDIATE")              # one writer at a time
            start = self.end()
            with open(self.arrays, "r+b") as file:
                file.seek(2 * start)
                for key, array in arrays.items():
                    file.write(array.astype(np.float16).tobytes())
                    self.execute("INSERT OR REPLACE INTO arrays VALUES (?, ?, ?)", (key, start, array.size))
                    start += array.size
                file.flush()
                os.fsync(file.fileno())

    def fact(self, key: bytes) -> list | None:
        found = self.execute("SELECT fact FROM facts WHERE key = ?", (key,)).fetchone()
        return json.loads(found[0]) if found else None

    def add_facts(self, facts: dict[bytes, list]) -> None:
        with self.named_errors(), self.index:
            self.execute("BEGIN IMMEDIATE")
            self.index.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)",
                                   [(key, json.dumps(fact)) for key, fact in facts.items()])


def read_array(arrays: Path, place: tuple[int, int]) -> Tensor:
    """The array at a place that `Cache.find` gave, (size,), as float32."""
    # Mapped anew each time: one lasting map of the whole file would come to count as this process's memory.
    array = np.memmap(arrays, np.float16, "r", 2 * int(place[0]), int(place[1]))
    return torch.from_numpy(array.astype(np.float32))


# ---------------------------------------------------------------------------------------------------------------------
# Finding clips: captions as they are published


class Row(NamedTuple):
    """A line of a caption file.  Published ones give an id, which the audio file's name is made of in several ways."""

    names: list[str]                                     # names the audio file may have, without folder and suffix
    caption: str
    blacklisted_as: str = ""                             # its id in WavCaps' blacklists, if not the file's name
    path: Path | None = None                             # of the audio, where the row gives it


def read_rows(source: Path, folder: Path, captions: bool, split: str) -> list[Row]:
    """The rows of a caption file, in any of README.md's formats; folder: with its audio; split: of VGGSound's rows.

    Raises ValueError naming the file.
    """
    if source.suffix.lower() == ".json":                 # WavCaps
        entries = weights.read_json(source, largest=LARGEST_CAPTIONS).get("data")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) and {"id", "caption"} <= set(entry)
                                                    for entry in entries):
            raise ValueError(f'{source}: not as WavCaps\'s files are, {{"data": [{{"id": ..., "caption": ...}}, ...]}}')
        texts = [entry["caption"] if isinstance(entry["caption"], str) else "" for entry in entries]
        texts = [text.encode(errors="replace").decode() for text in texts]        # JSON can hold halves of characters
        return [Row([stem(entry["id"])], text) for entry, text in zip(entries, texts)]
    columns, *lines = read_csv(source)
    if len(columns) == 4 and columns[3] in ("train", "test"):          # VGGSound has no line of names
        try:
            return [Row([f"{youtube}_{int(start):06}", f"{youtube}_{start}", youtube, f"Y{youtube}"], label,
                        f"Y{youtube}") for youtube, start, label, part in [columns, *lines] if part == split]
        except ValueError:
            raise ValueError(f"{source}: not every line is as VGGSound's are, youtube id,start,label,split") from None
    rows = by_column(columns, lines, source)
    if {"path", "caption"} <= set(columns) or not captions and "path" in columns:
        return [Row([], row.get("caption", ""), path=folder / row["path"]) for row in rows]
    if {"audiocap_id", "youtube_id", "start_time", "caption"} <= set(columns):
        return [Row([row["youtube_id"], f"Y{row['youtube_id']}", f"{row['youtube_id']}_{row['start_time']}",
                     row["audiocap_id"]], row["caption"], f"Y{row['youtube_id']}") for row in rows]
    if {"filename", "category"} <= set(columns):         # ESC-50
        return [Row([stem(row["filename"])], row["category"].replace("_", " ")) for row in rows]
    raise ValueError(f"{source}: its first line, {','.join(columns)[:80]!r}, has no columns path and caption with a "
                     f"comma between them, nor AudioCaps', ESC-50's or VGGSound's")


def read_csv(path: Path) -> list[list[str]]:
    """The lines of a CSV, at least one and none longer than the first.  Raises ValueError naming file and line."""
    lines: list[list[str]] = []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            between = "," if "," in first else ";"       # a spreadsheet's, where the comma is the decimal point
            reader = csv.reader(chain([first], file), delimiter=between, strict=True, skipinitialspace=True)
            for line in filter(None, reader):
                lines.append([cell.strip() for cell in line])
                if len(line) > len(lines[0]):
                    raise ValueError(f"{path}, line {reader.line_num}: {len(line)} fields, the first line has "
                                     f"{len(lines[0])}; put quotes around a text with a {between!r}")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such caption file or folder") from None
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not a CSV, or a quote is left open ({error})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text in UTF-8 ({error})") from None
    return lines or [[]]


def by_column(columns: list[str], lines: list[list[str]], path: Path) -> list[dict[str, str]]:
    """Each line as a dict; what a short line lacks is empty.  Raises ValueError if two columns have one name."""
    for name in filter(None, columns):
        if columns.count(name) > 1:
            raise ValueError(f"{path}: its first line names the column {name} {columns.count(name)} times; name one")
    return [dict(zip_longest(columns, line, fillvalue="")) for line in lines]


def stem(name: object) -> str:
    """A file's name without its audio suffix; ids of WavCaps may or may not have one."""
    path = Path(str(name))
    return path.stem if path.suffix.lower() in SUFFIXES else str(name)


def audio_files(folder: Path, suffixes: Set[str] = SUFFIXES) -> list[Path]:
    """All of these kinds below a folder, links followed.  Raises OSError for a folder that can't be read."""
    def refuse(error: OSError) -> None:
        raise error

    found, seen = [], set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if os.path.realpath(place) in seen:              # a link may lead above itself
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        found += [Path(place, name) for name in names if Path(name).suffix.lower() in suffixes]
    return sorted(found)


def find_audio(row: Row, files: dict[str, list[Path]]) -> Path:
    """The row's file among those of a folder, by name without suffix.  Raises ValueError if it is not there."""
    if row.path is not None:
        return row.path
    for name in row.names:
        if len(files.get(name, [])) == 1:
            return files[name][0]
        if name in files:
            raise ValueError(f"{name}: several files have this name, such as {files[name][0]} and {files[name][1]}")
    raise ValueError(f"{row.names[0]}: no such audio file")


def read_blacklist(path: Path) -> set[str]:
    """The ids in one of WavCaps' blacklists, {"AudioSet": ["Y...wav", ...], "FreeSound": ["156", ...]}, as stems.

    Caption files do not name their source, so a SoundBible clip with the number of a listed Freesound one counts too.
    """
    lists = weights.read_json(path, largest=LARGEST_CAPTIONS)
    if not all(isinstance(ids, list) for ids in lists.values()):
        raise ValueError(f"{path}: not as WavCaps' blacklists are, lists of ids under the names of their sources")
    return {stem(name) for ids in lists.values() for name in ids}


def find_clips(sources: list[list[Path]], cache: Cache, captions: bool = True, blacklists: Sequence[Path] = (),
               split: str = "train", progress: bool = True) -> tuple[list[Clip], list[str]]:
    """The clips of several sources, and a line for each that is left out: its name and why.

    A source is a folder of audio files, or a caption file (README.md has the formats) and, where its audio is not
    beside it, the folder with it.  blacklists: WavCaps' files of test clips, known by their id or by their file's name.
    captions: whether the job needs them; a folder has none.  Reads every file whole, unless the cache knows it.
    Raises ValueError if no clip is left.
    """
    blacklisted = set().union(*(read_blacklist(path) for path in blacklists))
    found, left_out = [], []                             # (audio path, caption), lines
    for source, *folders in sources:
        if len(folders) > 1 or folders and not folders[0].is_dir():
            raise ValueError(f"{folders[-1]}: not a folder; a source is a caption file and the folder with its audio, "
                             f"and another source is another --data")
        folder = folders[0] if folders else source.parent
        if not source.is_dir():
            rows = read_rows(source, folder, captions, split)
        elif captions:
            raise ValueError(f"{source}: a folder has no captions; name a caption file, then the folder")
        else:
            rows = [Row([], "", path=path) for path in audio_files(source, SUFFIXES | NOT_READ)]
        files: dict[str, list[Path]] = {}
        if any(row.path is None for row in rows):
            for path in audio_files(folder):
                files.setdefault(path.stem, []).append(path)
        for row in rows:
            try:
                path = find_audio(row, files)
                if captions and not row.caption.strip():
                    raise ValueError(f"{path}: has no caption in {source.name}")
                if (row.blacklisted_as or path.stem) in blacklisted:
                    raise ValueError(f"{path}: on a blacklist of test clips")
                found.append((path, row.caption.strip()))
            except ValueError as error:
                left_out.append(str(error))
    digests = {path: file_digest(path) for path, _ in found}
    facts = inspect_all(digests, cache, progress)
    clips = [Clip(path, caption, *facts[path], digests[path])
             for path, caption in found if not isinstance(facts[path], str)]
    left_out = list(dict.fromkeys(left_out)) + sorted(fact for fact in facts.values() if isinstance(fact, str))
    if not clips:
        reason = f"{len(left_out)} left out, such as {left_out[0]}" if left_out else "there are none"
        raise ValueError(f"{', '.join(str(source) for source, *_ in sources)}: no clips to use (WAV, FLAC, Ogg, Opus, "
                         f"MP3 or AIFF); {reason}")
    return clips, left_out


def inspect_all(digests: dict[Path, bytes], cache: Cache, progress: bool) -> dict[Path, list | str]:
    """What `inspect` says of each file, or the line that says what is wrong with it."""
    facts = {path: cache.fact(key) for path, key in digests.items()}
    new = [path for path in sorted(digests) if facts[path] is None]

    def look(path: Path) -> list | str:
        try:
            return inspect(path)
        except UnicodeError:                             # a name of bytes that are no UTF-8
            return f"{ascii(str(path))}: soundfile can't open a file of this name; rename it"
        except (OSError, ValueError) as error:
            return str(error)

    with (ThreadPoolExecutor() as threads,
          tqdm(total=len(new), desc="reading", leave=False, disable=not progress) as bar):
        for first in range(0, len(new), 1000):
            chunk = new[first:first + 1000]
            for path, fact in zip(chunk, threads.map(look, chunk)):
                facts[path] = fact
                bar.update()
            cache.add_facts({digests[path]: facts[path] for path in chunk if not isinstance(facts[path], str)})
    return facts


def inspect(path: Path) -> list:
    """Rate, samples, mean and peak of a file.  Raises ValueError naming it if it can't be used."""
    samples, total, low, high = 0, 0.0, math.inf, -math.inf
    for wave, rate in read_blocks(path):
        if not 1_000 <= rate <= 1_000_000:               # no recording's, and resampling would fill the memory
            raise ValueError(f"{path}: a sampling rate of {rate} Hz can't be right")
        samples += len(wave)
        total += wave.sum(dtype=torch.float64).item()
        low, high = min(low, wave.min().item()), max(high, wave.max().item())
    mean = total / samples
    peak = max(high - mean, mean - low)
    if peak < 1e-4:                                      # -80 dB
        raise ValueError(f"{path}: silent")
    return [rate, samples, mean, peak]
