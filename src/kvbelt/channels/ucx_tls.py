"""Whether ``UCX_TLS``, with which a user limits UCX's transports, fits the memory that KV travels from and to."""


def ucx_tls_problem(ucx_tls: str | None, device: str) -> str | None:
    """What is wrong with a value of ``UCX_TLS`` for memory of this device; None: nothing, or UCX may choose."""
    if not ucx_tls:
        return None
    named = {word.strip() for word in ucx_tls.lstrip("^").split(",")}
    excludes = ucx_tls.startswith("^")
    if device.startswith("cuda"):
        lacks = named & {"cuda_ipc", "cuda"} if excludes else not named & {"all", "cuda", "cuda_ipc"}
        if lacks:
            return "cuda_ipc is not in it: GPUs of one host exchange KV through the CPU at 0.3 GB/s instead of 359"
    nearby = {"all", "sm", "shm", "cma", "xpmem", "knem"}
    if device.startswith("cpu") and not excludes and not named & nearby:
        return (
            "nothing in it reaches another process's memory within a host: workers of one host go through the network"
        )
    return None
