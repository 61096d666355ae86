"""What is measured: the catalogue of every metric (``catalogue.py``), and how a scrape is made of it."""

from kvbelt.metrics.catalogue import CATALOGUE, GROUPS, spec_of
from kvbelt.metrics.families import counter, gauge, histogram, process_families, render, summary
from kvbelt.metrics.histogram import BYTES, LONG_SECONDS, SECONDS, Histogram
from kvbelt.metrics.spec import By, Group, Kind, Spec

__all__ = [
    "BYTES",
    "CATALOGUE",
    "GROUPS",
    "LONG_SECONDS",
    "SECONDS",
    "By",
    "Group",
    "Histogram",
    "Kind",
    "Spec",
    "counter",
    "gauge",
    "histogram",
    "process_families",
    "render",
    "spec_of",
    "summary",
]
