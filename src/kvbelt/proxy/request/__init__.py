"""One request's way: ``plan.py`` decides, ``handler.py`` performs, ``upstream.py`` calls the workers."""
