"""Downloads one file of the catalogue at a time, in the background, and only when asked to.

The hub's own ``http_get`` writes into a file object of ours, which counts, resumes and can be told to stop.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any

from .catalogue import ENCODER, ENTRIES, Entry, find
from .errors import IPAdapterError

PARTIAL = ".part"
UNEXPECTED = ".unexpected"
"""Neither suffix is one that the library lists."""
ATTEMPTS = 5
"""How often in a row a download may break off without a new byte."""
BLOCK = 1 << 20

Folders = Callable[[], Sequence[Path]]


@dataclass(frozen=True)
class State:
    """The running or the last download."""

    name: str = ""
    status: str = "idle"
    """``idle``, ``running``, ``done``, ``unexpected`` (wrong checksum), ``cancelled`` or ``failed``."""
    done: int = 0
    total: int | None = None
    message: str = ""


class _Cancelled(Exception):
    pass


class _Sink(FileIO):
    """The partial file; every block written is counted, and the place where a download can end."""

    def __init__(self, path: Path, progress: Callable[[int], None]) -> None:
        super().__init__(path, "ab")
        self._progress = progress

    def write(self, block: Any) -> int:
        """Writes all of a block, which a raw file need not."""
        rest = memoryview(block)
        while rest:
            rest = rest[super().write(rest) :]
        self._progress(self.tell())
        return len(block)


class Downloader:
    """The downloads of one WebUI.

    Args:
        adapter_folders, encoder_folders: the first of each takes the files.
        allowed: whether people at this WebUI may add files to it.
    """

    def __init__(self, adapter_folders: Folders, encoder_folders: Folders, allowed: Callable[[], bool]) -> None:
        self._folders = (adapter_folders, encoder_folders)
        self._allowed = allowed
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._state = State()

    def state(self) -> dict[str, Any]:
        """The running or the last download, ready for JSON."""
        return asdict(self._state)

    def catalogue(self) -> list[dict[str, Any]]:
        """All entries, ready for JSON, and whether each is ``present`` already."""
        return [
            {**asdict(entry), "licence": entry.licence, "present": self._present(entry) is not None}
            for entry in ENTRIES
        ]

    def start(self, name: object) -> dict[str, Any]:
        """Starts a download, or joins the running one of the same entry.

        Raises:
            IPAdapterError: with status 403 where downloads are not allowed; else for a name that the catalogue
                doesn't have, for a file that is there already, and while another download runs.
        """
        if not self._allowed():
            error = IPAdapterError(
                "Downloads are refused because extension access is disabled on this WebUI: start it without --listen, "
                "--server-name or --share, or with --enable-insecure-extension-access, or put the file into its folder "
                "yourself."
            )
            error.status_code = 403
            raise error
        entry = find(name)
        with self._lock:
            if self._thread is not None and self._thread.is_alive() and self._state.status == "running":
                if self._state.name == entry.name:
                    return self.state()
                raise IPAdapterError(
                    f"{self._state.name} is being downloaded, and {entry.name} can't be at the same time: wait for "
                    "it or cancel it."
                )
            present = self._present(entry)
            if present is not None:
                raise IPAdapterError(
                    f"{present.as_posix()} is there already and is never overwritten: move it away to download "
                    f"{entry.name} anew."
                )
            self._stop = threading.Event()
            self._state = State(entry.name, "running", 0, entry.size, f"Downloading {entry.name}.")
            self._thread = threading.Thread(target=self._work, args=(entry,), name="ip-adapter-download", daemon=True)
            self._thread.start()
            return self.state()

    def cancel(self) -> dict[str, Any]:
        """Asks the running download to end; what has come stays for the next try."""
        self._stop.set()
        return self.state()

    def wait(self, timeout: float | None = None) -> dict[str, Any]:
        """Waits for the running download's end."""
        if self._thread is not None:
            self._thread.join(timeout)
        return self.state()

    def _of(self, entry: Entry) -> Sequence[Path]:
        return self._folders[entry.kind == ENCODER]()

    def _present(self, entry: Entry) -> Path | None:
        paths = (folder / entry.saved_as for folder in self._of(entry))
        return next((path for path in paths if os.path.lexists(path)), None)

    def _set(self, **changes: Any) -> None:
        self._state = replace(self._state, **changes)

    def _progress(self, done: int) -> None:
        self._set(done=done)
        if self._stop.is_set():
            raise _Cancelled

    def _work(self, entry: Entry) -> None:
        try:
            target = self._of(entry)[0] / entry.saved_as
            target.parent.mkdir(parents=True, exist_ok=True)
            status, message = self._download(entry, target)
        except _Cancelled:
            status = "cancelled"
            message = f"The download of {entry.name} was cancelled: start it again to go on where it ended."
        except IPAdapterError as error:
            status, message = "failed", str(error)
        except Exception as error:
            status, message = "failed", _sentence(entry, error)
        self._set(status=status, message=message)

    def _download(self, entry: Entry, target: Path) -> tuple[str, str]:
        hub = _hub()
        endpoint = os.environ.get("HF_ENDPOINT")
        url = hub.hf_hub_url(entry.repository, entry.file, endpoint=endpoint)
        total = hub.get_hf_file_metadata(url).size
        partial = target.with_name(target.name + PARTIAL)
        done = partial.stat().st_size if partial.exists() else 0
        if total is not None and done > total:  # of another version of the file
            partial.unlink()
            done = 0
        self._set(total=total, done=done)
        _check_space(entry, target.parent, (total or entry.size or 0) - done)
        self._fetch(hub, entry, url, partial, total)
        return self._keep(entry, partial, target)

    def _fetch(self, hub: Any, entry: Entry, url: str, partial: Path, total: int | None) -> None:
        from huggingface_hub.file_download import http_get

        failures = 0
        while True:
            with _Sink(partial, self._progress) as sink:
                before = sink.seek(0, os.SEEK_END)
                self._progress(before)
                try:
                    http_get(
                        url,
                        sink,
                        resume_size=before,
                        headers=hub.utils.build_hf_headers(),
                        expected_size=total,
                    )
                    return
                except Exception as error:
                    if isinstance(error, _Cancelled) or _is_final(error):
                        raise
                    came = sink.tell() > before
                    failures = 0 if came else failures + 1
                    if failures >= ATTEMPTS or (total is not None and sink.tell() > total):
                        raise
            self._stop.wait(min(failures, 3))

    def _keep(self, entry: Entry, partial: Path, target: Path) -> tuple[str, str]:
        if entry.sha256:
            self._set(message=f"Checking {entry.name}.")
            found = self._sha256(partial)
            if found != entry.sha256:
                kept = _free_name(target.with_name(target.name + UNEXPECTED))
                partial.rename(kept)
                return "unexpected", (
                    f"The file of {entry.name} has SHA-256 {found}, and the catalogue says {entry.sha256}: it is kept "
                    f"as {kept.as_posix()} and not listed; rename it to {target.name} only if you trust it."
                )
        if os.path.lexists(target):
            raise IPAdapterError(
                f"{target.as_posix()} has come into being meanwhile and is never overwritten: the download is kept "
                f"as {partial.as_posix()}."
            )
        partial.rename(target)
        checked = "its SHA-256 is the catalogue's" if entry.sha256 else "the catalogue has no SHA-256 to check it by"
        return "done", f"{entry.name} is in {target.as_posix()}; {checked}."

    def _sha256(self, path: Path) -> str:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
                if self._stop.is_set():
                    raise _Cancelled
        return digest.hexdigest()


