"""Adds LoRA files to a pool: checked, copied whole with the files beside them, or not at all.

Everything is made in a hidden folder of the pool first, so that a file appears in the pool only
when it is complete, has the bytes of its source and can be loaded.

Pickles (.pt, .ckpt, .bin) are converted on request. A pickle is a program, and opening one can do
anything; they are read only through ``torch.load(weights_only=True)``, which runs no code of the
file in torch 2.6 and later (https://github.com/advisories/GHSA-53q9-r3pm-6pq6), and only when they
hold plain tensors that are really in the file.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autolora.errors import LoRAFormatError, PoolError, shown
from autolora.files import is_own_file, is_plain_name
from autolora.lora.check import MAX_OPENED, PoolTwins, Twin, same_bytes
from autolora.lora.covers import picture_suffix, read_embedded_covers
from autolora.lora.lora import LoRA
from autolora.lora.metadata import (
    CAPTIONS_SUFFIX,
    CARD_SUFFIX,
    SIDECAR_SUFFIXES,
    Metadata,
    is_alone,
)
from autolora.lora.pool import SUFFIX, PoolEntry, scan
from autolora.safetensors_io import PICKLE_STARTS, file_sha256, open_file, read_header

WRAPPERS = ("state_dict", "lora", "lora_state_dict", "model", "weights", "module")
"""Keys under which training programs put the tensors."""

_DTYPES = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16}
    | {torch.float8_e4m3fn, torch.float8_e5m2, torch.bool, torch.uint8}
    | {torch.int64, torch.int32, torch.int16, torch.int8}
)


def is_pickle(path: Path) -> bool:
    """Tell whether a file begins as ``torch.save`` writes them.

    Args:
        path: The file.

    Returns:
        True for archives and plain pickles.

    Raises:
        LoRAFormatError: The file cannot be opened.
    """
    with open_file(path) as file:
        start = file.read(16)
    # A safetensors header of 512 or 1,024 bytes looks like the start of a pickle, but for this.
    return start.startswith(PICKLE_STARTS) and start[8:9] != b"{"


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a pickle.

    Args:
        path: A file that `is_pickle`.

    Returns:
        Contiguous CPU tensors by key; numbers become tensors.

    Raises:
        LoRAFormatError: It holds anything but named tensors, or claims more than is in it.
    """
    with open_file(path) as file:
        size = file.seek(0, 2)
    if zipfile.is_zipfile(path):
        _check_archive(path, size)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # The unpickler refuses with many kinds of error, and damaged files give yet others.
        raise _refused(
            path,
            "holds more than plain tensors, or is damaged; ask its author for a safetensors file",
        ) from error
    entries = _entries(path, loaded)
    tensors = {key: _tensor(path, key, value) for key, value in entries.items()}
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > size:
        raise _refused(path, "claims tensors larger than the file; do not use it")
    return {key: tensor.contiguous().clone() for key, tensor in tensors.items()}


def convert_pickle(path: Path, target: Path) -> None:
    """Write the tensors of a pickle as a safetensors file.

    Args:
        path: The pickle.
        target: The file to write; replaced if there is one.

    Raises:
        LoRAFormatError: The pickle cannot be used.
        OSError: The file cannot be written.
    """
    from safetensors.torch import save_file

    name = path.name.encode("utf-8", "backslashreplace").decode()
    save_file(read_pickle(path), target, metadata={"converted_from": name})


