"""What a process says that waits for another one in once, and who it says so."""

import textwrap

from ranks import crew

# One makes, as it is told; others wait for it, with the patience of a test.
WAITING = """
import pty, select
from torchshm.data import _once
_once._SILENT = 0.01

(go, gone), (ours, theirs), (ends, end) = os.pipe(), os.pipe(), os.pipe()
fractions = []


def make(progress):
    os.write(theirs, b".")
    parts = []
    while (step := os.read(go, 1)) != b"e":
        if step == b"p":
            _once._TOLD_EVERY = 0
            progress(0.41)
        if step == b"m":
            parts.append(np.ones(5_000_000))
        if step == b"s":
            with node_store().storage():
                parts.append(np.full(10_000_000, 1.0))
        os.write(theirs, b".")
    return parts


def tell(step):
    os.write(gone, step)
    if step != b"e":
        os.read(ours, 1)


class Speaker(Rank):
    '''What it writes on stderr can be read.'''

    def __init__(self, rank, function, terminal=False):
        self.errors, theirs = pty.openpty() if terminal else os.pipe()

        def with_stderr():
            os.dup2(theirs, 2)
            os.environ["RANK"] = str(rank)
            return function()

        os.environ["TORCHSHM_JOB"] = "waiting"
        super().__init__(with_stderr)
        os.close(theirs)
        self.heard = ""

    def hears(self, wanted):
        while wanted not in self.heard:
            assert select.select([self.errors], [], [], 60)[0], (wanted, self.heard)
            self.heard += os.read(self.errors, 1000).decode()


def maker():
    return 5 + len(once("a", make))


first = Speaker(0, maker)
os.read(ours, 1)
"""


def waiting(script, tmp_path, setting=""):
    crew(f"{WAITING}{setting}\n{textwrap.dedent(script)}", tmp_path)


def test_who_waits_says_for_whom_and_how_far_it_is(tmp_path):
    script = """
    second = Speaker(3, maker)
    second.hears("torchshm: rank 3 waits for rank 0 to make 'a'\\n")
    tell(b"m")
    second.hears("rank 3 waits for rank 0 to make 'a': 40 MB\\n")
    tell(b"p")
    second.hears("rank 3 waits for rank 0 to make 'a': 41 %, 40 MB\\n")
    tell(b"s")
    second.hears("rank 3 waits for rank 0 to make 'a': 41 %, 80 MB\\n")
    tell(b"e")
    assert first.says() == second.says() == "7"
    """
    waiting(script, tmp_path, "_once._LINE_EVERY = 0.01")


def test_a_part_of_the_size_that_is_given(tmp_path):
    script = """
    first.kill()
    def sized():
        return 5 + len(once("b", make, total_bytes=80_000_000))
    first = Speaker(0, sized)
    os.read(ours, 1)
    tell(b"m")
    second = Speaker(1, sized)
    second.hears(": 50 %, 40 MB\\n")
    tell(b"e")
    assert first.says() == second.says() == "6"
    """
    waiting(script, tmp_path)


def test_on_a_terminal_the_line_changes_in_place_and_goes(tmp_path):
    script = """
    second = Speaker(3, maker, terminal=True)
    second.hears("\\r\\x1b[Ktorchshm: rank 3 waits for rank 0")
    tell(b"p")
    second.hears(": 41 %")
    tell(b"e")
    assert second.says() == "5"
    second.hears("41 %\\r\\x1b[K")
    assert "\\n" not in second.heard
    """
    waiting(script, tmp_path, "_once._TERMINAL_EVERY = 0.01")


def test_of_those_with_one_stderr_one_speaks_and_another_takes_over(tmp_path):
    script = """
    said, theirs_too = os.pipe()

    def waits():
        os.dup2(theirs_too, 2)
        _once._Waiter.close = lambda waiter: None
        return maker()

    others = [Speaker(rank, waits) for rank in (1, 2)]
    os.close(theirs_too)
    lines = os.fdopen(said)
    one = lines.readline().split()[2]
    assert {lines.readline().split()[2] for _ in range(5)} == {one}
    speaker = others.pop(int(one) - 1)
    speaker.kill()
    while (other := lines.readline().split()[2]) == one:
        pass
    assert {one, other} == {"1", "2"}
    tell(b"e")
    assert others[0].says() == "5"
    """
    waiting(script, tmp_path, "_once._LINE_EVERY = 0.01")


def test_a_logger_that_has_a_level_gets_the_lines(tmp_path):
    script = """
    import logging

    def logged(level):
        def waits():
            logging.basicConfig(format="%(name)s %(levelname)s %(message)s")
            logging.getLogger("torchshm").setLevel(level)
            sys.stderr.write("begin\\n")
            return maker()
        return waits

    second, third = Speaker(1, logged(logging.INFO)), Speaker(2, logged(logging.ERROR))
    second.hears("torchshm INFO torchshm: rank 1 waits for rank 0")
    third.hears("begin\\n")
    time.sleep(0.2)
    tell(b"e")
    assert second.says() == third.says() == "5"
    third.hears("")
    assert not select.select([third.errors], [], [], 0)[0] or not os.read(third.errors, 1)
    assert third.heard == "begin\\n"
    """
    waiting(script, tmp_path, "_once._LINE_EVERY = 0.01")


def test_a_maker_of_get_or_create_is_waited_for_too(tmp_path):
    script = """
    def slow():
        os.write(theirs, b".")
        os.read(go, 1)
        return 7

    first.kill()
    other = Speaker(0, lambda: node_store().get_or_create("b", slow))
    os.read(ours, 1)
    second = Speaker(1, lambda: once("b", slow))
    second.hears(f"rank 1 waits for process {other.pid} to make 'b'\\n")
    os.write(gone, b".")
    assert other.says() == second.says() == "7"
    """
    waiting(script, tmp_path)


def test_who_has_no_stderr_waits_in_silence(tmp_path):
    script = """
    def waits():
        sys.stderr = None
        return maker()

    second = Speaker(1, waits)
    time.sleep(0.2)
    tell(b"e")
    assert second.says() == "5"
    """
    waiting(script, tmp_path, "_once._LINE_EVERY = 0.01")


def test_who_a_process_is(tmp_path):
    script = """
    import torch
    from torch.utils.data import DataLoader

    class Names(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield _once._who()

    def workers():
        return [name for (name,) in DataLoader(Names(), num_workers=2)]

    from torchshm.data import _once
    assert _once._who() == f"process {os.getpid()}"
    os.environ["LOCAL_RANK"] = "3"
    assert _once._who() == "rank 3"
    os.environ["RANK"] = "11"
    assert _once._who() == "rank 11" and workers() == ["rank 11 (worker 0)", "rank 11 (worker 1)"]
    torch.distributed.init_process_group("gloo", init_method=f"file://{os.getcwd()}/ranks", rank=0, world_size=1)
    assert _once._who() == "rank 0"
    torch.distributed.destroy_process_group()
    """
    crew(script, tmp_path)
