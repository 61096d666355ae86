"""``kvbelt doctor``: finds what is wrong with a deployment, causes first, and names the line to change.

- ``evidence``: frozen observations of a running deployment, collected by ``gather``.
- ``preflight``: observations before a start.
- ``checks``: pure functions from evidence to findings; the tables ``CHECKS`` are in the order of causes.
- ``report``: findings as text and as JSON.
"""
