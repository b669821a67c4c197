"""`resmol verify`: is this the architecture that its config.json describes? Sanity first, then parity.

docs/verification.md says what is compared, and where the tolerances come from.
"""

from resmol.verify.suite import verify, verify_model
from resmol.verify.third_party.check import verify_third_party
from resmol.verify.third_party.factory import import_factory
from resmol.verify.third_party.name_file import read_name_map, write_name_map

__all__ = ["import_factory", "read_name_map", "verify", "verify_model", "verify_third_party", "write_name_map"]
