"""Files and folders that the flags name, checked before a process group or a model exists."""

import os
import tempfile


class PreflightError(ValueError):
    """A file or folder that cannot serve; the message names the flag and the path."""


def check_files(args) -> None:
    """Check what ``args`` names.

    Raises:
        PreflightError: at the first file or folder that cannot serve.
    """
    if args.save is not None:
        _check_writable("--save", args.save)


def _check_writable(flag: str, folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PreflightError(f"{flag} {folder}: cannot write there ({error.strerror})") from error
