"""Repositories of the Hugging Face Hub: whole in a local folder, or read by the tensor.

The only floor that opens a socket. The Hub's own client does the work, so its environment variables hold: HF_ENDPOINT
(a mirror), HF_TOKEN, HF_HUB_OFFLINE, HF_HOME (where the caches lie). Its progress bars go to stderr.
"""

from octavo.hub.client import REPO_ID
from octavo.hub.models import BaseMoE, Mixtral8x7B, TensorMetadata, find_moe
from octavo.hub.remote import RemoteFile, RemoteFolder
from octavo.hub.snapshots import download_small, snapshot

__all__ = [
    "REPO_ID",
    "BaseMoE",
    "Mixtral8x7B",
    "RemoteFile",
    "RemoteFolder",
    "TensorMetadata",
    "download_small",
    "find_moe",
    "snapshot",
]
