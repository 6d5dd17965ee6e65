"""Models and tokenizers of transformers, with the adapters of peft."""

import logging

# peft imports bitsandbytes, which warns of a faster kernel on every start, and of a cast in every layer of every step.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
