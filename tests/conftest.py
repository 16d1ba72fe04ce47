from hypothesis import settings

# A deadline measures the machine, not the code; the same examples every time make a failure repeatable.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")
