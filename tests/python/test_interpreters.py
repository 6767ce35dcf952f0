"""A subinterpreter is refused by name, and the main one goes on."""

from __future__ import annotations

from scripts import passes

SUB = """
import faulthandler
import warnings

try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters

faulthandler.dump_traceback_later(30, exit=True)  # a hang is what this is about
{before}
sub = interpreters.create()
code = '''
import warnings
warnings.simplefilter("ignore")  # NumPy has its own doubts
try:
    import torchshm
except ImportError as error:
    assert "subinterpreter" in str(error), error
else:
    raise AssertionError("was not refused")
'''
run = getattr(interpreters, "exec", None) or interpreters.run_string
assert not run(sub, code)
interpreters.destroy(sub)
import numpy as np
import torchshm
torchshm.register()
x = torchshm.share(np.ones(5000))
assert (torchshm.loads(torchshm.dumps(x + 1)) == 2).all()
print("ok")
"""


def test_subinterpreter_is_refused_before_the_main_one_has_imported(tmp_path):
    assert passes(SUB.format(before=""), tmp_path) == "ok\n"


def test_subinterpreter_is_refused_beside_a_registered_main_one(tmp_path):
    assert passes(SUB.format(before="import torchshm; torchshm.register()"), tmp_path) == "ok\n"
