"""The exceptions of the labs. At the command line each becomes one line with the remedy in it."""

from __future__ import annotations

from xen9p.errors import Xen9pError


class LabError(Xen9pError):
    """Something that a student or an instructor can act on."""


class SpecError(LabError):
    """A lab's folder is not as it should be; *message* has a line for each problem."""

    exit_code = 78


class BusyError(LabError):
    """Somebody else works on this student's lab at the moment."""

    exit_code = 75


class CouldNotLookError(LabError):
    """The system or a file of the student could not be looked at, so nothing can be said about the work in it."""

    exit_code = 69  # EX_UNAVAILABLE of sysexits.h


class UnreachableError(CouldNotLookError):
    """A machine does not answer."""


class TooSlowError(CouldNotLookError):
    """A command did not end within its time."""


class TamperedError(LabError):
    """A file that was signed is not what was signed."""
