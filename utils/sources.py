"""Where weights come from: a file, an address, or a name on the Hugging Face hub; a download is kept."""

import contextlib
import hashlib
import os
import re
from http.client import HTTPException
from pathlib import Path
from urllib.parse import unquote, urlsplit

import timm
import torch

from .checkpoint import read
from .distributed import main_process_first
from .errors import UsageError, suggest

HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # as timm and transformers call them, the first one first
HASH = re.compile(r"-([0-9a-f]{8,64})\.\w+$")  # what torch.hub's files have in their names: sha256, its beginning


def releases() -> list[str]:
    """The names of the official releases, as timm calls them: convnextv2_atto.fcmae and so on."""
    return timm.list_pretrained("convnextv2_*")


def check_source(flag: str, source: str, here: bool = False) -> None:
    """Raise UsageError, without a look at the network, for what is no file, address, nor name on the hub.

    Such names are hf-hub:OWNER/NAME, timm/NAME.TAG, and those of the releases. here: files alone will do.
    """
    known = [] if here else releases()
    elsewhere = not here and (source in known or re.match("https?://|hf-hub:|timm/", source))
    if not (os.path.isfile(source) or elsewhere):
        wrong = "is a folder; give a file in it" if os.path.isdir(source) else f"no such file{suggest(source, known)}"
        raise UsageError(f"{flag} {source}: {wrong}".lstrip())


def local_file(flag: str, source: str | os.PathLike) -> Path:
    """The file of a source, downloaded where it is not here yet, by one process of each node.

    Raises UsageError: it cannot be had, has another hash than its name says, or is no checkpoint.
    """
    source = os.fspath(source)
    check_source(flag, source)
    if os.path.isfile(source):
        return Path(source)
    with main_process_first():
        try:
            return _from_address(source) if re.match("https?://", source) else _from_hub(source)
        except (UsageError, OSError, RuntimeError, ValueError, HTTPException) as error:
            reason = " ".join(str(error).split())
            reason = reason if isinstance(error, UsageError) else f"cannot be downloaded ({reason})"
            raise UsageError(f"{flag} {source}: {reason}".lstrip()) from error


def _from_address(address: str) -> Path:
    parts = urlsplit(address)
    name = Path(unquote(parts.path)).name[-100:] or "checkpoint"
    # a folder for each address, what follows its ? included: torch.hub's own cache takes one name for one file
    digest = hashlib.sha256(address.encode()).hexdigest()[:16]
    folder = Path(torch.hub.get_dir(), "checkpoints", f"{parts.hostname}-{digest}")
    path, aside = folder / name, folder / f".{os.getpid()}.{name}"
    if path.exists():
        return path
    known = HASH.search(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(address, str(aside), known and known[1], progress=False)
        read(aside)
        os.replace(aside, path)
    except UsageError as error:  # a download that broke off, a page that says sorry
        reason = str(error).removeprefix(f"{aside}: ")
        raise UsageError(f"what the server gives is no checkpoint: {reason}") from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()
    return path


def _from_hub(source: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    repo, _, revision = source.removeprefix("hf-hub:").partition("@")
    repo = repo if "/" in repo else f"timm/{repo}"
    for name in HUB_FILES:
        try:
            return Path(hf_hub_download(repo, name, revision=revision or None, endpoint=os.environ.get("HF_ENDPOINT")))
        except RepositoryNotFoundError as error:
            known = suggest(repo, (f"timm/{release}" for release in releases()))
            raise UsageError(f"the hub has no {repo} that you may read{known}") from error
        except Exception as error:  # the hub's client has exceptions of several libraries
            if not isinstance(error, EntryNotFoundError) or isinstance(error, LocalEntryNotFoundError):  # no answer
                raise UsageError(f"cannot be downloaded ({type(error).__name__}: {error})") from error
    raise UsageError(f"{repo} holds neither {' nor '.join(HUB_FILES)}")
