"""The mutation fuzz of checkpoints: damage one, load it in every way, judge what comes of it.

sound.py                one sound checkpoint for each layout that is read
files.py                how the mutations find and rewrite its files
mutations.py            the table of mutations; each `…_damage.py` fills in its own
cases.py                a damaged checkpoint as a name: layout, mutation, number
judge.py                every way of loading, and what an outcome may be
leftovers.py            what a case leaves behind in the process and on disk
worker.py               the process that tries cases, under limits
campaign.py             starts workers, watches them, collects verdicts
"""
