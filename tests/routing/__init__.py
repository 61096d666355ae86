"""Tests of ``kvbelt.routing``."""
