"""Settings of trl, which it reads when it is imported."""

import os

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
