"""What the end of a process means for those who ask."""

from collections.abc import Sequence

_ALONE = {
    "decode": "until it is back prefill workers answer alone where placement lets them, else requests get 503",
    "both": "requests get 503 until it is back",
    "prefill": "decode workers compute prompts themselves until it is back, and answers beside a long prompt slow down",
}


def meaning(name: str, role: str, left: Sequence[str]) -> str:
    """One sentence.

    Args:
        name: of the process that is gone.
        role: its role.
        left: names of the running processes of this role.
    """
    if role == "proxy":
        return "without the proxy no client can connect"
    worker = "worker" if role == "both" else f"{role} worker"
    if not left:
        return f"{name} was the only {worker}: {_ALONE[role]}"
    return f"{len(left)} {worker}{' serves' if len(left) == 1 else 's serve'} on: {', '.join(left)}"
