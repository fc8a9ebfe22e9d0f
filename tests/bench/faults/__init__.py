"""A generator of faults, and a scorer for whatever diagnoses them.

`operators.py` says what can be broken, `cases.py` makes a case of it with its truth, `score.py` judges a diagnoser's JSON, and
`run.py` is the command. A diagnosis is tuned on the tuning seeds and reported on the reporting seeds, which nobody looks at before.
"""
