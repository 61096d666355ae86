"""``kvbelt chaos``: load on a deployment, faults in it, and a verdict on what users were told meanwhile.

Whatever decides is pure: the schedule of a seed (schedule.py), the questions (questions.py), what a client was given
(reading.py), what to think of it (verdict.py), how long a fault was felt (recovery.py), what is held at the end
(holdings.py), the report (report.py). What touches processes, sockets and the network stands in files of its own
(client.py, load.py, inject.py, rubbish_io.py, watch.py) and is put together by run.py.
"""
