"""The transports and devices that UCX can use in this process, as ``ucx_info -d`` lists them for NIXL's own UCX.

The loaded library is asked, in this environment (UCX_TLS counts). Only for short-lived processes: it creates another
context, and an incompatible UCX could crash the process.
"""

import ctypes
import re
from pathlib import Path

#: ``ucp_params`` (ucp/api/ucp.h): only these two fields are set, and the rest is zero.
_FIELD_FEATURES = 1 << 0
_FEATURE_RMA = 1 << 1
_PARAMS_BYTES = 512

_LIBRARY = re.compile(r"/libucp[-\w]*\.so[.\d]*$")
_RESOURCE = re.compile(r"resource\s+\d+.*\s(\w+/\S+)\s*$")


def resources() -> list[str]:
    """Such as ``cma/memory`` and ``tcp/eth0``. Empty: UCX is not loaded, or reports nothing."""
    path = _loaded_library()
    if path is None:
        return []
    ucp, libc = ctypes.CDLL(path), ctypes.CDLL(None)
    libc.tmpfile.restype = ctypes.c_void_p
    for name in ("rewind", "fclose", "fileno"):
        getattr(libc, name).argtypes = [ctypes.c_void_p]
    major, minor, release = ctypes.c_uint(), ctypes.c_uint(), ctypes.c_uint()
    ucp.ucp_get_version(ctypes.byref(major), ctypes.byref(minor), ctypes.byref(release))
    config, context = ctypes.c_void_p(), ctypes.c_void_p()
    if ucp.ucp_config_read(None, None, ctypes.byref(config)) != 0:
        return []
    params = (ctypes.c_uint64 * (_PARAMS_BYTES // 8))(_FIELD_FEATURES, _FEATURE_RMA)
    status = ucp.ucp_init_version(major, minor, ctypes.byref(params), config, ctypes.byref(context))
    ucp.ucp_config_release(config)
    if status != 0:
        return []
    try:
        stream = ctypes.c_void_p(libc.tmpfile())
        if not stream:
            return []
        ucp.ucp_context_print_info(context, stream)
        libc.fflush(None)
        descriptor = libc.fileno(stream)
        text = Path(f"/proc/self/fd/{descriptor}").read_text(encoding="utf-8", errors="replace")
        libc.fclose(stream)
    finally:
        ucp.ucp_cleanup(context)
    return resources_in(text)


def resources_in(text: str) -> list[str]:
    """The resources in what UCX prints about a context."""
    return list(dict.fromkeys(found[1] for line in text.splitlines() if (found := _RESOURCE.search(line))))


def _loaded_library() -> str | None:
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        if _LIBRARY.search(line):
            return line[line.index("/") :]
    return None
