"""Let timm import torchvision where only torchvision's compiled operators are missing.

timm imports torchvision. The torchvision wheel on PyPI is built for CUDA; beside a CPU build of torch its
compiled library does not load, and the import ends with `operator torchvision::nms does not exist`
(pytorch/vision#9077, #9085). The Python parts, all that timm needs, work once the two schemas that are asked
for exist. We declare them upon that very error and never otherwise.
"""

import importlib
import sys

import torch

from explora.errors import WeightsError

_declared: list[torch.library.Library] = []  # torch forgets a schema when its library object is collected


def import_torchvision() -> None:
    """Import torchvision, declaring `nms` and `qnms` if its compiled operators cannot load.

    Raises:
        WeightsError: torch and torchvision do not belong together.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise WeightsError(
                f"torch {torch.__version__} and the installed torchvision do not fit together ({error}); "
                "install the pair pinned in constraints.txt"
            ) from error
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        importlib.import_module("torchvision")
