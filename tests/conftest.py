"""Property tests say how to replay what they found; no test depends on how fast the machine is."""

from hypothesis import settings

settings.register_profile("tierd", deadline=None, print_blob=True)
settings.load_profile("tierd")


def pytest_report_header() -> str:
    return "hypothesis profile: tierd (a failure prints its blob; --hypothesis-seed=N repeats a whole run)"
