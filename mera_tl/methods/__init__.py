"""What is compared: every baseline and every way of steering, one short function each.

A method receives the run and returns a treatment: what to do to the test prompts, and the
certificate it rests on. `search` chooses freely on training data, so that the certificate has one
candidate to test.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
