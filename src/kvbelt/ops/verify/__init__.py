"""``kvbelt verify``: whether a deployment answers as its reference does, field by field.

``cases`` is the table of what is asked, ``ask`` asks, ``answers`` reads, ``compare`` judges, ``report`` tells.
"""
