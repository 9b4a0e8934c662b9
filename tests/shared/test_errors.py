"""What a user sees of an error."""

import subprocess
import sys
from pathlib import Path

import pytest

from shared.errors import run_entry_point


def test_a_ctrl_c_is_one_word_and_exit_code_130_and_a_traceback_only_with_debug(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main() -> int:
        raise KeyboardInterrupt

    assert run_entry_point(main, debug=False) == 130
    assert capsys.readouterr().err == "interrupted\n"
    with pytest.raises(KeyboardInterrupt):
        run_entry_point(main, debug=True)


def test_output_that_nobody_reads_to_its_end_is_no_error_and_other_pipes_are() -> None:
    program = "import sys; from shared.errors import run_entry_point; "
    endless = "main = lambda: [print('x' * 10_000) for _ in range(1000)]; "
    socket = "main = lambda: (_ for _ in ()).throw(BrokenPipeError('a socket')); "
    for main, code, said in ((endless, 141, b""), (socket, 1, b"BrokenPipeError: a socket\n")):
        with subprocess.Popen(
            [sys.executable, "-c", program + main + "sys.exit(run_entry_point(main, debug=False))"],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as running:
            assert running.stdout is not None
            assert running.stderr is not None
            if main is endless:
                running.stdout.readline()
                running.stdout.close()
            assert running.stderr.read().endswith(said)
            assert running.wait() == code
