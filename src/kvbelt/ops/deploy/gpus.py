"""GPUs by their short names, and by the label of their nodes."""

from dataclasses import dataclass

from kvbelt.errors import SettingsError, resembling

#: The node label that NVIDIA's GPU feature discovery writes.
PRODUCT_LABEL = "nvidia.com/gpu.product"


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    products: tuple[str, ...]  #: values of ``PRODUCT_LABEL``; empty: any


_KINDS = {
    gpu.name: gpu
    for gpu in (
        Gpu("any", ()),
        Gpu("a100", ("NVIDIA-A100-SXM4-80GB", "NVIDIA-A100-SXM4-40GB", "NVIDIA-A100-80GB-PCIe")),
        Gpu("b200", ("NVIDIA-B200",)),
        Gpu("h100", ("NVIDIA-H100-80GB-HBM3", "NVIDIA-H100-PCIe", "NVIDIA-H100-NVL")),
        Gpu("h200", ("NVIDIA-H200", "NVIDIA-H200-NVL")),
        Gpu("l4", ("NVIDIA-L4",)),
        Gpu("l40s", ("NVIDIA-L40S",)),
    )
}


def gpu_named(name: str) -> Gpu:
    """The GPU that ``--gpu`` names.

    Raises:
        SettingsError: the name is unknown.
    """
    gpu = _KINDS.get(name.lower())
    if gpu is None:
        known = ", ".join(sorted(_KINDS))
        raise SettingsError(
            f"--gpu {name!r} is not known{resembling(name.lower(), list(_KINDS))}; there are {known}. 'any' takes what "
            f"a node has; for others patch nodeSelector with their {PRODUCT_LABEL}"
        )
    return gpu
