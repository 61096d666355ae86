"""Tests of ``kvbelt.http``."""  # noqa: A005 - named after the room
