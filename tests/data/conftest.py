"""Property tests of this room run on shared machines: no deadline, and fewer examples than Hypothesis would take."""

from hypothesis import settings

settings.register_profile("data", deadline=None, max_examples=40)
settings.load_profile("data")
