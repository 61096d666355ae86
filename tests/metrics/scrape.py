"""What stands in a scrape."""

from prometheus_client.parser import text_string_to_metric_families

from kvbelt.metrics import CATALOGUE, By, Kind


def names_in(text: str) -> dict[str, Kind]:
    """Each metric as the catalogue names it, and its kind."""
    found = {}
    for family in text_string_to_metric_families(text):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        found[name] = Kind(family.type)
    return found


def expected(by: By) -> set[str]:
    """Names of what such a process exports."""
    return {spec.name for spec in CATALOGUE.values() if by in spec.by}


def value_in(text: str, name: str, **labels: str) -> float:
    """Of one series; of several, their sum."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())
