"""Tests of ``kvbelt.proxy``."""
