"""`resmol bench`: speed and memory compared with other libraries and with the roofline of the machine."""
