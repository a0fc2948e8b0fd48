"""The command ``bigkern``: ``env``, ``doctor``, ``bench`` and ``train``."""
