"""`resmol verify`: is this the architecture that its config.json describes? Sanity first, then parity.

docs/verification.md says what is compared, and where the tolerances come from.
"""

from resmol.verify.suite import verify, verify_model
from resmol.verify.third_party.check import verify_third_party

__all__ = ["verify", "verify_model", "verify_third_party"]
