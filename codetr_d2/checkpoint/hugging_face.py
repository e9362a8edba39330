"""Files on Hugging Face by address: ``hf://OWNER/REPOSITORY/FILE`` wherever detectron2 takes a path."""

from typing import Any

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler

from ..errors import InputError

__all__ = ["HuggingFaceHandler"]


class HuggingFaceHandler(PathHandler):
    """Downloads with huggingface_hub, into its cache, once.

    Private repositories, mirrors and the folder of the cache are as its environment variables say: HF_TOKEN,
    HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE.
    """

    PREFIX = "hf://"

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        owner, _, rest = path.removeprefix(self.PREFIX).partition("/")
        repository, _, file = rest.partition("/")
        if not (owner and repository and file):
            raise InputError(f"{path}: write it like hf://OWNER/REPOSITORY/FILE")
        from huggingface_hub import hf_hub_download  # takes a while

        return hf_hub_download(f"{owner}/{repository}", file, force_download=force)

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        return True  # known only once it has been fetched

    def _exists(self, path: str, **kwargs: Any) -> bool:
        return True

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any):
        if set(mode) & set("wax+"):
            raise InputError(f"{path}: nothing can be written there")
        return open(self._get_local_path(path), mode, buffering, **kwargs)


PathManager.register_handler(HuggingFaceHandler(), allow_override=True)
