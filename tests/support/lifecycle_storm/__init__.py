"""A storm over the manager: random operations, checked after each against a small model of it.

`driver` has the operations, `loader` what its loads may meet, `oracle` what must hold, `watchdog`
sees an event loop that is blocked.
"""
