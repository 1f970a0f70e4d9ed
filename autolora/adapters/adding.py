"""Adding LoRA files to a pool: checked, copied whole with what belongs to them, or not at all.

Everything is made in a hidden folder of the pool first, so that a file appears in the pool only
when it is complete, has the bytes of its source and can be loaded.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from autolora.adapters.covers import picture_suffix, read_embedded_covers
from autolora.adapters.duplicates import MAX_OPENED, PoolTwins, Twin, same_bytes
from autolora.adapters.lora import LoRA
from autolora.adapters.metadata import Metadata, is_alone
from autolora.adapters.paths import is_own_file, is_plain_name
from autolora.adapters.pickles import convert_pickle, is_pickle
from autolora.adapters.reader import file_sha256, open_file, read_header
from autolora.adapters.scan import SUFFIX, PoolEntry, scan
from autolora.adapters.sidecars import CAPTIONS_SUFFIX, CARD_SUFFIX, SIDECAR_SUFFIXES
from autolora.errors import LoRAFormatError, PoolError, shown

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
                    f"{shown(self.source)} is in the pool already, as {shown(entry.name)!r}"
                    f"{_how_it_is_there(self.weights, lora, entry, twin)}; leave it out, or add it "
                    "with --force to keep both."
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
            f"{shown(stem)!r} cannot be a name in a pool; give another with --name, of letters, "
            "digits, blanks, dots, dashes and underscores."
        )
    taken = next((e for e in entries if e.path.stem.casefold() == stem.casefold()), None)
    if taken is not None:
        raise PoolError(
            f"{shown(file)} cannot be added as {shown(stem)!r}: that name is there already "
            f"({shown(taken.path.name)}); choose another with --name."
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
