"""Attack the package by the hundred, and count what it survives. `make attack` runs this; the tests do not.

Each module of `MODULES` has a function `attacks(folder, count, seed)` that yields (kind of attack, `report.Outcome`).
"""

MODULES = ("runs", "inputs", "disks", "interrupts")
