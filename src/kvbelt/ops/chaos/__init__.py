"""``kvbelt chaos``: puts load and faults on a deployment and judges what clients got.

The decisions are pure: the schedule of faults (schedule.py), the questions (questions.py), parsing responses
(completion.py), judging them (verdict.py), recovery times (recovery.py), what workers hold at the end (holdings.py),
and the report (report.py). Processes, sockets and the network are in client.py, load.py, inject.py, rubbish_sender.py
and monitor.py; experiment.py and run.py put everything together.
"""
