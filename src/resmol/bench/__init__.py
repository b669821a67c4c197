"""`resmol bench`: speed and memory against what one would use instead, and against what the machine allows."""
