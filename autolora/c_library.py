"""Small C libraries, compiled once by the machine that runs them and kept in the user's cache.

The cache folder and its files are trusted only as far as nobody else can write there. A file's name
ends in a digest of its content, so that a damaged one is noticed before it is loaded, and compiled
again.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

OPTIMIZE = ("-O3", "-fno-math-errno", "-shared", "-fPIC")
# The first set that compiles is taken; clang on some systems has no OpenMP, gcc on some no native.
FLAGS = (
    ("-march=native", "-fopenmp", "-fschedule-insns"),
    ("-march=native", "-fopenmp"),
    ("-march=native",),
    ("-mcpu=native",),
    (),
)
_TIMEOUT = 60  # seconds for one compilation
_OTHERS = stat.S_IWGRP | stat.S_IWOTH

_log = logging.getLogger(__name__)


class CLibrary:
    """One C source as a loaded library, made when it is first asked for.

    ``AUTOLORA_NATIVE=0`` in the environment turns all of them off, ``CC`` names the compiler.

    Args:
        source: The C file; it includes nothing but the system's headers.
        bind: Declares the types of the functions.
        agrees: Whether the library computes what it should; called in a thread of its own, which
            no autocast, inference mode or default device of the caller's reaches.
    """

    flags: Sequence[Sequence[str]] = FLAGS

    def __init__(
        self,
        source: Path,
        bind: Callable[[ctypes.CDLL], None],
        agrees: Callable[[ctypes.CDLL], bool],
    ) -> None:
        self.source = source
        self._bind, self._agrees = bind, agrees
        self._lock = threading.Lock()
        self._tried = False
        self._loaded: ctypes.CDLL | None = None

    def get(self) -> ctypes.CDLL | None:
        """Return the library, or None where there is no compiler or it computes something else."""
        if not self._tried:
            with self._lock:
                if not self._tried:
                    self._loaded = self._load()
                    self._tried = True
        return self._loaded

    def forget(self) -> None:
        """Look again at the next call, as a new process would."""
        self._tried, self._loaded = False, None

    def _load(self) -> ctypes.CDLL | None:
        if os.environ.get("AUTOLORA_NATIVE", "1") == "0":
            return None
        try:
            path = compiled(self.source, self.flags)
            if path is None:
                return None
            library = ctypes.CDLL(str(path))
            self._bind(library)
            with ThreadPoolExecutor(1) as thread:
                agrees = thread.submit(self._agrees, library).result()
        except (OSError, AttributeError, subprocess.SubprocessError) as error:
            _log.info("no compiled %s: %s", self.source.name, error)
            return None
        if not agrees:
            _log.warning("the compiled kernel %s gives wrong results and is not used", path)
        return library if agrees else None


def compiled(source: Path, flags: Sequence[Sequence[str]] = FLAGS) -> Path | None:
    """Return the library made of a C file, compiled now where the cache has no sound one.

    Args:
        source: The C file.
        flags: Sets of compiler flags; the first that compiles is taken.

    Returns:
        The shared library, or None without a compiler that can make it.

    Raises:
        OSError: There is no place to write it.
        subprocess.SubprocessError: The compiler does not come to an end.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if not compiler or shutil.which(compiler) is None:
        _log.info("no compiled %s: no C compiler found", source.name)
        return None
    code = source.read_text(encoding="utf-8")
    identity = repr((code, compiler, OPTIMIZE, tuple(map(tuple, flags)), _processor()))
    stem = f"{source.stem}-{_digest(identity.encode())}"
    folder = _cache_folder()
    for path in sorted(folder.glob(f"{stem}-*.so")):
        if _sound(path):
            return path
        _log.warning("%s is damaged, or others can write it; it is compiled again", path)
        path.unlink(missing_ok=True)
    for chosen in flags:
        made = _compile(compiler, chosen, source, folder, stem)
        if made is not None:
            return made
    _log.info("no compiled %s: %s can't compile it", source.name, compiler)
    return None


def _compile(
    compiler: str, flags: Sequence[str], source: Path, folder: Path, stem: str
) -> Path | None:
    handle, name = tempfile.mkstemp(dir=folder, prefix=f".{stem}.", suffix=".so")
    os.close(handle)
    temporary = Path(name)
    command = [compiler, *OPTIMIZE, *flags, str(source), "-o", name, "-lm"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT, check=False)
        if done.returncode != 0:
            return None
        temporary.chmod(0o700)
        path = folder / f"{stem}-{_digest(temporary.read_bytes())}.so"
        os.replace(temporary, path)
        return path
    finally:
        temporary.unlink(missing_ok=True)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _cache_folder() -> Path:
    """Return the user's cache folder, or one for this process where others could write to it."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "autolora"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if _private(folder, stat.S_ISDIR) and os.access(folder, os.W_OK):
        return folder
    _log.warning("others can write to %s, or it can't be used: kernels are compiled anew", folder)
    return _process_folder()


def _process_folder() -> Path:
    global _own_folder
    if _own_folder is None:
        _own_folder = Path(tempfile.mkdtemp(prefix="autolora-"))
        atexit.register(shutil.rmtree, _own_folder, ignore_errors=True)
    return _own_folder


_own_folder: Path | None = None


def _private(path: Path, kind: Callable[[int], bool]) -> bool:
    """Whether a file or folder is there, is no link, and can be written by its owner, us, alone."""
    try:
        found = path.lstat()
    except OSError:
        return False
    if not kind(found.st_mode):
        return False
    return os.name != "posix" or (found.st_uid == os.geteuid() and not found.st_mode & _OTHERS)


def _sound(path: Path) -> bool:
    try:
        return _private(path, stat.S_ISREG) and path.stem.endswith(_digest(path.read_bytes()))
    except OSError:
        return False


def _processor() -> str:
    """Return what ``-march=native`` depends on, for homes that several machines share."""
    flags = ""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags}"
