"""Models by name: those of the package, those on the Hugging Face Hub, and publishing one there.

`scenes`, without a slash, is the model of that name in the package; ./scenes is a folder.
hf://OWNER/NAME@COMMIT/FOLDER is a folder of it, such as that of a stage. The revision must be a commit, so
that an address never changes its meaning. Only safetensors, JSON and text are fetched, into huggingface_hub's
cache.
"""

import os
import re
import socket
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from dalle2_jax.runtime import extras, files, modeldir

SCHEME = "hf://"
PACKAGED = Path(__file__).parents[1] / "bundled"  # a model directory a name
PATTERNS = ("*.json", "*.safetensors", "*.txt", modeldir.CARD_FILE)
TIMEOUT = 5.0  # seconds
IGNORED = ("*.fp16.*", "*.non_ema.*")  # copies of the same weights


def _library():
    extras.check("the hub", "huggingface_hub")
    import huggingface_hub

    return huggingface_hub


def unreachable() -> str:
    """Why the hub's server does not answer within TIMEOUT seconds; '' if it does.

    The libraries would retry for minutes. HF_ENDPOINT names another server. A proxy is not tried.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return "HF_HUB_OFFLINE is set"
    server = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    if urllib.request.getproxies().get(server.scheme):
        return ""
    try:
        port = server.port or (80 if server.scheme == "http" else 443)
        socket.create_connection((server.hostname or "", port), TIMEOUT).close()
        return ""
    except OSError as error:
        return f"{server.hostname} does not answer: {error.strerror or error}"


def what_to_download(name: str, reason: str, revision: str = "") -> str:
    """The message for a repository that is not on this machine and cannot be fetched."""
    at = f" --revision {revision}" if revision else ""
    return (
        f"{name} is not on this machine, and {reason}. Where there is a network, run `hf download {name}{at} "
        "--local-dir FOLDER`; copy FOLDER here, and give its path instead"
    )


def packaged(name: str) -> Path | None:
    """The model directory `name` of the package; None if it has none of that name."""
    folder = PACKAGED / name
    return folder if name == folder.name and (folder / modeldir.INDEX_FILE).is_file() else None


def local(path: str | os.PathLike) -> str | os.PathLike:
    """The local folder of a model's name in the package, or of hf://OWNER/NAME@COMMIT, fetched if it is
    missing; other paths by `files.expand`.

    Raises ValueError for an address without a full commit hash, and for errors of the hub.
    """
    if not os.fspath(path).startswith(SCHEME):
        return packaged(os.fspath(path)) or files.expand(path)
    match = re.fullmatch(rf"{SCHEME}([\w.-]+/[\w.-]+)(?:@([^/]*))?((?:/\w[\w.-]*)*)/?", os.fspath(path))
    if not match:
        raise ValueError(f"{path} is no address of a model: write {SCHEME}OWNER/NAME@COMMIT")
    name, revision, folder = match.groups()
    if not re.fullmatch("[0-9a-f]{40}", revision or ""):
        raise ValueError(
            f"{path} names no commit, and what it means could change: write {SCHEME}{name}@COMMIT with the "
            "40 digits that the model's page shows under 'Files and versions', 'History'"
        )
    library = _library()
    options: dict[str, Any] = dict(allow_patterns=list(PATTERNS), ignore_patterns=list(IGNORED))
    if offline := unreachable():
        options |= dict(local_files_only=True)
    try:
        return Path(library.snapshot_download(name, revision=revision, **options)) / folder.strip("/")
    except (library.errors.HfHubHTTPError, OSError, ValueError) as error:
        if offline:
            raise ValueError(what_to_download(name, offline, revision)) from error
        if not isinstance(error, library.errors.HfHubHTTPError):
            raise
        raise ValueError(f"{path} cannot be fetched: {str(error).strip().splitlines()[0]}") from error


def push(model: str | os.PathLike, name: str, private: bool = False) -> str:
    """Publishes a model directory as OWNER/NAME. Returns its address with the new commit.

    Raises FileNotFoundError or ValueError for an incomplete model directory, one without a card or a licence,
    and for errors of the hub.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"{name!r} is no name on the hub: give OWNER/NAME")
    index = modeldir.read_index(model)
    if not (Path(model) / modeldir.CARD_FILE).is_file() or not index.get("licence"):
        raise ValueError(
            f"{model} has no card that names a licence, so nobody may use it: write it again with "
            "`python -m dalle2_jax.convert ... --licence=LICENCE`"
        )
    library = _library()
    if offline := unreachable():
        raise ValueError(f"{name} cannot be published: {offline}")
    api, message = library.HfApi(), f"{index.get('name', 'Model')}, by dalle2_jax"
    try:
        api.create_repo(name, private=private, exist_ok=True)
        made = api.upload_folder(
            repo_id=name, folder_path=os.fspath(model), allow_patterns=list(PATTERNS), commit_message=message
        )
    except library.errors.HfHubHTTPError as error:
        raise ValueError(f"{name} cannot be published: {str(error).strip().splitlines()[0]}") from error
    return f"{SCHEME}{name}@{made.oid}"
