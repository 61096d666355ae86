"""Which versions of vLLM this room was written against. Others are refused: a moved hook gives wrong answers."""

from kvbelt.errors import StartError

#: ``major.minor`` of the versions that the tests run against.
SUPPORTED = ("0.26", "0.32")


def require_supported(version: str) -> None:
    """Refuse a vLLM that nobody here has tried.

    Raises:
        StartError: it is another version.
    """
    if ".".join(version.split(".")[:2]) not in SUPPORTED:
        known = " and ".join(f"{supported}.x" for supported in SUPPORTED)
        raise StartError(
            f"vLLM {version} is not supported by this kvbelt; it runs with vLLM {known}: install one of them"
        )
