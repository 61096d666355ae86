"""Kinds of command-line values: what is wrong with one is said with the value in it."""

import argparse


def port(text: str) -> int:
    """A port."""
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port; give a number between 1 and 65535")
    return int(text)


def ports(text: str) -> list[int]:
    """Ports, separated by commas."""
    return [port(item) for item in text.split(",")]


def positive_int(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def positive_number(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def hosts(text: str) -> list[str]:
    """Host names, separated by commas."""
    names = [host.strip() for host in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not a host or a list of hosts")
    return names


def count(text: str) -> int:
    """A whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of workers")
    return int(text)