def _check_archive(path: Path, size: int) -> None:
    """Refuse archives that grow when read: ``torch.save`` neither packs nor shares members."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise _refused(path, "is damaged; download it again") from error
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise _refused(path, "is packed, as no training program writes it; do not use it")
    if sum(member.file_size for member in members) > size:
        raise _refused(path, "claims more data than it holds; do not use it")


def _entries(path: Path, loaded: object) -> Mapping[str, Any]:
    """Find the table of tensors, which may be wrapped in others."""
    for _ in range(3):
        if not isinstance(loaded, dict):
            break
        inner = [loaded[key] for key in WRAPPERS if isinstance(loaded.get(key), dict)]
        if not inner:
            break
        loaded = inner[0]
    if not isinstance(loaded, dict) or not loaded:
        raise _refused(path, "holds no table of named tensors; it is no LoRA")
    for key in loaded:
        if not isinstance(key, str) or key == "__metadata__":
            raise _refused(path, f"names a tensor {shown(key, 60)!r}; it is no LoRA")
    return loaded


def _tensor(path: Path, key: str, value: object) -> Tensor:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**63:
        return torch.tensor(value)
    plain = type(value) in (Tensor, torch.nn.Parameter)
    if not plain or value.layout != torch.strided or value.dtype not in _DTYPES:  # type: ignore
        raise _refused(
            path, f"holds something else than a plain tensor at {shown(key)!r}; convert it yourself"
        )
    assert isinstance(value, Tensor)
    if value.device.type != "cpu":
        raise _refused(path, f"keeps no data of {shown(key)!r}; ask its author for the weights")
    return value.detach()


def _refused(path: Path, problem: str) -> LoRAFormatError:
    return LoRAFormatError(f"{shown(path)} is a pickle that {problem}.")


CONFIG_SUFFIX = ".adapter_config.json"
_CHUNK = 1 << 20
_STAGING = ".adding-"
_LEFTOVER_SECONDS = 24 * 3600.0
_NOT_IN_NAMES = frozenset('/\\:<>"|?*')


@dataclass(frozen=True)
class Added:
    """A LoRA that was added to a pool.

    Attributes:
        path: Its file in the pool.
        source: The file it was made from.
        sha256: Hash of the file in the pool.
        beside: What was put beside it: sidecars and pictures.
        notes: What the user should know, one sentence each.
    """

    path: Path
    source: Path
    sha256: str
    beside: tuple[Path, ...]
    notes: tuple[str, ...]


def add_files(
    folder: Path,
    files: Sequence[Path],
    name: str | None = None,
    force: bool = False,
    allow_pickle: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Added]:
    """Add LoRA files to a pool, with their sidecars and pictures; all of them or none.

    Args:
        folder: The pool's folder; made where it does not exist.
        files: The files.
        name: Name in the pool in place of the file's stem; for one file only.
        force: Add a file that changes the same as one that the pool has under another name.
        allow_pickle: Read pickles, by ``torch.load(weights_only=True)``, and convert them.
        progress: Called with the number of the pool's files looked at for duplicates and of all.

    Returns:
        What was added, in order.

    Raises:
        LoRAFormatError: A file cannot be used.
        PoolError: A name is taken or cannot be one, the pool has the same LoRA in this or another
            format, or writing failed.
    """
    if name is not None and len(files) != 1:
        raise PoolError(f"A name is for one file, not for {len(files)}; add them one by one.")
    made = not folder.exists()
    if not made and not folder.is_dir():
        raise PoolError(f"LoRA pool {shown(folder)} is not a folder; name another.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        twins = PoolTwins(scan(folder)[0], progress)
        with _staging(folder) as staging:
            staged: list[_Staged] = []
            for number, file in enumerate(files):
                open_file(file).close()
                inner = staging / str(number)
                inner.mkdir()
                stem = file.stem if name is None else name
                _check_name(folder, file, stem, twins.entries)
                one, lora = _stage(inner, file, stem, allow_pickle)
                one.compare(lora, twins, force)
                twins.entries.append(one.entry)
                staged.append(one)
            return _place_all(folder, staged)
    except OSError as error:
        raise PoolError(
            f"Nothing was added to LoRA pool {shown(folder)}: {shown(error.filename or folder)} "
            f"cannot be read or written ({shown(error.strerror)})."
        ) from error
    finally:
        if made:
            # Only an empty folder can be removed, so this undoes a failure and nothing else.
            with contextlib.suppress(OSError):
                folder.rmdir()


class _Staged:
    """A LoRA with its files under their final names, in a hidden folder."""

    def __init__(self, source: Path, weights: Path, sha256: str) -> None:
        self.source = source
        self.weights = weights
        self.sha256 = sha256
        self.notes: list[str] = []
        found = weights.stat()
        self.entry = PoolEntry(weights.stem, weights, found.st_size, found.st_mtime_ns)

    @property
    def files(self) -> list[Path]:
        """What is to be placed, the weights last."""
        beside = sorted(file for file in self.weights.parent.iterdir() if file != self.weights)
        return [*beside, self.weights]

    def compare(self, lora: LoRA, twins: PoolTwins, force: bool) -> None:
        """Refuse what the pool has already; note what it nearly has.

        Two entries that do the same would both be found for a prompt, and act twice.
        """
        for entry, twin in twins.find(self.weights, lora):
            if twin.is_same and not force:
                raise PoolError(
                    "{} is in the pool already, as {}{}",
                    shown(self.source),
                    repr(shown(entry.name)),
                    _how_it_is_there(self.weights, lora, entry, twin),
                    advice="leave it out, or add it with --force to keep both.",
                )
            self.notes.append(twin.sentence)
        if twins.by_bytes:
            self.notes.append(
                f"The pool has more than {MAX_OPENED} files, so only copies were looked for; "
                "`autolora pool check --deep` compares what the files change."
            )


def _how_it_is_there(weights: Path, lora: LoRA, entry: PoolEntry, twin: Twin) -> str:
    if same_bytes(weights, entry.path):
        return ""
    if twin.format == lora.report.format:
        return ", the same weights in another file"
    return f", the same weights in {twin.format} format (this file has {lora.report.format})"


def _check_name(folder: Path, file: Path, stem: str, entries: Iterable[PoolEntry]) -> None:
    bad = not stem.strip() or stem.startswith(".") or stem != stem.strip()
    if bad or not is_plain_name(stem) or _NOT_IN_NAMES & set(stem) or len(stem.encode()) > 200:
        raise PoolError(
            "{} cannot be a name in a pool",
            repr(shown(stem)),
            where="name",
            advice="give another with --name, of letters, digits, blanks, dots, dashes and "
            "underscores.",
        )
    taken = next((e for e in entries if e.path.stem.casefold() == stem.casefold()), None)
    if taken is not None:
        raise PoolError(
            "{} cannot be added as {}: that name is there already ({})",
            shown(file),
            repr(shown(stem)),
            shown(taken.path.name),
            where="name",
            advice="choose another with --name.",
        )


def _remove_leftovers(folder: Path) -> None:
    """Remove what a program left that was killed while it copied, when it surely is dead."""
    for old in folder.glob(f"{_STAGING}*"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > _LEFTOVER_SECONDS and not old.is_symlink():
                shutil.rmtree(old)


@contextlib.contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    _remove_leftovers(folder)
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=folder))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _stage(inner: Path, file: Path, stem: str, allow_pickle: bool) -> tuple[_Staged, LoRA]:
    """Copy or convert a file, put beside it what belongs there, and load the result."""
    weights = inner / f"{stem}{SUFFIX}"
    if allow_pickle and is_pickle(file):
        convert_pickle(file, weights)
        sha256 = file_sha256(weights)
    else:
        read_header(file)
        sha256 = _copy(file, weights)
        if file_sha256(weights) != sha256:
            raise PoolError(f"{shown(file)} was not copied rightly: the copy differs; try again.")
    _copy_sidecars(file, inner, stem)
    _copy_covers(file, weights)
    return _Staged(file, weights, sha256), _load(file, weights)


def _load(file: Path, weights: Path) -> LoRA:
    """Load the copy of a file; errors name the file itself."""
    try:
        return LoRA.load(weights)
    except LoRAFormatError as error:
        # The user knows the source, not the hidden folder.
        raise LoRAFormatError(str(error).replace(shown(weights), shown(file))) from error


def _copy(file: Path, target: Path) -> str:
    """Copy a file; return the hash of what was read."""
    digest = hashlib.sha256()
    with open_file(file) as source, target.open("wb") as copy:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            copy.write(chunk)
        copy.flush()
        os.fsync(copy.fileno())
    return digest.hexdigest()


def _copy_sidecars(file: Path, inner: Path, stem: str) -> None:
    for suffix in (*SIDECAR_SUFFIXES, CONFIG_SUFFIX):
        own = file.with_name(file.stem + suffix)
        sidecar = own if is_own_file(own) else _shared_sidecar(file, suffix)
        if sidecar is None:
            continue
        target = inner / (stem + suffix)
        if suffix == CAPTIONS_SUFFIX and stem != file.stem:
            _copy_captions(sidecar, target, file.stem, stem)
        else:
            shutil.copyfile(sidecar, target)


def _shared_sidecar(file: Path, suffix: str) -> Path | None:
    """A sidecar that is named after its folder's only LoRA without saying so."""
    if suffix == CARD_SUFFIX and is_alone(file):
        sidecar = file.with_name("README.md")
    elif suffix == CONFIG_SUFFIX and file.stem.startswith("adapter_model"):
        sidecar = file.with_name("adapter_config.json")
    else:
        return None
    return sidecar if is_own_file(sidecar) else None


