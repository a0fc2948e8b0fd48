"""What was measured fastest on this machine, and files of it: the shipped ones lie beside this module.

    bigkern.wisdom.load(path)       take a file's measurements as yours, for this process
    bigkern.wisdom.export(path)     write yours to a file
    bigkern.wisdom.forget(ops)      drop yours, of some ops or of all

``bigkern tune`` and ``with bigkern.tune()`` measure.
"""

from bigkern.core.wisdom import export, forget, load

__all__ = ["export", "forget", "load"]
