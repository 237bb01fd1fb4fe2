"""Clients of one daemon that run, stall, roll back, fork, vanish and come back, for a while.

`families` are the models, `daemon_child` the daemon, `client` what one of the clients does with its
`flow`s of tokens, `greedy` what the unsplit model says to them, and `storm` all of it.
"""
