"""``kvbelt doctor``: what is wrong with a deployment, its cause first, and the line to change.

- ``evidence``: what was seen of a running deployment, as frozen values; ``gather`` sees it. ``before`` has and sees
  what there is before a start.
- ``checks``: each a pure function from evidence to findings; ``CHECKS`` is the table, in the order of causes.
- ``report``: findings for people, and as JSON.
"""
