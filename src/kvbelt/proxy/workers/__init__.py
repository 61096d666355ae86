"""The workers this proxy knows: health, warm-up, discovery."""
