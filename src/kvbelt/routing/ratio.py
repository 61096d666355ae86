"""How many prefill workers a decode worker can keep up with."""

#: With more for each decode worker, answers wait in the decode workers' queues; usual is 1:1 or 1:2.
MOST_PREFILL_PER_DECODE = 2


def lopsided(prefill: int, decode: int) -> str | None:
    """What is wrong with these numbers and what to do; None: nothing."""
    if not decode or prefill <= MOST_PREFILL_PER_DECODE * decode:
        return None
    return (
        f"{prefill} prefill workers feed {decode} decode worker{'' if decode == 1 else 's'}: first tokens arrive soon, "
        f"then answers wait for decoding; usual is 1:1 or 1:2, such as {even(prefill, decode)}"
    )


def even(prefill: int, decode: int) -> str:
    """As many workers at 1:1, with one more decode worker where their number is odd."""
    workers = prefill + decode
    return f"{workers // 2}p{workers - workers // 2}d"