def _hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.utils
    except ImportError:
        raise IPAdapterError(
            "This WebUI's Python has no package huggingface_hub, which downloads need: install it, or put the file "
            "into its folder yourself."
        ) from None
    return huggingface_hub


def _check_space(entry: Entry, folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise IPAdapterError(
            f"{entry.name} needs {needed} more bytes in {folder.as_posix()}, and {free} are free: make room and "
            "start it again."
        )


def _status(error: Exception) -> int | None:
    status: int | None = getattr(getattr(error, "response", None), "status_code", None)
    return status


def _is_final(error: Exception) -> bool:
    """Whether trying again is useless: the server's refusals, and what the disk says."""
    status = _status(error)
    return (status is not None and status < 500) or _is_disk(error)


def _is_disk(error: Exception) -> bool:
    # Errors of the network are OSErrors too; those of requests have no number.
    return type(error) in (OSError, PermissionError) and getattr(error, "errno", None) is not None


def _sentence(entry: Entry, error: Exception) -> str:
    status = _status(error)
    source = f"{entry.repository}/{entry.file}"
    if status in (401, 403):
        return (
            f"The hub refuses {source} (HTTP {status}): it may be gone, or ask for an account; get it in a browser "
            "and put it into its folder yourself."
        )
    if status is not None:
        return f"The hub answers HTTP {status} for {source}: try again later, or get the file in a browser."
    if _is_disk(error):
        return f"{entry.name} can't be written ({error}): make room or choose another folder, and start it again."
    if type(error).__name__ == "OfflineModeIsEnabled":
        return (
            f"HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set, so {entry.name} can't be downloaded: unset it and start "
            "the WebUI anew."
        )
    return (
        f"{entry.name} can't be downloaded ({type(error).__name__}): check that this machine reaches the hub, and "
        "start it again; it goes on where it ended."
    )


def _free_name(path: Path) -> Path:
    number, free = 1, path
    while os.path.lexists(free):
        number, free = number + 1, path.with_name(f"{path.name}{number}")
    return free
