"""From prompts to files: the parts of ``python -m train.sample``."""