def _copy_captions(sidecar: Path, target: Path, old: str, new: str) -> None:
    """Captions are listed by the name of their picture, which changes with the LoRA's."""
    try:
        captions = json.loads(sidecar.read_text(encoding="utf-8-sig"))
        renamed = {_renamed(name, old, new): texts for name, texts in captions.items()}
    except (ValueError, AttributeError, RecursionError):
        return
    target.write_text(json.dumps(renamed, indent=1, ensure_ascii=False), encoding="utf-8")


def _renamed(name: str, old: str, new: str) -> str:
    return new + name[len(old) :] if name.startswith(f"{old}.") else name


def _copy_covers(file: Path, weights: Path) -> None:
    covers = Metadata.read(file).covers
    for number, cover in enumerate(covers):
        own = cover.parent == file.parent and cover.name.startswith(f"{file.stem}.")
        name = _renamed(cover.name, file.stem, weights.stem)
        if not own:
            name = f"{weights.stem}.cover-{number}{cover.suffix.lower()}"
        shutil.copyfile(cover, weights.with_name(name))
    if not covers:
        for number, picture in enumerate(read_embedded_covers(weights)):
            name = f"{weights.stem}.cover-{number}{picture_suffix(picture)}"
            weights.with_name(name).write_bytes(picture)


def _place_all(folder: Path, staged: Iterable[_Staged]) -> list[Added]:
    """Move everything into the pool, and take it out again when one file cannot be placed."""
    placed: list[Path] = []
    added: list[Added] = []
    try:
        for one in staged:
            first = len(placed)
            for file in one.files:
                _place(file, folder / file.name)
                placed.append(folder / file.name)
            *beside, weights = placed[first:]
            added.append(Added(weights, one.source, one.sha256, tuple(beside), tuple(one.notes)))
    except BaseException:
        for path in placed:
            path.unlink(missing_ok=True)
        raise
    return added


def _place(file: Path, target: Path) -> None:
    """Give a file its place; never over another one, which a plain rename would replace."""
    try:
        os.link(file, target)
    except FileExistsError as error:
        raise PoolError(
            f"{shown(target)} is there already, perhaps left over; remove it, or choose another "
            "name with --name."
        ) from error
    except OSError:
        # Some file systems have no hard links.
        if target.exists():
            raise PoolError(f"{shown(target)} is there already; remove it.") from None
        os.rename(file, target)
