"""The exceptions a user can meet, all with a message that says value, limit and remedy.

TTTSimError
├── ConfigError      a chip, model or settings file, or a command-line value, is wrong
│   └── UnsupportedError  the chip lacks a property that the workload needs
├── WorkloadError    a trace or a scenario is impossible or malformed
├── CapacityError    something does not fit a memory and cannot be made to
├── ProgramError     a lowered program breaks the engine's contract (a defect of ours)
└── ConservationError  a finished simulation breaks a physical law (a defect of ours)
"""

from __future__ import annotations


class TTTSimError(Exception):
    """Base of every error raised on purpose; the command line prints it and exits with 2."""


class ConfigError(TTTSimError):
    """A configuration file, override or option is wrong."""


class UnsupportedError(ConfigError):
    """The chip lacks a property (a format, a unit, a link, a way to write weights) that the workload needs."""


class WorkloadError(TTTSimError):
    """A trace or scenario is impossible or malformed."""


class CapacityError(TTTSimError):
    """Something does not fit the memory it must live in."""


class ProgramError(TTTSimError):
    """A program handed to an engine breaks the engine contract."""


class ConservationError(TTTSimError):
    """A simulation broke a conservation law or a physical bound."""
